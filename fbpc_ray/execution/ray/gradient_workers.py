"""Workers of a distillation: they compute the gradients of a step, and expert sides ahead of it.

`scheduling` decides what runs where; this class carries it out on a `WorkerPool`.
"""

import statistics
from collections.abc import Callable
from typing import Any

from fbpc_ray.distillation.methods.common import Gradient
from fbpc_ray.distillation.state import GradientTask, State, labels_of, map_start
from fbpc_ray.distillation.worker import GradientArrays, WorkerGroupSpec
from fbpc_ray.execution.ray import scheduling
from fbpc_ray.execution.ray.scheduling import Durations, ExpertSideKey, GradientKey, LossCounter
from fbpc_ray.execution.ray.worker_pool import Job, JobResult, WorkerPool
from fbpc_ray.execution.serial import gradient_of


class GradientWorkers:
    """Computes the gradients of `group` on the workers of `pool`."""

    def __init__(
        self,
        group: WorkerGroupSpec,
        pool: WorkerPool,
        put: Callable[[Any], Any],
        log: Callable[[str], None],
        *,
        ahead: int = 0,
        step_deadline: float = 0.0,
        skip_stragglers: float = 0.0,
    ):
        """Use the workers of `pool`.

        Args:
            put: puts an array into the object store; returns its reference.
            ahead: steps for which expert sides are computed ahead.
            step_deadline: --step-deadline.
            skip_stragglers: --skip-stragglers.
        """
        self.group, self.pool = group, pool
        self._put, self._log = put, log
        self._ahead, self._step_deadline, self._skip_factor = ahead, step_deadline, skip_stragglers
        self.expert_sides: dict[ExpertSideKey, Any] = {}
        """References by key, from the start of the call; None if the call was lost: the gradient computes its own."""
        self._durations = Durations()
        self._losses = LossCounter()

    def gradients(self, state: State) -> list[Gradient | None]:
        """Return the gradient of each task at `state`, in order; None for a skipped straggler. Raises UserError."""
        images = self._put(state.images.numpy())
        gradients: dict[GradientTask, Gradient | None] = {}
        self._losses = LossCounter()
        self.expert_sides = {key: value for key, value in self.expert_sides.items() if key.step >= state.step}
        while len(gradients) < len(self.group.tasks):
            self._assign_work(state, images, gradients)
            for result in self.pool.results():
                self._take(result, state.step, gradients)
            self._skip_stragglers(state.step, gradients)
        return [gradients[task] for task in self.group.tasks]

    def _assign_work(self, state: State, images: Any, done: dict[GradientTask, Gradient | None]) -> None:
        """Assign gradients of this step, the slowest first; once all have a worker, expert sides of later steps."""
        tasks = self._durations.slowest_first(self.group.tasks)
        waiting = scheduling.gradients_to_start(tasks, state.step, done, self.pool.running())
        idle = self.pool.idle()
        matches = scheduling.match(waiting, [worker.affinities for worker in idle])
        for index, task in matches:
            self.pool.assign(idle[index], self._gradient_job(state, images, task))
        if len(matches) == len(waiting):
            self._assign_expert_sides(state.step, tasks)

    def _assign_expert_sides(self, step: int, tasks: list[GradientTask]) -> None:
        """Assign the expert sides of later steps to workers that this step does not need."""
        spare = self.pool.num_ready - len(self.group.tasks)
        busy = sum(isinstance(key, ExpertSideKey) for key in self.pool.running())
        steps = range(step + 1, min(step + 1 + self._ahead, self.group.worker.settings.steps))
        for key in scheduling.expert_sides_to_start(tasks, steps, self.expert_sides, spare - busy):
            if not self.pool.submit(self._expert_side_job(key)):
                return

    def _gradient_job(self, state: State, images: Any, task: GradientTask) -> Job:
        expert_side = self.expert_sides.get(ExpertSideKey(task, state.step))
        start = map_start(state, task, self.group.worker.settings)

        def submit(actor: Any) -> Any:
            return actor.gradient.remote(task, state.step, images, state.inner_lr, expert_side, start, labels_of(state))

        return Job(GradientKey(task, state.step), submit, self._deadline(task), task.architecture)

    def _expert_side_job(self, key: ExpertSideKey) -> Job:
        """Return a job whose block stays on the worker's node: the driver fetches only the first, empty value."""

        def submit(actor: Any) -> Any:
            method = actor.expert_side.options(num_returns=2)
            done, self.expert_sides[key] = method.remote(key.task, key.step)
            return done

        return Job(key, submit, self._deadline(key.task), key.task.architecture)

    def _take(self, result: JobResult, step: int, gradients: dict[GradientTask, Gradient | None]) -> None:
        """Keep the gradient of a job that ended, or count its loss; ignore results that are no longer needed."""
        match result.key:
            case ExpertSideKey() as key if result.lost:
                self.expert_sides[key] = None
            case GradientKey(task, of_step) if of_step == step and task not in gradients:
                if result.lost:
                    self.expert_sides.pop(ExpertSideKey(task, step), None)
                    self._count_loss(task, step, result.lost)
                    return
                arrays: GradientArrays = result.value  # views of Ray's store: copied
                parts = {
                    name: None if part is None else part.copy()
                    for name, part in (("solution", arrays.solution), ("soft_labels", arrays.soft_labels))
                }
                gradients[task] = gradient_of(arrays._replace(value=arrays.value.copy(), **parts))
                self._durations.add(task, result.seconds)

    def _deadline(self, task: GradientTask) -> float:
        return scheduling.deadline(self._durations.of(task), self._losses[task], self._step_deadline)

    def _count_loss(self, task: GradientTask, step: int, reason: str) -> None:
        name = f"the gradient of {self._architecture(task)} in step {step + 1}"
        self._losses.add(task, name, reason, "fix the cluster and run again with --resume")
        self._log(f"{name} was lost ({reason}); another worker computes it")

    def _skip_stragglers(self, step: int, gradients: dict[GradientTask, Gradient | None]) -> None:
        """Leave out the gradients that take --skip-stragglers times their median duration; keep at least one."""
        if not self._skip_factor or not any(gradients.values()):
            return
        for key, seconds in self.pool.running().items():
            if not isinstance(key, GradientKey) or key.step != step or key.task in gradients:
                continue
            durations = self._durations.of(key.task)
            if scheduling.is_straggler(seconds, durations, self._skip_factor):
                gradients[key.task] = None
                self._log(
                    f"step {step + 1}: {self._architecture(key.task)} is skipped after {seconds:.1f} s, it usually "
                    f"takes {statistics.median(durations):.1f} s; the others stand in for it"
                )

    def _architecture(self, task: GradientTask) -> str:
        return self.group.worker.specs[task.architecture].architecture
