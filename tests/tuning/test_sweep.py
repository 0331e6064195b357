"""Sweeps: what is drawn, who gets which part of a cluster, which trial is best; and real ones, killed and resumed."""

import json
import os
import pickle
import re
import signal
import subprocess
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest
from support.processes import alive, descendants, gradient_workers, kill, soon
from support.runs import flags, start

from fbpc_ray.commands import main
from fbpc_ray.core import config
from fbpc_ray.core.config import Sweep
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import PRESETS, preset, to_preset
from fbpc_ray.core.signals import Interruption
from fbpc_ray.execution import session
from fbpc_ray.execution.ray.placement import Node, Resources, capacity, resources_of, share
from fbpc_ray.execution.serial import Serial
from fbpc_ray.tuning import sweep as tuning
from fbpc_ray.tuning import trial as sweep
from fbpc_ray.tuning.trial import Outcome, Record, Task, ValidationResult

SPACE = {"alpha": [1.0, 10.0]}


def drawn(space, samples=1, seed=0):
    from fbpc_ray.tuning.search_space import draw_trials

    return draw_trials(space, samples, seed)


def test_the_same_seed_draws_the_same_trials_and_another_seed_others():
    from ray import tune

    space = {"alpha": tune.loguniform(1, 100), "batch_size": tune.choice([5, 10]), "gamma": 0.25}
    one = drawn(space, 6, seed=3)
    assert one == drawn(space, 6, seed=3) != drawn(space, 6, seed=4)
    assert all(1 <= each["alpha"] <= 100 and each["gamma"] == 0.25 for each in one)
    assert len({each["alpha"] for each in one}) == 6
    assert json.loads(json.dumps(one)) == one  # plain values, and the file holds what is run


def test_a_grid_is_crossed_with_the_draws_and_functions_see_the_other_values():
    from ray import tune

    from fbpc_ray.tuning.search_space import with_grid

    space = {"lambda_u": lambda own: own["lambda_x"] / 5, "lambda_x": tune.uniform(0.1, 1)}
    found = drawn(with_grid(space, sweep.parse_grid(["start-epoch=1,5", "augment=dsa,none"])), samples=2)
    assert Counter((each["start_epoch"], each["augment"]) for each in found) == Counter(
        {(1, "dsa"): 2, (1, "none"): 2, (5, "dsa"): 2, (5, "none"): 2}
    )
    assert all(each["lambda_u"] == pytest.approx(each["lambda_x"] / 5, rel=1e-3) for each in found)
    assert list(found[0]) == ["lambda_u", "lambda_x", "start_epoch", "augment"]


@pytest.mark.parametrize("name", [*PRESETS, ""])
def test_the_default_space_holds_table_4_and_only_what_a_run_can_use(name, tmp_path):
    from fbpc_ray.tuning.search_space import default_space

    base = (preset(name) if name else config.Config()).updated(validation=0.1)
    space = default_space(base, 10)
    assert set(space) == {"start_epoch", "gamma", "lambda_x", "lambda_u", "steps", "alpha", "batch_size"}
    for number, own in enumerate(drawn(space, 20)):
        found = sweep.trial_config(base, own, Sweep(), tmp_path, number)
        assert {key: found.flat()[key] for key in own} == own


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
    Path("spaces_of_tests.py").write_text("MISSPELT = {'alhpa': 1}\nLIST = [1]\n")
    with pytest.raises(SystemExit) as error:
        main.main(["tune", *words])
    assert error.value.code == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert len(found.splitlines()) == 1
    assert re.search(message, found), found
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["spaces_of_tests.py"]


