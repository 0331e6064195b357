"""Settings: Table 4 from the paper itself, the paper's other constants, the flat view, JSON, and what is refused."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from fbpc_ray.core import settings
from fbpc_ray.core.config import GROUPS, MAY_CHANGE_ON_RESUME, Config, from_json, read_config, to_json
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import PRESETS, default, preset, start_of, with_method
from fbpc_ray.distillation.worker import METHODS
from fbpc_ray.evaluation.chains import default_step_size
from fbpc_ray.execution.validation import check

PAPER = Path(__file__).parents[3] / "shared" / "paper" / "fbpc.txt"

TABLE_4 = """
| CIFAR10       | 1   | 1   | 0.01     | 0.05        | 0.01        | 1000 | 100      | 10   |
|               | 10  | 2   | 0.1      | 0.05        | 0.01        | 1000 | 1000     | 100  |
|               | 50  | 10  | 0.2      | 0.05        | 0.01        | 1000 | 1000     | 500  |
| CIFAR100      | 1   | 2   | 0.1      | 0.1         | 0.1         | 5000 | 1000     | 100  |
|               | 10  | 40  | 0.1      | 0.1         | 0.1         | 5000 | 1000     | 1000 |
|               | 50  | 20  | 0.2      | 0.01        | 0.01        | 300  | 1000     | 5000 |
| Tiny-ImageNet | 1   | 2   | 0.1      | 0.1         | 3           | 5000 | 1000     | 100  |
|               | 10  | 40  | 1        | 0.1         | 3           | 500  | 1000     | 100  |
|               | 50  | 40  | 1        | 0.1         | 3           | 500  | 1000     | 100  |
"""
"""The rows of the paper's Table 4 as printed: ipc, T, gamma, lambda_x, lambda_u, N, alpha, B."""

FIELDS = ("ipc", "start_epoch", "gamma", "lambda_x", "lambda_u", "steps", "alpha", "batch_size")


def rows(text: str) -> dict[str, dict[str, float]]:
    """{preset name: values} of a table's text; an empty first cell repeats the data set above it."""
    result, data = {}, ""
    for line in text.strip().splitlines():
        name, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        data = name.lower() or data
        result[f"{data}-ipc{cells[0]}"] = {"data": data} | dict(zip(FIELDS, map(float, cells), strict=True))
    return result


def printed() -> str:
    """Table 4 in the paper's text: what follows its caption's header and rule, up to the empty line."""
    header, body = PAPER.read_text().split("**Table 4:**")[1].split("\n|", 1)[1].split("|\n|--", 1)
    symbols = [r"ipc", r"$T$", r"$\gamma$", r"$\lambda_x$", r"$\lambda_u$", r"$N$", r"$\alpha$", r"$B$"]
    assert [cell.strip() for cell in header.split("|") if cell.strip()] == symbols
    return body.split("\n", 1)[1].split("\n\n")[0]


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not beside the repository")
def test_the_copy_of_table_4_is_the_papers():
    """So that the presets are held against the paper's numbers where its text is not at hand, too."""
    assert rows(printed()) == rows(TABLE_4)


def test_presets_are_table_4():
    """All nine rows and all eight columns, from the paper's text where it is at hand, else from the copy above."""
    table = rows(printed() if PAPER.exists() else TABLE_4)
    assert len(table) == 9
    assert set(PRESETS) == {*table, "digits"}
    for name, values in table.items():
        flat = preset(name).flat()
        assert {field: flat[field] for field in values} == values, name
        changed = {field for field, value in Config().flat().items() if flat[field] != value}
        assert changed <= set(values), name  # a row of Table 4 changes nothing else


@pytest.mark.parametrize(
    ("ipc", "row"), [(None, 1), ("1", 1), ("9", 1), ("10", 10), ("20", 10), ("49", 10), ("50", 50), ("200", 50)]
)
def test_images_per_class_between_the_rows_of_table_4_take_the_row_below(ipc, row):
    """A batch of 10 images, as of ipc 1, would be a twentieth of the 200 of ipc 20."""
    expected = preset(f"cifar10-ipc{row}")
    assert default("cifar10", ipc, "", None) == default("cifar10", ipc, "paper", None) == expected
    if ipc:
        assert start_of(expected.updated(ipc=int(ipc))) == (f"cifar10-ipc{row}", expected)
    assert default("parquet:PATH", ipc, "paper", None) == Config()


