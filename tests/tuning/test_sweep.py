"""Sweeps: which trials are drawn, and how many fit into a cluster."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.runs import refused

from fbpc_ray.commands import main
from fbpc_ray.core import config
from fbpc_ray.core.config import Sweep
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import PRESETS, preset, to_preset
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.execution.ray.placement import Node, Resources, capacity, resources_of, share
from fbpc_ray.tuning import sweep as sweeps
from fbpc_ray.tuning import trial as sweep
from fbpc_ray.tuning.plan import Plan, refuse_untrusted, write_plan

SPACE = {"alpha": [1.0, 10.0]}


def drawn(space, samples=1, seed=0):
    from fbpc_ray.tuning.search_space import draw_trials

    return draw_trials(space, samples, seed)


def test_the_same_seed_draws_the_same_trials_and_another_seed_others():
    from ray import tune

    space = {"alpha": tune.loguniform(1, 100), "batch_size": tune.choice([5, 10]), "gamma": 0.25}
    one = drawn(space, 6, seed=3)
    assert one == drawn(space, 6, seed=3) != drawn(space, 6, seed=4)
    assert all(1 <= trial["alpha"] <= 100 and trial["gamma"] == 0.25 for trial in one)
    assert len({trial["alpha"] for trial in one}) == 6
    assert json.loads(json.dumps(one)) == one  # plain values, and the file holds what is run


def test_a_grid_is_crossed_with_the_draws_and_functions_see_the_other_values():
    from ray import tune

    from fbpc_ray.tuning.search_space import with_grid

    space = {"lambda_u": lambda own: own["lambda_x"] / 5, "lambda_x": tune.uniform(0.1, 1)}
    result = drawn(with_grid(space, sweep.parse_grid(["start-epoch=1,5", "augment=dsa,none"])), samples=2)
    assert Counter((trial["start_epoch"], trial["augment"]) for trial in result) == Counter(
        {(1, "dsa"): 2, (1, "none"): 2, (5, "dsa"): 2, (5, "none"): 2}
    )
    assert all(trial["lambda_u"] == pytest.approx(trial["lambda_x"] / 5, rel=1e-3) for trial in result)
    assert list(result[0]) == ["lambda_u", "lambda_x", "start_epoch", "augment"]


@pytest.mark.parametrize("name", [*PRESETS, ""])
def test_the_default_space_holds_table_4_and_only_what_a_run_can_use(name, tmp_path):
    from fbpc_ray.tuning.search_space import default_space

    base = (preset(name) if name else config.Config()).updated(validation=0.1)
    space = default_space(base, 10)
    assert set(space) == {"start_epoch", "gamma", "lambda_x", "lambda_u", "steps", "alpha", "batch_size"}
    for number, own in enumerate(drawn(space, 20)):
        result = sweep.trial_config(base, own, Sweep(), tmp_path, number)
        assert {key: result.flat()[key] for key in own} == own
        assert own["batch_size"] <= 10 * base.distillation.ipc, "larger ones are all images, too"


def test_the_default_space_is_the_one_of_the_documentation():
    """docs/sweeps.md, around the row for ten images per class of CIFAR-10; T is at most the last epoch."""
    from fbpc_ray.tuning.search_space import default_space

    def domains(base):
        space = default_space(base, 10)
        return {name: getattr(d, "categories", None) or (d.lower, d.upper) for name, d in space.items()}

    base = preset("cifar10-ipc10")
    assert domains(base) == {
        "start_epoch": [1, 2, 4], "steps": [500, 1000, 2000], "batch_size": [50, 100],
        "gamma": (0.025, 0.4), "lambda_x": (0.0125, 0.2), "lambda_u": (0.0025, 0.04), "alpha": (125, 8000),
    }  # fmt: skip
    assert domains(base.updated(expert_epochs=3))["start_epoch"] == [1, 2, 3]


def test_the_default_space_of_vbpc_holds_its_own_settings(tmp_path):
    from fbpc_ray.core.presets import with_method
    from fbpc_ray.tuning.search_space import default_space

    base = with_method(preset("cifar10-ipc1").updated(validation=0.1), "vbpc", 1)
    names = {"image_lr", "label_lr", "label_scale", "ridge"}
    assert set(default_space(base.updated(label_lr=0.0), 10)) == names - {"label_lr"}
    space = default_space(base, 10)
    assert set(space) == names
    for number, own in enumerate(drawn(space, 20)):
        sweep.trial_config(base, own, Sweep(), tmp_path, number)
        assert 0.025 <= own["image_lr"] <= 0.4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--grid", "alhpa=1,2"], "did you mean alpha"),
        (["--grid", "alpha=1,much"], "must be of type float, got 'much'"),
        (["--grid", "alpha=1,-3"], "trial 1: --alpha: must be above 0, got -3.0"),
        (["--grid", "start-epoch=99"], "trial 0: .*start-epoch"),
        (["--grid", "data-seed=1,2"], "the same for all trials; give --data-seed"),
        (["--grid", "architectures=convnet"], "must be of type tuple"),
        (["--space", "no_such_module:SPACE"], "--space no_such_module:SPACE fails .*MODULE:NAME"),
        (["--space", "spaces_of_tests:MISSPELT"], "'alhpa'; did you mean alpha"),
        (["--space", "spaces_of_tests:LIST"], "must be a dict"),
        (
            ["--space", "spaces_of_tests:FAILING"],
            r"--space spaces_of_tests:FAILING fails at .*spaces_of_tests.py:3 \(KeyError: 'gama'\): fix it",
        ),
        (["--validation", "0"], "a sweep selects on the validation split"),
        (["--backend", "serial"], "must be ray for a sweep, got serial"),
        (["--num-trials", "-1"], "--num-trials: must be 0 or more, got -1"),
        (["--val-chains", "0"], "--val-chains: must be 1 or more, got 0"),
        (["--resume", "auto"], "add --out DIR"),
        (["--preset", "nowhere/best.json"], "nowhere/best.json not found"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("spaces_of_tests.py").write_text(
        "MISSPELT = {'alhpa': 1}\nLIST = [1]\nFAILING = {'gamma': 1.0, 'alpha': lambda flags: flags['gama']}\n"
    )
    with pytest.raises(SystemExit) as error:
        main.main(["tune", *words])
    assert error.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert len(output.splitlines()) == 1
    assert re.search(message, output), output
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["spaces_of_tests.py"]


def test_a_trial_of_another_method_runs_as_a_distillation_by_it(tmp_path, monkeypatch, capsys):
    """Flags of the command line win over what a method brings; sizes are chosen for each, on the same networks."""
    monkeypatch.chdir(tmp_path)
    words = ["tune", "--grid", "method=fbpc,bpc-fkl,vbpc", "--out", "sweep", "--dry-run"]
    main.main([*words, "--steps", "10", "--alpha", "3"])
    text = capsys.readouterr().out
    assert re.findall(r"^trial .*", text, re.M) == [
        "trial 0: method fbpc, steps 10, alpha 3",
        "trial 1: method bpc-fkl, steps 10, alpha 3",
        "trial 2: method vbpc, steps 10, alpha 3",
    ]
    main.main([*words, "--preset", "quick", "--start-epoch", "3"])
    text = capsys.readouterr().out
    steps = re.search(r"^--steps +(\d+)", text, re.M)
    assert steps is not None
    assert f"trial 0: method fbpc, steps {steps[1]}, start_epoch 3" in text
    assert f"trial 1: method bpc-fkl, steps {2 * int(steps[1])}, start_epoch 3" in text
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_over_networks_of_ones_own_is_resumed_by_repeating_its_grid(tmp_path, monkeypatch, capsys):
    """sweep.json alone imports no code; the line that says so, and that of the resume, name what a resume needs."""
    monkeypatch.chdir(tmp_path)
    Path("nets_of_a_sweep.py").write_text(
        "from torch import nn\n"
        "def build(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
    )
    base = preset("digits").updated(validation=0.1, out=str(tmp_path / "sweep"))
    settings = Sweep(grid=('architectures=["nets_of_a_sweep:build"],["convnet-in"]',))
    sweep = sweeps._prepare(base, settings, tmp_path / "sweep", False, True, True)
    write_plan(sweep.folder, sweep.plan, sweep.base)
    words = "--out", "sweep", "--resume", "--dry-run"
    line = refused(capsys, *words, command="tune")
    grid = ["--grid", *settings.grid]
    fix = f"repeat {shlex.join(grid)} on the command line if you trust it"
    assert line.endswith(f"nets_of_a_sweep:build, but a file alone imports no code: {fix}")
    main.main(["tune", *words, *grid])
    assert "trial 0: architectures nets_of_a_sweep:build\ntrial 1: arch" in capsys.readouterr().out
    line = refused(capsys, *words, "--grid", 'architectures=["nets_of_a_sweep:build"]', command="tune")
    assert "the sweep's flags differ from the stored ones" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_root": "/mnt"}, "trial 1 sets --data-root, which must be the same for all trials"),
        (
            {"experts": "s3://me:secret@stranger/x"},
            r"needs --experts s3://.*@stranger/x, but a file alone opens no obj",
        ),
        ({"initial_coreset": "gs://stranger/x"}, "needs --initial-coreset gs://stranger/x, but a file alone opens no"),
        ({"architectures": ["os:system"]}, "needs os:system, but a file alone imports no code"),
        ({"initial_coreset": "s3://mine/x"}, ""),
    ],
)
def test_a_stored_sweep_names_no_code_or_store_that_the_command_line_does_not(flags, message):
    stored = Plan("name", "id", Sweep(), [{"alpha": 1.0}, flags])
    base = preset("digits").updated(initial_coreset="s3://mine/x")
    if not message:
        refuse_untrusted(stored, base, Path("sweep"))
        return
    with pytest.raises(UserError, match=message) as caught:
        refuse_untrusted(stored, base, Path("sweep"))
    assert "secret" not in str(caught.value)


def test_a_trial_without_images_to_begin_with_is_refused_before_the_sweep(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, labels = initial_state(digits, 2, 5)
    soft = torch.zeros(20, 10)
    coreset.save(Coreset(first.images, labels, digits.mean, digits.std, digits.classes, soft), Path("given"))
    words = ("--num-trials", "1", "--out", "sweep", "--initial-coreset", "given", "--grid")
    assert "it has 2 images per class, --ipc is 1" in refused(capsys, *words, "ipc=2,1", command="tune")
    assert "has 120 images, ipc is 500" in refused(capsys, "--grid", "ipc=1,500", command="tune")
    capsys.readouterr()
    main.main(["tune", *words, "ipc=2", "learn-labels=true,false", "--dry-run"])
    note = "note: --initial-coreset: its soft labels are left out; add --learn-labels to begin with them"
    assert capsys.readouterr().out.count(note) == 1


def test_a_preset_file_is_plain_flags_and_accepted_where_names_are(tmp_path, capsys):
    path = tmp_path / "best.json"
    base = preset("digits").updated(alpha=3.25, steps=7, out="elsewhere", data_root="/mnt", threads=2, validation=0.2)
    path.write_text(to_preset(base))
    assert preset(str(path)) == base.updated(out="", data_root="data")
    main.main(["distill", "--preset", str(path), "--steps", "9", "--print-config"])
    output = capsys.readouterr().out
    assert '"alpha": 3.25' in output
    assert '"steps": 9' in output
    path.write_text('{"alpha": 3, "alhpa": 4}')
    with pytest.raises(UserError, match=r"best.json: unknown setting 'alhpa': did you mean alpha"):
        preset(str(path))
    path.write_bytes(b"\x80\x04cos\nsystem\n")  # the beginning of a pickle
    with pytest.raises(UserError, match="is not a configuration"):
        preset(str(path))


@pytest.mark.parametrize(
    "nodes, units, trials, gpu, workers, together",
    [
        ([Node(2, 0)], 4, 8, False, 1, 2),  # two cores: two trials, each of one worker that computes all four
        ([Node(1, 0)], 4, 8, False, 1, 1),
        ([Node(64, 0)], 4, 8, False, 4, 8),
        ([Node(16, 0)], 4, 2, False, 4, 2),
        ([Node(16, 0)], 4, 6, False, 2, 6),
        ([Node(16, 4)], 4, 8, True, 1, 4),  # a GPU each, which its four workers share
        ([Node(16, 1)], 4, 8, True, 1, 4),  # a quarter of the only one
        ([Node(8, 2), Node(8, 2)], 2, 2, True, 2, 2),
    ],
)
def test_a_trial_gets_bundles_in_which_its_workers_fit(nodes, units, trials, gpu, workers, together):
    """Room for all trials at once before more than one worker for any; and inside its bundles a trial finds a place."""
    more = {"gpu": gpu, "threads": 1, "cpus_per_actor": 0.0, "gpus_per_actor": 0.0}
    need = resources_of(units, nodes, **more)
    result = share(nodes, need, units, trials)
    assert (result, min(trials, capacity(nodes, need) // result)) == (workers, together)
    bundles = [Node(need.cpus, need.gpus)] * result
    inside = resources_of(units, bundles, **more)
    assert capacity(bundles, inside) >= result


def test_half_a_gpu_is_no_place_for_more_than_a_half():
    assert capacity([Node(1, 0.5)], Resources(0.5, 0.25)) == 2
    assert capacity([Node(1, 0.5)], Resources(1, 0.6)) == 0
    assert capacity([Node(4, 1.5)], Resources(1, 0.5)) == 3
    assert capacity([Node(4, 1.5)], Resources(1, 1)) == 1