def test_a_preset_file_is_plain_flags_and_accepted_where_names_are(tmp_path, capsys):
    path = tmp_path / "best.json"
    base = preset("digits").updated(alpha=3.25, steps=7, out="elsewhere", data_root="/mnt", threads=2, validation=0.2)
    path.write_text(to_preset(base))
    assert preset(str(path)) == base.updated(out="", data_root="data")
    main.main(["distill", "--preset", str(path), "--steps", "9", "--print-config"])
    said = capsys.readouterr().out
    assert '"alpha": 3.25' in said
    assert '"steps": 9' in said
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
    found = share(nodes, need, units, trials)
    assert (found, min(trials, capacity(nodes, need) // found)) == (workers, together)
    bundles = [Node(need.cpus, need.gpus)] * found
    inside = resources_of(units, bundles, **more)
    assert capacity(bundles, inside) >= found


def test_half_a_gpu_is_no_place_for_more_than_a_half():
    assert capacity([Node(1, 0.5)], Resources(0.5, 0.25)) == 2
    assert capacity([Node(1, 0.5)], Resources(1, 0.6)) == 0
    assert capacity([Node(4, 1.5)], Resources(1, 0.5)) == 3
    assert capacity([Node(4, 1.5)], Resources(1, 1)) == 1


def outcome(number, how, *scores):
    looks = [
        ValidationResult(10 * (index + 1), nll, accuracy, 0.1, 0.2, []) for index, (nll, accuracy) in enumerate(scores)
    ]
    return Outcome(number, how, "", Record([0], looks))


def test_the_best_is_the_finished_trial_whose_last_look_is_best():
    found = [
        outcome(0, "finished", (0.1, 0.99), (1.5, 0.7)),  # what it was in between doesn't count
        outcome(1, "stopped", (0.5, 0.9)),
        outcome(2, "finished", (2.0, 0.1), (1.0, 0.6)),
        outcome(3, "failed"),
        outcome(4, "finished", (2.0, 0.1), (1.0, 0.6)),
    ]
    assert [each.number for each in sweep.rank(found, "nll")] == [2, 4, 0]
    assert [each.number for each in sweep.rank(found, "accuracy")] == [0, 2, 4]
    assert sweep.rank(found[1:2], "nll") == []


def test_looks_have_shorter_chains_with_as_many_samples():
    whole = config.Evaluation(chain_epochs=1000, chain_every=100, num_chains=5)
    assert sweep.val_evaluation(whole, Sweep()) == replace(whole, chain_epochs=200, chain_every=20, num_chains=1)
    assert sweep.val_evaluation(whole, Sweep(val_chain_epochs=5000, val_chains=2)) == replace(whole, num_chains=2)
    assert sweep.val_evaluation(replace(whole, chain_epochs=4, chain_every=4), Sweep()).chain_every == 1


@pytest.mark.parametrize("text", ["", "[]", '{"how": "stopped"}', "[" * 100_000])
@pytest.mark.parametrize("name", ["trial.json", "ended.json"])
def test_a_damaged_file_of_a_trial_is_one_line(name, text, small, tmp_path):
    folder = tmp_path / "trials/00003"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"00003/{name} is damaged \(.*: delete") as caught:
        sweep.read_outcome(small.updated(out=str(folder)), 3)
    assert "\n" not in str(caught.value)


def test_scratch_files_of_a_killed_sweep_and_its_trials_are_removed(small, tmp_path):
    names = (".trials.md.0f.tmp", "trials/00000/.trial.json.0f.tmp", "trials/00001/checkpoint/.state.0f.tmp")
    for name in (*names, "trials/00001/trial.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    configs = [small.updated(out=str(tmp_path / f"trials/{number:05d}")) for number in range(3)]
    tuning.remove_leftovers(SimpleNamespace(folder=tmp_path, task=SimpleNamespace(configs=configs)))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["trial.json"]


def test_losses_are_summed_over_architectures_and_averaged_over_draws():
    rows = [
        {"step": step, "architecture": name, "loss": loss}
        for step, name, loss in [(1, "a", 9.0), (2, "a", 1.0), (2, "a", 3.0), (2, "b", 5.0)]
    ]
    assert sweep.losses_after(rows, 1) == [[2, 7.0]]


def task_of(small, digits, folder, *own, **settings):
    """Trials on the experts of the session, as `tuning` would give them out."""
    base = small.updated(steps=4, val_every=2, validation=0.1)
    made = Sweep(**settings)
    configs = [sweep.trial_config(base, each, made, folder, number) for number, each in enumerate(own)]
    held = digits._replace(validation=digits.test)  # as many images as the experts' data set leaves
    return Task(configs, sweep.without_test_split(held), made)


def one_trial(task, number=0, until=None):
    looks = []

    def report(look):
        looks.append(look)
        if look.step == until:
            raise KeyboardInterrupt

    sweep.run_trial(task, number, Serial("cpu", Interruption()), report, print)
    return looks


def test_a_trial_that_was_cut_gives_what_the_whole_one_gives(small, digits, tmp_path):
    whole = one_trial(task_of(small, digits, tmp_path / "whole", {"alpha": 5.0}))
    assert [look.step for look in whole] == [2, 4]
    cut = task_of(small, digits, tmp_path / "cut", {"alpha": 5.0})
    with pytest.raises(KeyboardInterrupt):
        one_trial(cut, until=2)
    assert sweep.read_outcome(cut.configs[0], 0).status == "open"
    assert one_trial(cut) == whole[1:]
    found = sweep.read_outcome(cut.configs[0], 0)
    assert (found.status, found.record.starts, found.record.validations) == ("finished", [0, 2], whole)
    rows = pq.read_table(Path(cut.configs[0].output.out) / "metrics.parquet").to_pylist()
    assert Counter(row["step"] for row in rows) == {1: 2, 2: 2, 3: 2, 4: 2}
    assert one_trial(cut) == []  # a finished one does nothing


def test_a_look_that_a_kill_prevented_is_made_up_for(small, digits, tmp_path):
    """The checkpoint is written before the look."""
    task = task_of(small, digits, tmp_path, {"alpha": 5.0})
    with pytest.raises(KeyboardInterrupt):
        one_trial(task, until=2)
    folder = Path(task.configs[0].output.out)
    record = sweep.read_record(folder)
    expected = record.validations.pop()
    sweep.write_record(folder, record)
    assert one_trial(task)[0] == expected


def test_a_configuration_that_diverges_is_a_failed_trial_and_no_error(small, digits, tmp_path):
    task = task_of(small, digits, tmp_path, {"alpha": 1e9, "architectures": ["convnet-none"]})
    one_trial(task)
    found = sweep.read_outcome(task.configs[0], 0)
    assert found.status == "failed"
    assert "diverged: lower --chain-eta or --alpha" in found.reason


def test_the_method_that_learns_nothing_is_looked_at_once(small, digits, tmp_path):
    task = task_of(small, digits, tmp_path, {"method": "random"})
    assert [look.step for look in one_trial(task)] == [0]
    assert sweep.read_outcome(task.configs[0], 0).status == "finished"


def test_trials_of_different_expert_recipes_that_begin_together_all_finish(small, digits, tmp_path):
    """Each opens its store before the other has one: they would be in the same folder."""
    own = small.updated(
        experts=str(tmp_path / "experts"), architectures=("convnet-in",), expert_epochs=1, start_epoch=0
    )
    task = task_of(own, digits, tmp_path, {"expert_lr": 0.02}, {"expert_lr": 0.05})

    class Overtaken(Serial):
        def map(self, function, shared, items):
            if not sweep.read_outcome(task.configs[1], 1).last:
                one_trial(task, 1)
            return super().map(function, shared, items)

    sweep.run_trial(task, 0, Overtaken("cpu", Interruption()), lambda look: None, print)
    assert [sweep.read_outcome(config, number).status for number, config in enumerate(task.configs)] == ["finished"] * 2


def test_what_trials_get_holds_no_test_image(digits, tmp_path):
    """Bytes of the test images, which are in the whole data set, are not in what is sent to trials."""
    base = preset("digits").updated(validation=0.1)
    dataset = session.load_data(base, print)
    wanted = dataset.test.images[7].tobytes()
    own = [sweep.trial_config(base, {}, Sweep(), tmp_path, 0)]
    assert wanted in pickle.dumps(dataset)
    sent = pickle.dumps(tuning.task_of(own, dataset, Sweep()))
    assert wanted not in sent
    assert dataset.validation.images[7].tobytes() in sent
    assert not {row.tobytes() for row in dataset.validation.images} & {row.tobytes() for row in dataset.test.images}


def test_asha_knows_what_was_found_before_a_resume(small, digits, tmp_path):
    """A trial worse than the median of ended ones is stopped; to a scheduler without a past it is the best."""
    from fbpc_ray.tuning import ray_tune as on_ray

    task = task_of(small, digits, tmp_path, *[{}] * 4)
    past = [outcome(n, "finished", (float(n), 0.5)) for n in range(3)]
    past = [each._replace(record=Record([0], [each.record.validations[0]._replace(step=2)])) for each in past]
    trial = SimpleNamespace(trial_id="x", config={"number": 3})
    for known, nll, decision in ((past, 0.9, "CONTINUE"), (past, 1.1, "STOP"), ([], 1.1, "CONTINUE")):
        asha = on_ray._scheduler(task, [*known, outcome(3, "open")])
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, {"step": 2, "nll": nll}) == decision


def test_a_sweep_that_finds_no_room_says_so_and_ends():
    """Asked at each turn of Tune's loop."""
    from fbpc_ray.tuning import ray_tune as on_ray

    clock = SimpleNamespace(now=0.0)
    lines, running, pending = [], SimpleNamespace(status="RUNNING"), SimpleNamespace(status="PENDING")
    callback = on_ray.ProgressCallback(
        None, Interruption(), lines.append, lambda: "1 CPU", 300.0, log_after=60.0, clock=lambda: clock.now,  # type: ignore[arg-type]
    )  # fmt: skip
    for clock.now in (59.0, 61.0, 299.0):
        callback.on_step_begin(0, [pending])
        assert lines == ["no trial runs yet: waiting for 1 CPU"] * (clock.now > 60)
    callback.on_step_begin(0, [pending, running])
    clock.now = 1000.0
    callback.on_step_begin(0, [pending, running])  # while any trial runs, the others may wait
    clock.now = 1301.0
    with pytest.raises(UserError, match=r"no trial started within 301 s: waited for 1 CPU; .*--placement-timeout"):
        callback.on_step_begin(0, [pending])


def trial_files(folder: Path) -> dict[int, Path]:
    return {int(path.parent.name): path for path in sorted((folder / "trials").glob("*/trial.json"))}


def steps_of_looks(folder: Path) -> dict[int, list[int]]:
    """{trial: the steps at which it looked}."""
    return {
        number: [look["step"] for look in json.loads(path.read_text())["looks"]]
        for number, path in trial_files(folder).items()
    }


def over(folder: Path) -> list[int]:
    return [number for number, steps in steps_of_looks(folder).items() if steps[-1:] == [STEPS]]


STEPS = 12
OURS = "ray::ImplicitFunc", "ray::Worker"
"""Processes of trials and of their gradients."""
GRID = {0: 5.0, 1: 1e30, 2: 2.0}
"""alpha of each trial; the second diverges."""


class Session(NamedTuple):
    """What one of the processes left."""

    code: int
    said: str
    finished: dict[int, int]
    """{trial that was over: when its file was written, ns}."""
    status: dict[str, str]
    """{key of a run in MLflow: its status}."""


@pytest.fixture(scope="module")
def swept(small, tmp_path_factory) -> tuple[Path, Path, list[Session]]:
    """(home, folder, sessions) of a sweep on a cluster of its own, which has room for two of the three trials at a
    time, or for one, so that they end one after the other. Its driver is killed with SIGKILL once a trial is
    over and another is under way, goes on, is asked to end by SIGTERM as soon as a trial is under way, goes on, loses
    the process of a trial, and comes to its end."""
    from ray._private.utils import get_num_cpus

    home = tmp_path_factory.mktemp("sweep")
    folder, sessions = home / "mine", []
    base = small.updated(
        steps=STEPS, validation=0.1, tracking=True, experiment="sweeps", address="local", device="cpu",
        out=str(folder), experts=str(home / "experts"),
        cpus_per_actor=float((get_num_cpus() + 1) // 2), val_every=2,
    )  # fmt: skip
    grid = f"alpha={','.join(map(str, GRID.values()))}"
    words = [*flags(base), "--grid", grid, "--scheduler", "none"]
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        process = start("tune", *words, FBPC_HOME=str(home), MLFLOW_TRACKING_URI="")
        words, below = ["--out", str(folder), "--resume"], {}

        def amid(process: subprocess.Popen[str] = process) -> bool:
            under_way = [steps for steps in steps_of_looks(folder).values() if steps and steps[-1] < STEPS]
            now = bool(over(folder) and under_way) if not sessions else bool(gradient_workers(process.pid))
            return now or process.poll() is not None

        if not soon(amid) or process.poll() is not None:
            process.kill()
            pytest.fail(f"not in the middle of anything: {process.communicate()[0]}")
        if number is not None:
            below = {pid: title for pid, title in descendants(process.pid).items() if title.startswith(OURS)}
            os.kill(process.pid, number)
        else:
            trials = [pid for pid, title in descendants(process.pid).items() if title.startswith(OURS[0])]
            assert kill(trials[0])
        said = process.communicate(timeout=300)[0]
        if number is not None:
            gone = soon(lambda below=below: not any(map(alive, below)))
            assert gone, f"left behind: {[title for pid, title in below.items() if alive(pid)]}"
        written = {each: trial_files(folder)[each].stat().st_mtime_ns for each in over(folder)}
        sessions.append(Session(process.returncode, said, written, statuses(home)))
    return home, folder, sessions


def runs(home: Path) -> list[Any]:
    from fbpc_ray.tracking.tracker import MlflowClient

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SQLAlchemy, about MLflow
        client = MlflowClient(f"sqlite:///{home}/mlflow.db")
        experiment = client.get_experiment_by_name("sweeps")
        return list(client.search_runs([experiment.experiment_id])) if experiment else []


def statuses(home: Path) -> dict[str, str]:
    return {run.data.tags.get("trial", "parent"): run.info.status for run in runs(home)}


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_goes_on_after_kills_and_repeats_nothing(swept):
    _, folder, sessions = swept
    assert [each.code for each in sessions] == [-signal.SIGKILL, 128 + signal.SIGTERM, 0], sessions[1].said
    assert f"resume with: fbpc tune --out {folder} --resume" in sessions[1].said
    assert re.search(r"trial \d was lost \(.*\); it is started again", sessions[2].said), sessions[2].said
    assert steps_of_looks(folder) == {0: [2, 4, 6, 8, 10, 12], 1: [], 2: [2, 4, 6, 8, 10, 12]}
    assert sessions[0].finished
    for before in sessions[:2]:
        for number, written in before.finished.items():
            assert sessions[2].finished[number] == written  # nobody touched what was over
    starts = {number: json.loads(path.read_text())["starts"] for number, path in trial_files(folder).items()}
    assert any(len(each) > 1 and each[-1] > 0 for each in starts.values())  # one went on in the middle
    for number in (0, 2):
        rows = pq.read_table(folder / f"trials/{number:05d}/metrics.parquet").to_pylist()
        assert Counter(row["step"] for row in rows) == dict.fromkeys(range(1, STEPS + 1), 2)


@pytest.mark.slow
@pytest.mark.ray
def test_a_failed_trial_ends_nothing_and_the_best_is_named(swept, capsys):
    _, folder, _ = swept
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["ended"] for row in rows] == ["finished", "failed", "finished"]
    assert "lower --alpha" in rows[1]["why"]
    assert "lower --alpha" in (folder / "trials.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    best = min((row for row in rows if row["nll"] is not None), key=lambda row: row["nll"])["trial"]
    assert result["best"]["trial"] == best
    assert result["test"]["images_scored"] == 360
    assert preset(str(folder / "best.json")).distillation.alpha == GRID[best]
    main.main(["distill", "--preset", str(folder / "best.json"), "--print-config", "--experts", str(folder / "none")])
    assert f'"alpha": {GRID[best]}' in capsys.readouterr().out
    main.main(["tune", "--out", str(folder), "--resume"])
    assert "this sweep is complete" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_mlflow_has_one_run_a_trial_and_none_left_running(swept):
    from fbpc_ray.tracking.tracker import MlflowClient

    home, _, sessions = swept
    assert "RUNNING" in sessions[0].status.values()  # SIGKILL leaves no time; what follows mends it
    assert set(sessions[1].status.values()) <= {"FINISHED", "FAILED", "KILLED"}
    assert sessions[2].status == {"parent": "FINISHED", "0": "FINISHED", "1": "FAILED", "2": "FINISHED"}
    found = {run.data.tags.get("trial", "parent"): run for run in runs(home)}
    assert len(runs(home)) == 4
    client, parent = MlflowClient(f"sqlite:///{home}/mlflow.db"), found.pop("parent")
    for name, run in found.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["sweep"] == "mine"
        history = client.get_metric_history(run.info.run_id, "val/nll")
        assert sorted(point.step for point in history) == ([] if name == "1" else [2, 4, 6, 8, 10, 12])
        assert client.get_metric_history(run.info.run_id, "objective/nll") or name == "1"
        pictures = [file.path for file in client.list_artifacts(run.info.run_id)]
        assert pictures == ([] if name == "1" else ["coreset.png"])  # the page that compares shows them side by side
        losses = client.get_metric_history(run.info.run_id, "training/loss")
        assert sorted(point.step for point in losses) == ([] if name == "1" else list(range(1, STEPS + 1)))
    best = client.get_metric_history(parent.info.run_id, "best/val/nll")
    assert max(point.step for point in best) == 3  # after the last trial
    values = [point.value for point in sorted(best, key=lambda point: point.step)]
    assert values == sorted(values, reverse=True)
    assert client.get_metric_history(parent.info.run_id, "trials/failed")[-1].value == 1
    page = re.search(r"compare: (\S+)", sessions[2].said)
    assert page
    compared = json.loads(unquote(page[1].split("runs=")[1].split("&")[0]))
    assert set(compared) == {run.info.run_id for name, run in found.items() if name != "1"}
