"""Settings: the flat view, and their JSON, also of earlier versions and damaged."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from fbpc_ray.core import settings
from fbpc_ray.core.config import GROUPS, MAY_CHANGE_ON_RESUME, Config, from_json, read_config, to_json
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import PRESETS, preset


def test_flag_names_are_unique_over_the_groups():
    """The command line is flat: two groups must not share a name."""
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert Config().flat().keys() == set(names)
    assert [type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)] == list(GROUPS)


def test_settings_are_frozen():
    """A run's configuration is the one that was written down."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().distillation.ipc = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().data = Config().data  # type: ignore[misc]


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_is_documented(group):
    """A string follows each field and is its --help: one or more words, not the name again."""
    tree = ast.parse(Path(settings.__file__).read_text())
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == group.__name__)
    documented = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            documented[node.target.id] = text.value if isinstance(text, ast.Constant) else None
    assert list(documented) == [field.name for field in dataclasses.fields(group)]
    for name, text in documented.items():
        assert isinstance(text, str), name
        assert len(text) > 10, name
    assert group.__doc__


def test_updated_changes_the_named_and_keeps_the_others():
    """One flag of each group at once; the original stays."""
    before = Config()
    changes = {"data": "cifar10", "width": 64, "expert_lr": 0.5, "ipc": 10, "num_chains": 7, "device": "cpu"}
    after = before.updated(**changes)
    assert after.flat() == {**before.flat(), **changes}
    assert before == Config()
    assert after.updated(ipc=50).flat() == {**before.flat(), **changes, "ipc": 50}
    assert before.updated() == before


def test_an_unknown_setting_is_refused_with_the_nearest_names():
    """A typo is not a silent default."""
    with pytest.raises(UserError, match="unknown setting 'lamda_x': did you mean lambda_x") as caught:
        Config().updated(ipc=3, lamda_x=0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name, tmp_path):
    """Equal after writing and reading, tuples and floats too; the text is one JSON object of flags."""
    original = preset(name).updated(gamma=0.1 + 0.2, architectures=("convnet-ln", "convnet-bn"))
    text = to_json(original)
    assert from_json(text, "x") == original
    assert list(json.loads(text)) == list(original.flat())
    (tmp_path / "config.json").write_text(text)
    assert read_config(tmp_path) == original
    assert isinstance(read_config(tmp_path).networks.architectures, tuple)


def test_a_configuration_of_an_older_version_gets_the_defaults_for_what_it_lacks():
    """A run can be resumed after an update that added a flag."""
    assert from_json('{"ipc": 10}', "x") == Config().updated(ipc=10)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null", '"ipc"', '{"ipc": 1'])
def test_what_is_no_configuration_is_refused_by_its_name(text, tmp_path):
    """One line that names the file."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused_by_their_name(tmp_path):
    """A damaged file is a UserError, as one cut short is, and no UnicodeDecodeError."""
    (tmp_path / "config.json").write_bytes(b'{"ipc": "\xff\xfe"}')
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    """The message names the folder."""
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        read_config(tmp_path)


def test_what_may_change_on_resume_exists_and_changes_no_step():
    """Where it runs and how it is judged may change; whatever a step depends on, bits included, may not."""
    names = set(Config().flat())
    assert names >= MAY_CHANGE_ON_RESUME
    fixed = {
        "data", "image_size", "resize", "label_column", "image_column", "normalisation", "validation", "test",
        "data_seed",
        "architectures", "width", "depth", "augment", "precision", "memory_budget", "chunk_images",
        "expert_count", "expert_epochs", "expert_lr", "expert_batch_size", "expert_dtype", "expert_seed", "method",
        "ipc", "seed", "alpha", "momentum", "batch_size", "start_epoch", "start_rule", "gamma", "map_lr",
        "map_max_steps", "posterior_steps", "lambda_x", "lambda_u", "real_batch_size", "mc_samples", "device",
        "threads", "syn_steps", "inner_lr", "inner_alpha", "weight_noise", "draws_per_step",
        "views", "gamma_window", "alpha_decay", "image_average", "rkl_estimator", "learn_labels", "label_confidence",
        "compiled", "map_init", "warm_pool_size", "warm_pool_uses",
        "image_lr", "label_lr", "lr_decay", "label_scale", "ridge",
        "initial_coreset", "prior_precision", "kl_weight", "mirror", "pool_size", "pool_steps", "pool_lr",
    }  # fmt: skip
    assert names - MAY_CHANGE_ON_RESUME == fixed


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"ipc": "ten"}', "--ipc: must be of type int, got 'ten'"),
        ('{"ipc": 1.5}', "--ipc: must be of type int, got 1.5"),
        ('{"ipc": true}', "--ipc: must be of type int, got True"),
        ('{"method": "fbcp"}', "--method: got 'fbcp'; did you mean fbpc"),
        ('{"architectures": "convnet-in"}', "--architectures: must be of type tuple, got 'convnet-in'"),
        ('{"stepz": 1}', "unknown setting 'stepz': did you mean steps"),
        ("[1]", "must be one JSON object"),
        ("{", "must be one JSON object"),
    ],
)
def test_a_stored_configuration_that_no_run_can_use_names_the_file_and_the_flag(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        from_json(text, "runs/x/config.json")
    assert str(error.value).startswith("runs/x/config.json")


def test_whole_numbers_serve_where_a_float_is_due():
    assert from_json('{"alpha": 100}', "x").distillation.alpha == 100.0


def test_chains_of_a_file_of_earlier_code_start_as_they_did():
    """At the network's own initialisation, without --chain-init."""
    flat = Config().updated(chain_init=0.5).flat()
    assert from_json(json.dumps(flat), "config.json").evaluation.chain_init == 0.5
    del flat["chain_init"]
    assert from_json(json.dumps(flat), "config.json").evaluation.chain_init == 0.0
    assert from_json("{}", "preset.json") == Config()
