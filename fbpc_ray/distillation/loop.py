"""Outer loop of Algorithm 1: a generator of steps, and its consumers, such as the checkpoint.

`distill_steps` yields; a `Checkpointer`, tracking, validation and a progress bar consume. Nothing here knows where the
workers run.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fbpc_ray.core.config import Distillation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interrupted, Interruption
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.methods.common import Gradient
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import (
    State,
    adam_rates,
    average_images,
    check_gradients,
    check_state,
    combine,
    gradient_tasks,
    image_rate,
    keep_solutions,
    update,
    update_by_adam,
)
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.inference.solution import SolverStatus

Row = dict[str, Any]
"""A row of metrics.parquet: one step, architecture and draw."""
NOT_METRICS = {"step", "architecture", "draw", "seconds_step"}
"""Columns of a row that are no quantity of one gradient."""


class TaskGradient(NamedTuple):
    """A gradient and the task that it answers."""

    architecture: str
    draw: int
    gradient: Gradient


class Step(NamedTuple):
    """One step of Algorithm 1."""

    state: State
    """After the step."""
    gradients: list[TaskGradient]
    """In the order in which the driver summed them."""
    skipped: int
    """Stragglers that were left out."""
    seconds: float
    rows: list[Row]
    """The step's rows of metrics.parquet; a consumer may add columns."""

    def metrics(self) -> dict[str, float]:
        """Return the step as flat metrics, `quantity/architecture`: the mean over an architecture's draws.

        `loss`, the sum over architectures, comes first: MLflow's plot of several runs opens with their first metric.
        """
        metrics = metrics_of_rows(self.rows)
        return metrics | ({"skipped": float(self.skipped)} if self.skipped else {})


def metrics_of_rows(rows: Sequence[Row]) -> dict[str, float]:
    """Return one step's rows of metrics.parquet as flat metrics, without validation scores; see `Step.metrics`."""
    draws: dict[str, list[float]] = {}
    for row in rows:
        for quantity, value in row.items():
            if quantity in NOT_METRICS or quantity.startswith("val_") or value is None:
                continue
            if quantity == "map_ending":
                quantity, value = "map_converged", value == SolverStatus.CONVERGED
            if isinstance(value, int | float):
                draws.setdefault(f"{quantity}/{row['architecture']}", []).append(float(value))
    means = {key: statistics.fmean(values) for key, values in draws.items()}
    architectures = dict.fromkeys(row["architecture"] for row in rows)
    loss = sum(means[f"loss/{name}"] for name in architectures)
    return {"loss": loss, "seconds/step": float(rows[0]["seconds_step"]), **means}


def take_step(settings: Distillation, architectures: Sequence[str], state: State, workers: Backend) -> Step:
    """Take one step from `state`. Raises UserError for a non-finite gradient or state, or a lost cluster."""
    start = time.perf_counter()
    tasks = gradient_tasks(len(architectures), settings.draws_per_step)
    answers = workers.gradients(state)
    gradients = [
        TaskGradient(architectures[task.architecture], task.draw, gradient)
        for task, gradient in zip(tasks, answers, strict=True)
        if gradient is not None
    ]
    names, values = [name for name, _, _ in gradients], [gradient for _, _, gradient in gradients]
    check_gradients(names, values, state.step, settings.method)
    combined = combine(tasks, answers)
    image_lr, label_lr = adam_rates(settings, state.step)
    if settings.method in network_pool.METHODS:
        after = update_by_adam(state, combined, image_lr=image_lr, label_lr=label_lr)
    else:
        after = update(
            state, combined, alpha=image_rate(settings, state.step), momentum=settings.momentum,
            inner_alpha=settings.inner_alpha, label_lr=label_lr,
        )  # fmt: skip
    check_state(after)
    after = average_images(after, state, settings.image_average)
    after = keep_solutions(after, state.step, tasks, answers, settings)
    seconds = time.perf_counter() - start
    rows = [
        {"step": after.step, "architecture": name, "draw": draw, **gradient.stats.row(), "seconds_step": seconds}
        for name, draw, gradient in gradients
    ]
    return Step(after, gradients, len(tasks) - len(gradients), seconds, rows)


def distill_steps(
    settings: Distillation, architectures: Sequence[str], state: State, workers: Backend
) -> Iterator[Step]:
    """Yield the steps of Algorithm 1 from `state` to the last one. Raises as `take_step`."""
    while state.step < settings.steps:
        step = take_step(settings, architectures, state, workers)
        state = step.state
        yield step


class Checkpointer:
    """Saves a run every `every` steps, after the last step, and when its block is left by a failure or a signal.

    `rows`, the metrics so far, grows with the steps. Without a `run` nothing is saved. `fingerprint` is that of the
    data set, which a resumed run compares.
    """

    def __init__(
        self,
        run: RunDirectory[Any] | None,
        state: State,
        rows: list[Row],
        settings: Distillation,
        on_checkpoint: Callable[[State], None] = lambda state: None,
        fingerprint: str = "",
    ):
        self.run, self.state, self.rows, self.settings = run, state, rows, settings
        self.on_checkpoint, self.fingerprint = on_checkpoint, fingerprint
        self._unsaved = False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError | Interrupted) and self._unsaved:  # False if saving is what failed
            self._save()

    def record(self, step: Step) -> None:
        """Take the state and the rows of a step."""
        self.state = step.state
        self.rows += step.rows
        self._unsaved = True

    def save_if_due(self, now: bool = False) -> None:
        """Save at the end of an interval, after the last step, or `now`. Raises OSError, the last checkpoint intact."""
        done = self.state.step
        if now or done % self.settings.checkpoint_every == 0 or done == self.settings.steps:
            self._save()
            self.on_checkpoint(self.state)

    def _save(self) -> None:
        self._unsaved = False
        if self.run:
            self.run.save(self.state, self.rows, self.fingerprint)


def follow(
    steps: Iterator[Step],
    checkpointer: Checkpointer,
    consumers: Sequence[Callable[[Step], None]],
    interruption: Interruption,
) -> State:
    """Run `steps`: after each, every consumer, then the checkpoint. Return the last state.

    A signal raises Interrupted after a checkpoint. A UserError leaves a checkpoint of the last good step.
    """
    with checkpointer:
        for step in steps:
            checkpointer.record(step)
            for consume in consumers:
                consume(step)
            checkpointer.save_if_due(now=bool(interruption.number))
            interruption.check()
    return checkpointer.state
