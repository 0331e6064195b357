"""Real sweeps on Ray: room for trials, ASHA, kills and resumes, MLflow."""

import json
import os
import re
import signal
import subprocess
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest
from support.processes import alive, descendants, gradient_workers, kill, soon
from support.runs import flags, start

from fbpc_ray.commands import main
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.core.signals import Interruption


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
    output: str
    finished: dict[int, int]
    """{trial that was over: when its file was written, ns}."""
    status: dict[str, str]
    """{key of a run in MLflow: its status}."""


@pytest.fixture(scope="module")
def sweep_sessions(small, tmp_path_factory) -> tuple[Path, Path, list[Session]]:
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
        output = process.communicate(timeout=300)[0]
        if number is not None:
            all_ended = soon(lambda below=below: not any(map(alive, below)))
            assert all_ended, f"left behind: {[title for pid, title in below.items() if alive(pid)]}"
        time_written = {
            number_of_trial: trial_files(folder)[number_of_trial].stat().st_mtime_ns for number_of_trial in over(folder)
        }
        sessions.append(Session(process.returncode, output, time_written, statuses(home)))
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
def test_a_sweep_goes_on_after_kills_and_repeats_nothing(sweep_sessions):
    _, folder, sessions = sweep_sessions
    assert [session.code for session in sessions] == [-signal.SIGKILL, 128 + signal.SIGTERM, 0], sessions[1].output
    assert f"resume with: fbpc tune --out {folder} --resume" in sessions[1].output
    assert re.search(r"trial \d was lost \(.*\); it is started again", sessions[2].output), sessions[2].output
    assert steps_of_looks(folder) == {0: [2, 4, 6, 8, 10, 12], 1: [], 2: [2, 4, 6, 8, 10, 12]}
    assert sessions[0].finished
    for before in sessions[:2]:
        for number, time_written in before.finished.items():
            assert sessions[2].finished[number] == time_written  # nobody touched what was over
    starts = {number: json.loads(path.read_text())["starts"] for number, path in trial_files(folder).items()}
    assert any(len(steps) > 1 and steps[-1] > 0 for steps in starts.values())  # one went on in the middle
    for number in (0, 2):
        rows = pq.read_table(folder / f"trials/{number:05d}/metrics.parquet").to_pylist()
        assert Counter(row["step"] for row in rows) == dict.fromkeys(range(1, STEPS + 1), 2)


@pytest.mark.slow
@pytest.mark.ray
def test_a_failed_trial_ends_nothing_and_the_best_is_named(sweep_sessions, capsys):
    _, folder, _ = sweep_sessions
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
def test_mlflow_has_one_run_a_trial_and_none_left_running(sweep_sessions):
    from fbpc_ray.tracking.tracker import MlflowClient

    home, _, sessions = sweep_sessions
    assert "RUNNING" in sessions[0].status.values()  # SIGKILL leaves no time; what follows mends it
    assert set(sessions[1].status.values()) <= {"FINISHED", "FAILED", "KILLED"}
    assert sessions[2].status == {"parent": "FINISHED", "0": "FINISHED", "1": "FAILED", "2": "FINISHED"}
    by_name = {run.data.tags.get("trial", "parent"): run for run in runs(home)}
    assert len(runs(home)) == 4
    client, parent = MlflowClient(f"sqlite:///{home}/mlflow.db"), by_name.pop("parent")
    for name, run in by_name.items():
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
    page = re.search(r"compare: (\S+)", sessions[2].output)
    assert page
    compared = json.loads(unquote(page[1].split("runs=")[1].split("&")[0]))
    assert set(compared) == {run.info.run_id for name, run in by_name.items() if name != "1"}