def test_defaults_are_the_papers_constants():
    """App. C.1 and C.2, Eq. 27, and method.md sections 1, 4 and 6."""
    flat = Config().flat()
    paper = {
        "expert_count": 100, "expert_epochs": 50, "expert_lr": 0.01, "expert_batch_size": 256, "width": 128,
        "augment": "dsa", "map_lr": 0.001, "map_max_steps": 2000, "posterior_steps": 30, "real_batch_size": 256,
        "mc_samples": 30, "momentum": 0.5, "start_rule": "from", "method": "fbpc", "chain_epochs": 1000,
        "chain_every": 100, "chain_friction": 0.1, "chain_full_batch": 500,
        "chain_batch_size": 256, "chain_augment": True,
    }  # fmt: skip
    assert {name: flat[name] for name in paper} == paper
    assert [default_step_size(m) for m in (1, 10, 20, 100, 5000)] == pytest.approx([0.009, 0.009, 0.018, 0.03, 0.03])
    assert flat["chain_noise"] in ("consistent", "gradient")  # "literal" explodes


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


def test_an_unknown_preset_is_refused_with_the_nearest_names():
    """The nearest first, then all."""
    with pytest.raises(UserError, match="--preset: got 'cifar10-ipc5'; did you mean cifar10-ipc50") as caught:
        preset("cifar10-ipc5")
    assert all(name in str(caught.value) for name in PRESETS)


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


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", [*METHODS, "random"])
def test_presets_pass_the_check(name, method):
    """Each preset can be run as it is, with every method."""
    config = preset(name)
    check(with_method(config, method, config.distillation.ipc))


def test_weight_space_baselines_bring_the_settings_of_their_own_paper():
    """Method section 5's table, by ipc; what is above 10 takes the row of 20; FBPC keeps Table 4's."""
    flat = {ipc: with_method(preset("cifar10-ipc1"), "bpc-fkl", ipc).flat() for ipc in (1, 10, 50)}
    names = ("start_epoch", "syn_steps", "inner_lr", "mc_samples", "alpha", "steps", "start_rule")
    assert [flat[1][name] for name in names] == [2, 50, 0.01, 30, 1000.0, 5000, "before"]
    assert [flat[10][name] for name in names[:4]] == [20, 30, 0.03, 30]
    assert [flat[50][name] for name in names[:4]] == [30, 30, 0.03, 30]
    rkl = [with_method(preset("cifar10-ipc1"), "bpc-rkl", ipc).distillation for ipc in (1, 10, 50)]
    assert [(d.mc_samples, d.alpha, d.syn_steps) for d in rkl] == [(10, 1.0, 50), (30, 1.0, 30), (10, 1.0, 30)]
    assert with_method(preset("cifar10-ipc1"), "fbpc-isotropic", 1) == preset("cifar10-ipc1").updated(
        method="fbpc-isotropic"
    )


def test_vbpc_and_frepo_bring_their_own_settings():
    """Labels and rates by ipc, judged by the last layer; frepo's ridge is a share."""
    one, ten = (with_method(preset(f"cifar10-ipc{ipc}"), "vbpc", ipc) for ipc in (1, 10))
    assert [(c.distillation.image_lr, c.distillation.label_scale) for c in (one, ten)] == [(0.1, 3.0), (0.03, 5.0)]
    assert {c.evaluation.inference for c in (one, ten)} == {"last-layer"}
    assert one.evaluation.net_label_scale == one.distillation.label_scale
    frepo = with_method(preset("cifar10-ipc10"), "frepo", 10)
    assert frepo.distillation.ridge == 1e-6
    assert [c.evaluation.net_target_scale for c in (one, ten, frepo)] == [1.0, 1.4, 1.0]


