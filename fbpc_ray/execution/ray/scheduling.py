"""Decide which worker computes which gradient or expert side next. Pure: no Ray, no clock."""

import itertools
import statistics
from collections import Counter
from collections.abc import Collection, Container, Hashable, Sequence
from dataclasses import dataclass

from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.state import GradientTask

ATTEMPTS = 5
"""Attempts per gradient, or per task of a map, before the run fails."""
FIRST_DEADLINE, LEAST_DEADLINE, TIMES_LONGEST = 1800.0, 300.0, 20.0
"""Deadlines in seconds: of a first call; the least of a later call; else this multiple of the longest recent call."""
RECENT = 20
"""Calls of a task whose durations count."""
LEAST_DURATIONS = 3
"""Known durations of a task from which a call can be a straggler."""


# Dataclasses, since NamedTuples of two classes are equal if their values are.
@dataclass(frozen=True)
class GradientKey:
    """Names the gradient of a task in a step."""

    task: GradientTask
    step: int


@dataclass(frozen=True)
class ExpertSideKey:
    """Names the expert side of a task in a step."""

    task: GradientTask
    step: int


@dataclass(frozen=True)
class MapKey:
    """Names an item of a call of `map`."""

    call: int
    index: int


class Durations:
    """Seconds of the recent gradients of each task."""

    def __init__(self) -> None:
        self._seconds: dict[GradientTask, list[float]] = {}

    def add(self, task: GradientTask, seconds: float) -> None:
        """Add the duration of a gradient."""
        self._seconds[task] = [*self.of(task), seconds][-RECENT:]

    def of(self, task: GradientTask) -> list[float]:
        """Return the recent durations of `task`, the oldest first."""
        return self._seconds.get(task, [])

    def slowest_first(self, tasks: Sequence[GradientTask]) -> list[GradientTask]:
        """Sort by the median duration; tasks without one come last, equal ones in the given order."""
        return sorted(tasks, key=lambda task: -statistics.median(self.of(task) or [0.0]))


def deadline(durations: Sequence[float], attempts: int, fixed: float = 0.0) -> float:
    """Return the deadline of a call in seconds.

    Each failed attempt in a step doubles it, so that a deadline that is too short does not end the run.

    Args:
        durations: of recent calls for the same task.
        attempts: failed attempts in this step.
        fixed: --step-deadline; 0: from `durations`.
    """
    usual = max(LEAST_DEADLINE, TIMES_LONGEST * max(durations)) if durations else FIRST_DEADLINE
    return (fixed or usual) * 2**attempts


def is_straggler(seconds: float, durations: Sequence[float], factor: float) -> bool:
    """Return whether a call that has run for `seconds` takes more than `factor` times the median duration."""
    return len(durations) >= LEAST_DURATIONS and seconds > factor * statistics.median(durations)


def match(tasks: Sequence[GradientTask], idle: Sequence[Collection[Hashable]]) -> list[tuple[int, GradientTask]]:
    """Match tasks with idle workers, as many as there are of both: (index of the worker, task).

    The first worker that has computed one of the architectures before gets it; if there is none, the first worker gets
    the first task.

    Args:
        tasks: in the order in which they should start.
        idle: the architectures that each idle worker has computed before.
    """
    workers, waiting, matches = list(range(len(idle))), list(tasks), []
    while workers and waiting:
        known = ((index, task) for index in workers for task in waiting if task.architecture in idle[index])
        index, task = next(known, (workers[0], waiting[0]))
        workers.remove(index)
        waiting.remove(task)
        matches.append((index, task))
    return matches


def gradients_to_start(
    tasks: Sequence[GradientTask], step: int, done: Container[GradientTask], running: Container[Hashable]
) -> list[GradientTask]:
    """Return the tasks of `step` without a result whose gradient or expert side no worker computes now.

    An expert side that runs already began earlier than a new one would, so its gradient waits for it.
    """
    return [
        task
        for task in tasks
        if task not in done and GradientKey(task, step) not in running and ExpertSideKey(task, step) not in running
    ]


def expert_sides_to_start(
    tasks: Sequence[GradientTask], steps: range, present: Container[ExpertSideKey], limit: int
) -> list[ExpertSideKey]:
    """Return at most `limit` expert sides of `steps` that are not `present`: the earliest steps first."""
    keys = (ExpertSideKey(task, step) for step in steps for task in tasks)
    return list(itertools.islice((key for key in keys if key not in present), max(0, limit)))


class LossCounter:
    """Counts the lost calls of each key, and ends the run when one was lost `ATTEMPTS` times."""

    def __init__(self) -> None:
        self._losses = Counter[Hashable]()

    def __getitem__(self, key: Hashable) -> int:
        return self._losses[key]

    def add(self, key: Hashable, name: str, reason: str, advice: str) -> None:
        """Count a loss of `key`. Raises UserError if it was the last attempt.

        Args:
            name: names the call in the error: "the gradient of convnet-in in step 3".
            reason: why the call was lost.
            advice: what to do, for the error.
        """
        self._losses[key] += 1
        if self._losses[key] == ATTEMPTS:
            raise UserError(f"{name} was lost {ATTEMPTS} times ({reason}): {advice}", code=1)
