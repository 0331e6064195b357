"""The MLflow runs of a sweep: what they get where a trial, its checkpoint or MLflow fails. Without Ray and MLflow."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from support.runs import silent

from fbpc_ray.core.config import Sweep
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import Provenance
from fbpc_ray.core.signals import Interruption
from fbpc_ray.execution.serial import Serial
from fbpc_ray.tracking.protocol import NullTracker
from fbpc_ray.tuning import monitor, trial
from fbpc_ray.tuning import sweep as tuning
from fbpc_ray.tuning.plan import write_plan
from fbpc_ray.tuning.trial import Record, ValidationResult


class Recorder:
    """A tracker that keeps what it gets; no `NullTracker`, to which the monitor sends nothing."""

    run_id, uri, in_store, delivered = "r", "sqlite:///m.db", True, True

    def __init__(self, **options: Any) -> None:
        self.options, self.points, self.tags, self.status = options, {}, {}, ""

    def wait(self, seconds):
        return True

    def log_metrics(self, values, step):
        self.points.setdefault(step, {}).update(values)

    def log_artifact(self, path, folder=None):
        assert path.exists()

    def set_tags(self, values):
        self.tags.update(values)

    def finish(self, status):
        self.status = self.status or status


class Store:
    """The module `tracking.tracker` of a store that has the runs of `running`."""

    def __init__(self) -> None:
        self.trackers: list[Recorder] = []
        self.running: dict[str, Any] = {}

    def MlflowTracker(self, *where: str, **options: Any) -> Recorder:
        self.trackers.append(Recorder(**options))
        return self.trackers[-1]

    def find_runs(self, *query: str) -> dict[str, Any]:
        return self.running


@pytest.fixture
def sweep(small, tmp_path):
    """A sweep of two trials of four steps."""
    base = small.updated(validation=0.1, out=str(tmp_path / "sweep"), steps=4)
    opened = tuning._prepare(base, Sweep(grid=("alpha=1,10",)), tmp_path / "sweep", False, False, False)
    write_plan(opened.folder, opened.plan, opened.base)
    return opened


def validation(step: int) -> ValidationResult:
    return ValidationResult(step, 1.0 + step, 0.5, 0.1, 0.2, [[step, 7.0]])


def folder_of(sweep: Any, number: int) -> Path:
    return Path(sweep.task.configs[number].output.out)


def test_a_validation_whose_trial_died_before_its_report_is_sent_at_its_end(sweep):
    """The trial wrote steps 2 and 4 and was killed; the process that continued it had nothing left to validate."""
    store = Store()
    board = monitor.SweepMonitor(sweep, Recorder(), store)  # type: ignore[arg-type]
    board.trial_started(0)
    board.trial_validated(0, validation(2))
    trial.write_record(folder_of(sweep, 0), Record([0, 4], [validation(2), validation(4)]))
    board.trial_ended(0, "")
    (child,) = store.trackers
    assert {step: values["val/nll"] for step, values in child.points.items()} == {2: 3.0, 4: 5.0}
    assert child.points[4]["training/loss"] == 7.0
    assert child.status == "FINISHED"


def test_a_picture_that_cannot_be_made_ends_no_sweep(sweep, capsys):
    store = Store()
    board = monitor.SweepMonitor(sweep, Recorder(), store)  # type: ignore[arg-type]
    board.trial_started(0)
    trial.write_record(folder_of(sweep, 0), Record([0], [validation(4)]))
    state = folder_of(sweep, 0) / "checkpoint" / "state.safetensors"
    state.parent.mkdir()
    state.write_bytes(b"damaged")
    board.trial_ended(0, "")
    assert store.trackers[0].status == "FINISHED"
    assert "note: MLflow gets no picture of trial 0: " in capsys.readouterr().out


def test_the_run_of_the_sweep_is_tagged_by_its_best_trial(small, tmp_path):
    """Whose test scores it has: another method than the one that the sweep varies, or is named by."""
    base = small.updated(
        validation=0.1, out=str(tmp_path / "sweep"), num_chains=1, net_steps=2, architectures=("convnet-in",)
    )  # fmt: skip
    space = Sweep(grid=("method=random,frepo",))
    opened = tuning._prepare(base, space, tmp_path / "sweep", False, False, False, given={"steps", "real_batch_size"})
    workers, parent, provenance = Serial("cpu", Interruption(())), Recorder(), Provenance({}, "c", "cpu")
    for number in range(2):
        trial.run_trial(opened.task, number, workers, lambda result: None, silent)
    board = monitor.SweepMonitor(opened, parent, None)  # type: ignore[arg-type]
    result = tuning._conclude(opened, board, workers, provenance)
    best = result["best"]["flags"]["method"]
    assert parent.tags["method"] == best
    assert parent.tags["best"].startswith(f"trial {result['best']['trial']}: method {best}")
    assert set(result["test"]["coresets"]) == {"random", best}
    (folder_of(opened, 1) / "checkpoint" / "state.safetensors").unlink()
    with pytest.raises(UserError, match=r"the checkpoint of the trial is missing: delete .*00001"):
        tuning._on_test(opened.task.configs[1], opened.dataset, workers, provenance, NullTracker())


def test_mlflow_gets_the_best_trial_and_the_page_that_compares_the_best_first(sweep, capsys):
    """Trial 1, of alpha 10, ends first, with an NLL of 5; trial 0 with 4. The step is the number of ended trials."""
    store, parent = Store(), Recorder()
    board = monitor.SweepMonitor(sweep, parent, store)  # type: ignore[arg-type]
    board.start()
    for number, nll in ((1, 5.0), (0, 4.0)):
        board.trial_started(number)
        result = validation(4)._replace(nll=nll, accuracy=0.25)
        trial.write_record(folder_of(sweep, number), Record([0], [result]))
        board.trial_validated(number, result)
        board.trial_ended(number, "")
    assert "trial 0, step 4: nll 4, accuracy 25.0 %" in capsys.readouterr().out
    assert [child.options["params"] for child in store.trackers] == [{"alpha": 10.0}, {"alpha": 1.0}]
    none = {"trials/stopped": 0.0, "trials/failed": 0.0, "trials/lost": 0.0}
    scores = {"best/val/accuracy": 0.25, "best/val/ece": 0.1, "best/val/brier": 0.2}
    assert parent.points == {
        0: {"trials/finished": 0.0, **none},
        1: {"trials/finished": 1.0, **none, "best/trial": 1.0, "best/val/nll": 5.0, **scores},
        2: {"trials/finished": 2.0, **none, "best/trial": 0.0, "best/val/nll": 4.0, **scores},
    }
    store.running = {
        f"{sweep.plan.id}/{number}": SimpleNamespace(running=False, run_id=f"run{number}", experiment_id="7")
        for number in (0, 1)
    }
    board.close("FINISHED")
    assert '?runs=["run0","run1"]&experiments=["7"]' in unquote(parent.tags["compare"])


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (UserError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_the_run_of_the_sweep_ends_as_the_sweep_does(sweep, error, status, monkeypatch):
    store = Store()
    monkeypatch.setattr(monitor, "mlflow_module", lambda *words: store)
    tracked = sweep._replace(base=sweep.base.updated(tracking=True))
    with suppress(UserError, KeyboardInterrupt), monitor.open_monitor(tracked, Provenance({}, "c", "cpu")):
        if error:
            raise error
    assert [tracker.status for tracker in store.trackers] == [status]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_the_run_of_the_sweep_ends_also_where_that_of_a_trial_cannot(sweep, error, monkeypatch):
    """A second Ctrl-C comes while the first waits for MLflow."""
    store, parent = Store(), Recorder()
    board = monitor.SweepMonitor(sweep, parent, store)  # type: ignore[arg-type]
    board.trial_started(0)
    monkeypatch.setattr(store.trackers[0], "finish", lambda status: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        board.close("KILLED")
    assert parent.status == "KILLED"


def test_runs_that_an_earlier_process_left_running_are_ended(sweep):
    """Trial 0 was stopped by the scheduler just before the kill, trial 1 had not ended; a run that ended stays."""
    store, parent = Store(), Recorder()
    trial.write_end(folder_of(sweep, 0), "stopped", "worse")
    board = monitor.SweepMonitor(sweep, parent, store)  # type: ignore[arg-type]
    store.running = {
        f"{sweep.plan.id}/{number}": SimpleNamespace(running=True, run_id=str(number), experiment_id="1")
        for number in (0, 1)
    }
    board.close("KILLED")
    assert [child.options["key"] for child in store.trackers] == [f"{sweep.plan.id}/0", f"{sweep.plan.id}/1"]
    assert [child.status for child in store.trackers] == ["FINISHED", "KILLED"]
    store.trackers.clear()
    for run in store.running.values():
        run.running = False
    board.close("KILLED")
    assert store.trackers == []


def test_a_lost_trial_has_failed_and_says_why(sweep):
    store = Store()
    board = monitor.SweepMonitor(sweep, Recorder(), store)  # type: ignore[arg-type]
    board.trial_started(0)
    board.trial_ended(0, "its node died")
    assert (store.trackers[0].status, store.trackers[0].tags["ended"]) == ("FAILED", "lost its node died")


def test_the_steps_that_a_pruned_trial_does_not_take_are_done(sweep):
    """A lost one is continued: its steps are not."""
    board = monitor.SweepMonitor(sweep, Recorder(), None)  # type: ignore[arg-type]
    for number in (0, 1):
        board.trial_started(number)
        trial.write_record(folder_of(sweep, number), Record([0], [validation(1)]))
        board.trial_validated(number, validation(1))
    assert board._steps_done() == 2
    board.trial_ended(0, "")
    assert board.outcomes[0].status == "stopped" and board._steps_done() == 5
    board.trial_ended(1, "its node died")
    assert board.outcomes[1].status == "lost" and board._steps_done() == 5


def test_a_resumed_sweep_has_the_threads_that_it_began_with(sweep, small):
    """Those of the processor may be others by then; they change the last bits."""
    stored = sweep.base.updated(threads=3)
    write_plan(sweep.folder, sweep.plan, stored)
    resumed = tuning._prepare(stored.updated(threads=0), sweep.plan.settings, sweep.folder, True, True, False)
    assert {config.workers.threads for config in (resumed.base, *resumed.task.configs)} == {3}