NAN, INF = float("nan"), float("inf")
COUNTS = (
    "ipc", "steps", "batch_size", "map_max_steps", "posterior_steps", "real_batch_size", "mc_samples",
    "checkpoint_every", "width", "expert_count", "expert_epochs", "expert_batch_size", "num_chains", "chain_epochs",
    "chain_every", "chain_batch_size", "syn_steps", "draws_per_step", "gamma_window",
)  # fmt: skip
POSITIVE = (
    "alpha", "gamma", "map_lr", "lambda_x", "lambda_u", "expert_lr", "inner_lr", "placement_timeout",
)  # fmt: skip
NOT_NEGATIVE = (
    "cpus_per_actor", "gpus_per_actor", "chain_d", "chain_eta", "chain_init", "chain_weight_decay", "inner_alpha",
    "weight_noise", "views", "alpha_decay", "image_average", "prefetch", "step_deadline", "skip_stragglers",
)  # fmt: skip
FRACTION = ("momentum", "chain_friction", "validation")


def refused(**changes) -> str:
    with pytest.raises(UserError) as caught:
        check(Config().updated(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.code == 2
    return message


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, bad) for name in COUNTS for bad in (0, -3)),
        *((name, bad) for name in POSITIVE for bad in (0.0, -0.1, NAN, INF)),
        *((name, bad) for name in NOT_NEGATIVE for bad in (-0.1, NAN, INF)),
        *((name, -1) for name in ("threads", "depth", "chain_full_batch")),
        *((name, bad) for name in FRACTION for bad in (-0.1, 1.0, 1.5, NAN, INF)),
    ],
)
def test_a_value_that_no_run_can_use_is_refused_with_its_flag(name, bad):
    """One line that names the flag as the command line spells it, and the value."""
    message = refused(**{name: bad})
    assert re.search(f"--{name.replace('_', '-')}(?![a-z-])", message), message
    assert str(bad) in message


def test_every_number_has_a_range():
    """-1 is refused everywhere but as a seed: a new flag is not forgotten."""
    for name, value in Config().flat().items():
        if type(value) in (int, float) and name not in ("seed", "data_seed", "expert_seed"):
            assert f"--{name.replace('_', '-')}" in refused(**{name: -1}), name


@pytest.mark.parametrize("name", [*COUNTS, *POSITIVE])
def test_the_smallest_values_pass(name):
    """1 of what is counted, and anything above 0 of what is measured."""
    check(Config().updated(**{"chain_every": 1, name: 1 if name in COUNTS else 1e-9}))


@pytest.mark.parametrize("name", ["threads", "depth", "chain_full_batch", *NOT_NEGATIVE, *FRACTION])
def test_zero_passes_where_it_means_something(name):
    """0 threads or depth is automatic; no noise, no prior, no momentum and no validation split are choices."""
    check(Config().updated(**{name: 0}))


def test_a_chain_without_a_sample_is_refused():
    """A sample every 101 steps of 100 would be none; every 100 of 100 is one."""
    message = refused(chain_every=101, chain_epochs=100)
    assert "--chain-every" in message
    assert "--chain-epochs" in message
    check(Config().updated(chain_every=100, chain_epochs=100))


@pytest.mark.parametrize("names", [(), ("convnet-in", "convnet-in"), ("convnet-in", "convnet-gn", "convnet-in")])
def test_no_or_repeated_architectures_are_refused(names):
    """A network named twice would be summed twice and logged over itself."""
    assert "--architectures" in refused(architectures=names)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"start_epoch": 50}, True),
        ({"start_epoch": 51}, False),
        ({"start_epoch": 0}, True),
        ({"start_epoch": -1}, False),
        ({"start_epoch": 21, "expert_epochs": 20}, False),
        ({"start_rule": "before", "start_epoch": 0}, False),
        ({"start_rule": "before", "start_epoch": 1}, True),
        ({"start_rule": "before", "start_epoch": -1}, False),
    ],
)
def test_experts_must_have_an_epoch_to_start_from(changes, passes):
    """from: T..50 must not be empty; before: 0..T-1 must not be. The method `random` needs no expert."""
    if passes:
        check(Config().updated(**changes))
    else:
        assert "--start-epoch" in refused(**changes)
        check(Config().updated(**changes, method="random"))


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
