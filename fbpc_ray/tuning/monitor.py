"""Follow a sweep while its trials run: terminal, files and MLflow."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import ModuleType
from typing import Any, NamedTuple

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Progress, log, progress
from fbpc_ray.core.provenance import Provenance, home
from fbpc_ray.core.storage import Place, place
from fbpc_ray.data.datasets import Dataset, denormalise
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import coreset_images, initial_state
from fbpc_ray.execution.session import num_steps
from fbpc_ray.reporting import image_grids
from fbpc_ray.tracking.protocol import NullTracker, Tracker
from fbpc_ray.tracking.run_contents import provenance_tags, run_params, run_tags
from fbpc_ray.tracking.run_logging import finishing, mlflow_module
from fbpc_ray.tracking.uri import compare_url, default_uri, ui_command
from fbpc_ray.tuning import trial
from fbpc_ray.tuning.plan import Plan
from fbpc_ray.tuning.trial import Outcome, Task, ValidationResult

COMPARED = 5
"""Runs that the printed MLflow page compares."""


class OpenSweep(NamedTuple):
    """A sweep with its data set and its trials' configurations."""

    folder: Place
    base: Config
    plan: Plan
    task: Task
    dataset: Dataset
    """With test images; that of `task` has none."""

    def outcomes(self) -> list[Outcome]:
        """Read the state of every trial from its files."""
        return [trial.read_outcome(config, number) for number, config in enumerate(self.task.configs)]


