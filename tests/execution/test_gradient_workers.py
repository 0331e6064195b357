"""The steps of a distillation on a fake cluster: what is computed where, what is lost, skipped and computed ahead."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError
from support.fake_ray import NEVER, FakeCluster

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.methods.common import GradientStats
from fbpc_ray.distillation.state import GradientTask, State, gradient_tasks
from fbpc_ray.distillation.worker import GradientArrays, WorkerArguments, WorkerGroupSpec
from fbpc_ray.execution.ray.gradient_workers import GradientWorkers
from fbpc_ray.execution.ray.mapping import map_on_pool
from fbpc_ray.execution.ray.scheduling import ExpertSideKey

NAMES = ("convnet-in", "convnet-bn")
STEPS = 12


def value_of(task: GradientTask, step: int) -> float:
    return 100.0 * task.architecture + 10.0 * task.draw + step


def expected(step: int, draws: int = 1) -> list[float]:
    return [value_of(task, step) for task in gradient_tasks(len(NAMES), draws)]


class Fleet:
    """Gradient workers on a fake cluster. `seconds(task, step)` is the duration of a gradient, or what it raises."""

    def __init__(self, draws: int = 1, expert_side_seconds: Any = 1.0, wanted: int = 2, **options: Any):
        self.cluster = FakeCluster(wanted=wanted, capacity=wanted)
        self.cluster.answer = self._answer
        self.seconds: Callable[[GradientTask, int], Any] = lambda task, step: 1.0
        self.expert_side_seconds, self.puts, self.used = expert_side_seconds, 0, []
        settings = Config().updated(steps=STEPS, architectures=NAMES).distillation
        specs = cast(Any, [SimpleNamespace(architecture=name) for name in NAMES])
        arguments = WorkerArguments(specs, [], cast(Any, None), np.zeros(1), settings, "none", 1, 1)
        group = WorkerGroupSpec(arguments, gradient_tasks(len(NAMES), draws))
        self.workers = GradientWorkers(group, self.cluster.pool, self._put, self.cluster.lines.append, **options)

    def _put(self, value: Any) -> Any:
        self.puts += 1
        return value

    def _answer(self, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if method == "expert_side":
            seconds = self.expert_side_seconds
            return (1.0, seconds) if isinstance(seconds, BaseException) else (seconds, None)
        task, step, images, _, expert_side, _, _ = arguments
        self.used.append((task, step, expert_side is not None))
        seconds = self.seconds(task, step)
        if isinstance(seconds, BaseException):
            return 1.0, seconds
        return seconds, GradientArrays(np.full(images.shape, value_of(task, step), np.float32), GradientStats(loss=0.0))

    def step(self, step: int) -> list[float | None]:
        """Return the values of the gradients of a step; None for a skipped one."""
        zeros = torch.zeros(1, 1, 2, 2)
        gradients = self.workers.gradients(State(step, zeros, zeros, 0.0))
        return [None if gradient is None else gradient.value.flatten()[0].item() for gradient in gradients]


@pytest.mark.parametrize("wanted", [1, 2, 3, 7])
@pytest.mark.parametrize("draws", [1, 3])
def test_gradients_come_in_the_order_of_the_tasks_from_any_number_of_workers(wanted, draws):
    """The second architecture is the faster one: it ends first, and is the second all the same."""
    fleet = Fleet(draws, wanted=wanted)
    fleet.seconds = lambda task, step: 5.0 - task.architecture - task.draw
    for step in range(4):
        assert fleet.step(step) == expected(step, draws)
    assert fleet.puts == 4  # the images, once a step
    assert not fleet.cluster.lines


def test_workers_keep_to_the_architectures_that_they_know():
    fleet = Fleet()
    fleet.cluster.await_ready(2)
    for step in range(5):
        fleet.step(step)
    for actor in fleet.cluster.actors:
        assert len({arguments[0].architecture for _, arguments in actor.calls}) == 1


def test_the_slowest_gradient_starts_first():
    """One worker for two architectures: the second, which takes longer, comes first from the second step on."""
    fleet = Fleet(wanted=1)
    fleet.seconds = lambda task, step: 1.0 + 5.0 * task.architecture
    for step in range(3):
        fleet.step(step)
    assert [task.architecture for task, _, _ in fleet.used] == [0, 1, 1, 0, 1, 0]


def test_a_gradient_is_a_copy_of_what_lies_in_the_object_store():
    """A view of it would be read-only, and would keep its block in the store."""
    fleet, zeros = Fleet(), torch.zeros(1, 1, 2, 2)
    stored = GradientArrays(
        np.ones((1, 1, 2, 2), np.float32), GradientStats(loss=0.0), solution=np.ones(3, np.float32),
        soft_labels=np.ones((1, 2), np.float32),
    )  # fmt: skip
    fleet.cluster.answer = lambda method, arguments: (1.0, stored)
    for gradient in fleet.workers.gradients(State(0, zeros, zeros, 0.0)):
        assert gradient and gradient.solution is not None and gradient.soft_labels is not None
        assert torch.equal(gradient.value, torch.ones(1, 1, 2, 2))
        for name in ("value", "solution", "soft_labels"):
            assert not np.shares_memory(getattr(gradient, name).numpy(), getattr(stored, name))


def test_a_lost_gradient_is_computed_again_and_changes_no_value():
    fleet, errors = Fleet(), [RayActorError(), RayActorError()]
    fleet.seconds = lambda task, step: errors.pop() if step == 2 and task.architecture == 1 and errors else 1.0
    for step in range(4):
        assert fleet.step(step) == expected(step)
    lost = [line for line in fleet.cluster.lines if "was lost" in line]
    assert len(lost) == 2
    assert lost[0].startswith("the gradient of convnet-bn in step 3 was lost (")
    assert lost[0].endswith("another worker computes it")
    assert len(fleet.cluster.actors) == 4


def test_a_gradient_that_is_lost_five_times_ends_the_run():
    fleet = Fleet()
    fleet.seconds = lambda task, step: RayActorError() if task.architecture else 1.0
    with pytest.raises(UserError, match=r"convnet-bn in step 1 was lost 5 times .* run again with --resume") as error:
        fleet.step(0)
    assert error.value.code == 1


def test_losses_are_counted_anew_in_each_step():
    fleet, lost = Fleet(), set()

    def seconds(task, step):
        attempt = sum(used[:2] == (task, step) for used in fleet.used)
        lost.add((step, attempt))
        return RayActorError() if attempt < 5 else 1.0

    fleet.seconds = seconds
    for step in range(3):
        assert fleet.step(step) == expected(step)
    assert (2, 5) in lost


def test_a_deadline_doubles_with_each_loss_in_a_step():
    """--step-deadline 6 and a gradient of 20 s: lost after 6 and 12 s, found within 24 s."""
    fleet = Fleet(step_deadline=6.0)
    fleet.seconds = lambda task, step: 20.0 if task.architecture else 1.0
    assert fleet.step(0) == expected(0)
    waits = [line.partition("within ")[2].partition(" s")[0] for line in fleet.cluster.lines]
    assert waits == ["6", "12"]


def test_a_straggler_is_skipped_on_request_only():
    """Three steps say what is usual: 2 s. In the next the second architecture hangs: skipped after more than 20 s."""
    fleet = Fleet(skip_stragglers=10.0)
    fleet.seconds = lambda task, step: NEVER if step == 3 and task.architecture == 1 else 2.0
    for step in range(3):
        assert fleet.step(step) == expected(step)
    assert fleet.step(3) == [value_of(GradientTask(0, 0), 3), None]
    (line,) = fleet.cluster.lines
    assert line.startswith("step 4: convnet-bn is skipped after 2")
    assert line.endswith("it usually takes 2.0 s; the others stand in for it")
    patient = Fleet()
    patient.seconds = lambda task, step: 200.0 if step == 3 and task.architecture == 1 else 2.0
    for step in range(5):
        assert patient.step(step) == expected(step)


def test_one_gradient_of_a_step_is_always_kept():
    """Both are late: the first one to end is kept, and only then the other one is skipped."""
    fleet = Fleet(skip_stragglers=2.0)
    fleet.seconds = lambda task, step: 1.0 if step < 3 else 50.0 + 100.0 * task.architecture
    for step in range(3):
        fleet.step(step)
    assert fleet.step(3) == [value_of(GradientTask(0, 0), 3), None]


def test_a_late_answer_of_a_skipped_gradient_is_of_no_use_any_more():
    """The straggler's answer of step 4 comes in step 5, and is not taken for that of step 5."""
    fleet = Fleet(skip_stragglers=3.0, wanted=3)
    fleet.seconds = lambda task, step: 15.0 if step == 3 and task.architecture == 1 else 4.0
    for step in range(3):
        fleet.step(step)
    assert fleet.step(3) == [value_of(GradientTask(0, 0), 3), None]
    for step in range(4, 7):
        assert fleet.step(step) == expected(step)