class SweepMonitor:
    """Follows the trials: logs lines, writes the files of ended trials, and reports to MLflow."""

    def __init__(self, sweep: OpenSweep, parent: Tracker, tracking: ModuleType | None):
        self.parent = parent
        self.outcomes = sweep.outcomes()
        self._sweep, self._tracking = sweep, tracking
        self._children: dict[int, Tracker] = {}
        self._page = ""
        self._steps = {outcome.number: outcome.last.step if outcome.last else 0 for outcome in self.outcomes}
        self._progress: Progress | None = None

    def start(self) -> None:
        """Wait for the id of the parent's MLflow run, which the trials' runs carry, and open the bar."""
        if self._tracking and not self.parent.wait(60):
            log("note: MLflow has not answered yet; the trials' runs are not tied to a parent")
        self._summary()
        self._progress = progress("sweep", sum(map(self._num_steps, self._steps)), "step", self._steps_done())

    def trial_started(self, number: int) -> None:
        if number not in self._children:
            self._children[number] = self._child(number)
            record = self.outcomes[number].record
            resumed = f", resumed after step {record.validations[-1].step}" if record.validations else ""
            log(f"trial {number} runs{resumed}: {trial.describe_flags(self._sweep.plan.trials[number])}")

    def trial_validated(self, number: int, result: ValidationResult) -> None:
        log(f"trial {number}, step {result.step}: nll {result.nll:.4g}, accuracy {100 * result.accuracy:.1f} %")
        self._steps[number] = result.step
        self._advance()
        if number in self._children:
            _send(self._children[number], result, self._sweep.plan.settings.metric)

    def trial_ended(self, number: int, lost: str) -> None:
        config = self._sweep.task.configs[number]
        now = trial.read_outcome(config, number)
        if lost:
            trial.write_end(place(config.output.out), "lost", lost)
        elif now.status not in ("finished", "failed"):
            step = now.last.step if now.last else 0
            reason = f"at step {step} of {num_steps(config)}: {self._sweep.plan.settings.metric} worse than the median"
            trial.write_end(place(config.output.out), "stopped", reason)
        now = self.outcomes[number] = trial.read_outcome(config, number)
        log(f"trial {number} {now.status}{f': {now.reason}' if now.reason else ''} ({self.count_statuses()})")
        self._advance()
        if child := self._children.pop(number, None):
            for result in now.record.validations:
                if result.step > self._steps[number]:  # written just before the process of the trial was lost
                    _send(child, result, self._sweep.plan.settings.metric)
            self._finish(child, now)
        self._summary()

    def close_bar(self) -> None:
        """Close the progress bar."""
        if self._progress is not None:
            self._progress.close()

    def _advance(self) -> None:
        if self._progress is not None:
            self._progress.update(self._steps_done() - self._progress.done)

    def _num_steps(self, number: int) -> int:
        return num_steps(self._sweep.task.configs[number])

    def _steps_done(self) -> int:
        """Count the steps done; all steps of an ended trial count as done."""
        ended = {outcome.number for outcome in self.outcomes if outcome.status in ("finished", "stopped", "failed")}
        return sum(self._num_steps(number) if number in ended else step for number, step in self._steps.items())

    def count_statuses(self) -> str:
        counts = Counter(outcome.status for outcome in self.outcomes)
        return ", ".join(f"{counts[status]} {status}" for status in sorted(counts))

    def close(self, status: str) -> None:
        """End all open MLflow runs: those of trials, also of earlier processes, and the sweep's."""
        self.close_bar()
        try:
            self._close_children(status)
        finally:
            self.parent.finish(status)

    def _close_children(self, status: str) -> None:
        """End the runs of trials that are open, and tag the sweep's run with the page that compares the best."""
        for child in self._children.values():
            child.finish(status)
        self._children.clear()
        if not self._tracking:
            return
        runs = self._runs()
        for outcome in self.outcomes:
            run = runs.get(self._key(outcome.number))
            if run and run.running:  # the trial, or its process, ended after the last message to MLflow
                if outcome.status == "open":
                    self._child(outcome.number).finish(status)
                else:
                    self._finish(self._child(outcome.number), outcome)
        best = trial.rank(self.outcomes, self._sweep.plan.settings.metric)[:COMPARED]
        keys = [self._key(outcome.number) for outcome in best if self._key(outcome.number) in runs]
        if keys:
            ids = [runs[key].run_id for key in keys]
            self._page = compare_url(self.parent.uri, runs[keys[0]].experiment_id, ids)
            self.parent.set_tags({"compare": self._page})

    def print_addresses(self) -> None:
        if self.parent.in_store:
            log(f"MLflow:  {ui_command(self.parent.uri)}")
            if self._page:
                log(f"compare: {self._page}")

    def _key(self, number: int) -> str:
        return f"{self._sweep.plan.id}/{number}"

    def _runs(self) -> dict[str, Any]:
        sweep = self._sweep
        assert self._tracking is not None
        return self._tracking.find_runs(self.parent.uri, sweep.base.output.experiment, "sweep_id", sweep.plan.id)

    def _child(self, number: int) -> Tracker:
        """Open the MLflow run of a trial, the same run after a resume, and send the validations so far."""
        if not self._tracking:
            return NullTracker()
        sweep, config = self._sweep, self._sweep.task.configs[number]
        parent = {"mlflow.parentRunId": self.parent.run_id} if self.parent.run_id else {}
        child = self._tracking.MlflowTracker(
            self.parent.uri,
            sweep.base.output.experiment,
            run_name=f"{sweep.plan.name}/{number}",
            key=self._key(number),
            tags={
                **parent, **run_tags(config, sweep.dataset.name),
                "sweep": sweep.plan.name, "sweep_id": sweep.plan.id, "trial": str(number), "folder": config.output.out,
            },
            params=sweep.plan.trials[number],
            log=log,
            finish_seconds=15.0,
        )  # fmt: skip
        for result in self.outcomes[number].record.validations:
            _send(child, result, sweep.plan.settings.metric)
        return child

    def _finish(self, child: Tracker, outcome: Outcome) -> None:
        """End the MLflow run of an ended trial; add a picture of its coreset."""
        if isinstance(child, NullTracker):
            return
        child.set_tags({"ended": f"{outcome.status} {outcome.reason}".strip()})
        if outcome.last:
            try:
                child.log_artifact(self._picture(outcome))
            except (UserError, OSError) as error:  # the sweep does not depend on it
                log(f"note: MLflow gets no picture of trial {outcome.number}: {error}")
        child.finish("FAILED" if outcome.status in ("failed", "lost") else "FINISHED")

    def _picture(self, outcome: Outcome) -> Place:
        config, dataset = self._sweep.task.configs[outcome.number], self._sweep.task.dataset
        run, d = RunDirectory(place(config.output.out)), config.distillation
        first, labels = initial_state(dataset, d.ipc, d.seed)
        state, _ = run.restore(labels, dataset.image_shape) or (first, [])
        title = f"trial {outcome.number}, {dataset.name}, {d.ipc} per class, step {state.step}"
        images = denormalise(coreset_images(state), dataset.mean, dataset.std).numpy()
        image_grids.coreset_grid(images, labels.numpy(), dataset.classes, run.picture_path, title)
        return run.picture_path

    def _summary(self) -> None:
        """Log the state of the sweep to MLflow; the step is the number of ended trials."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        values = {f"trials/{status}": float(counts[status]) for status in ("finished", "stopped", "failed", "lost")}
        if best := trial.rank(self.outcomes, self._sweep.plan.settings.metric):
            assert best[0].last is not None
            values |= {f"best/val/{name}": getattr(best[0].last, name) for name in trial.SCORES}
            values["best/trial"] = float(best[0].number)
        self.parent.log_metrics(values, len(self.outcomes) - counts["open"])


@contextmanager
def open_monitor(sweep: OpenSweep, provenance: Provenance) -> Iterator[SweepMonitor]:
    """Open the monitor of a sweep and its MLflow run; end both with the block."""
    output, settings = sweep.base.output, sweep.plan.settings
    tracking = mlflow_module(f"everything is in {sweep.folder}", log) if output.tracking else None
    parent: Tracker = NullTracker()
    if tracking:
        parent = tracking.MlflowTracker(
            default_uri(home()),
            output.experiment,
            run_name=sweep.plan.name,
            key=sweep.plan.id,
            tags={
                "sweep": sweep.plan.name, "sweep_id": sweep.plan.id, **run_tags(sweep.base, sweep.dataset.name),
                **provenance_tags(provenance), "folder": str(sweep.folder), "flags": " ".join(sweep.plan.trials[0]),
            },
            params={**run_params(sweep.base), **{f"sweep/{name}": value for name, value in asdict(settings).items()}},
            log=log,
        )  # fmt: skip
    monitor = SweepMonitor(sweep, parent, tracking)
    with finishing(monitor.close):
        yield monitor


def _send(child: Tracker, result: ValidationResult, metric: str) -> None:
    """Log a validation; the objective first: MLflow's plot of several runs opens with their first metric."""
    scores = {f"val/{name}": getattr(result, name) for name in trial.SCORES}
    child.log_metrics({f"objective/{metric}": getattr(result, metric), **scores}, result.step)
    for step, loss in result.losses:
        child.log_metrics({"training/loss": loss}, int(step))