def test_spare_workers_compute_expert_sides_ahead_and_the_gradients_use_them():
    """Four workers for two gradients, two steps ahead: bounded, none twice, none after the last step."""
    fleet = Fleet(wanted=4, ahead=2, expert_side_seconds=0.2)
    fleet.cluster.await_ready(4)
    most = 0
    for step in range(STEPS):
        assert fleet.step(step) == expected(step)
        most = max(most, len(fleet.workers.expert_sides))
    assert sum(used for _, _, used in fleet.used) >= 2 * (STEPS - 2)
    assert 0 < most <= 2 * 2 + 2
    calls = [c[1] for actor in fleet.cluster.actors for c in actor.calls if c[0] == "expert_side"]
    assert len(set(calls)) == len(calls)
    assert max(step for _, step in calls) == STEPS - 1


def test_without_a_spare_worker_nothing_is_computed_ahead():
    fleet = Fleet(wanted=2, ahead=2)
    for step in range(3):
        fleet.step(step)
    assert not fleet.workers.expert_sides


def test_a_lost_expert_side_costs_no_gradient():
    """The gradient computes its own."""
    fleet = Fleet(wanted=4, ahead=2, expert_side_seconds=RayActorError())
    fleet.cluster.await_ready(4)
    for step in range(5):
        assert fleet.step(step) == expected(step)
    assert not any(used for _, _, used in fleet.used)
    assert len(fleet.cluster.actors) > 4


def test_expert_sides_take_spare_workers_only():
    """Four workers, two gradients: never more than two expert sides at a time, though gradients end between them."""
    fleet, busy = Fleet(wanted=4, ahead=2, expert_side_seconds=7.0), []
    fleet.cluster.await_ready(4)
    fleet.seconds = lambda task, step: 1.0 + task.architecture
    answer = fleet.cluster.answer

    def watched(method, arguments):
        if method == "expert_side":
            busy.append(1 + sum(isinstance(key, ExpertSideKey) for key in fleet.cluster.pool.running()))
        return answer(method, arguments)

    fleet.cluster.answer = watched
    for step in range(6):
        assert fleet.step(step) == expected(step)
    assert max(busy) == 2


def test_tasks_of_a_map_run_on_the_workers_with_one_shared_object():
    """Lost items are mapped again; the shared value is put once; gradients before and after are not disturbed."""
    fleet, puts, errors = Fleet(), [], [RayActorError()]
    fleet.step(0)

    def answer(method, arguments):
        function, shared, item = arguments
        if item == 3 and errors:
            return 1.0, errors.pop()
        return 1.0, function(shared, item, "cpu")

    gradients, fleet.cluster.answer = fleet.cluster.answer, answer
    values = map_on_pool(
        lambda shared, item, device: shared + item, 100, range(6), fleet.cluster.pool, lambda: None,
        lambda value: puts.append(value) or value,
    )  # fmt: skip
    assert dict(values) == {item: 100 + item for item in range(6)}
    assert puts == [100]
    fleet.cluster.answer = gradients
    assert fleet.step(1) == expected(1)


def test_results_of_a_map_that_its_caller_left_are_not_those_of_the_next():
    fleet = Fleet()
    fleet.cluster.answer = lambda method, arguments: (1.0 + arguments[2], arguments[1])

    def map_of(shared):
        return map_on_pool(max, shared, [0, 1], fleet.cluster.pool, lambda: None, lambda value: value)

    assert next(map_of("first")) == (0, "first")  # the second item runs on
    assert dict(map_of("second")) == {0: "second", 1: "second"}


def test_a_task_of_a_map_that_is_lost_five_times_is_an_error():
    fleet = Fleet()
    fleet.cluster.answer = lambda method, arguments: (1.0, RayActorError())
    with pytest.raises(UserError, match=r"a task was lost 5 times .*: fix the cluster and run again"):
        list(map_on_pool(max, None, [1], fleet.cluster.pool, lambda: None, lambda value: value))
