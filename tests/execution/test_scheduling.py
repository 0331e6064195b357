"""Which call to which worker next, for how long, and how often: right answers by hand, without Ray and without time."""

import pytest

from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.state import GradientTask
from fbpc_ray.execution.ray.scheduling import (
    ATTEMPTS,
    Durations,
    ExpertSideKey,
    GradientKey,
    LossCounter,
    MapKey,
    deadline,
    expert_sides_to_start,
    gradients_to_start,
    is_straggler,
    match,
)
from fbpc_ray.execution.ray.waiting import Wait

A, B, C = GradientTask(0, 0), GradientTask(1, 0), GradientTask(2, 0)


def test_keys_of_different_kinds_are_different():
    """A gradient and an expert side of the same task and step are two jobs of a pool."""
    keys = [GradientKey(A, 1), ExpertSideKey(A, 1), GradientKey(A, 2), MapKey(0, 1), MapKey(1, 1)]
    assert len(set(keys)) == len(keys)
    assert GradientKey(A, 1) == GradientKey(GradientTask(0, 0), 1)


@pytest.mark.parametrize(
    "tasks, idle, expected",
    [
        ([A, B], [], []),
        ([], [set()], []),
        ([A, B], [set()], [(0, A)]),  # one worker: the first task
        ([A, B], [set(), set(), set()], [(0, A), (1, B)]),
        ([A, B], [{1}], [(0, B)]),  # a worker prefers what it has computed before
        ([A, B], [{2}, {0}], [(1, A), (0, B)]),  # known pairs come first, the others take what is left
        ([A, B], [{0, 1}, set()], [(0, A), (1, B)]),
        ([GradientTask(0, 0), GradientTask(0, 1)], [{0}, {0}], [(0, GradientTask(0, 0)), (1, GradientTask(0, 1))]),
    ],
)
def test_tasks_are_matched_with_idle_workers(tasks, idle, expected):
    assert match(tasks, idle) == expected


def test_a_gradient_starts_once_and_after_its_expert_side():
    """A is done; the gradient of B, or its expert side, runs already; those of another step are no obstacle."""
    assert gradients_to_start([A, B, C], 3, {A}, {GradientKey(B, 3)}) == [C]
    assert gradients_to_start([A, B, C], 3, {A}, {ExpertSideKey(B, 3)}) == [C]
    assert gradients_to_start([B, C], 3, set(), {GradientKey(B, 2), ExpertSideKey(C, 4)}) == [B, C]


def test_expert_sides_of_the_next_steps_come_first_and_once():
    present = {ExpertSideKey(A, 4): "block", ExpertSideKey(B, 5): None}  # None: lost, the gradient computes its own
    steps = range(4, 6)
    assert expert_sides_to_start([A, B], steps, present, 9) == [ExpertSideKey(B, 4), ExpertSideKey(A, 5)]
    assert expert_sides_to_start([A, B], steps, present, 1) == [ExpertSideKey(B, 4)]
    for limit in (0, -1):  # no spare worker, or fewer than none
        assert expert_sides_to_start([A, B], steps, present, limit) == []
    assert expert_sides_to_start([A, B], range(5, 4), {}, 9) == []  # after the last step


def test_the_slowest_task_starts_first():
    """Medians 2 and 3; a task without a duration comes last, and equal tasks keep their order."""
    durations = Durations()
    assert durations.slowest_first([A, B, C]) == [A, B, C]
    for task, seconds in ((A, 2.0), (B, 1.0), (B, 3.0), (B, 90.0)):
        durations.add(task, seconds)
    assert durations.slowest_first([A, C, B]) == [B, A, C]


def test_only_recent_durations_count():
    durations = Durations()
    for seconds in range(25):
        durations.add(A, float(seconds))
    assert durations.of(A) == [float(seconds) for seconds in range(5, 25)]
    assert durations.of(B) == []


def test_deadlines():
    """1,800 s for a first call; then 20 times the longest, at least 300 s; --step-deadline instead of both."""
    assert deadline([], 0) == 1800
    assert deadline([1.0, 2.0], 0) == 300
    assert deadline([1.0, 50.0, 2.0], 0) == 1000
    assert deadline([50.0], 0, fixed=6.0) == 6
    assert [deadline([], lost, fixed=6.0) for lost in range(4)] == [6, 12, 24, 48]  # doubled by each loss
    assert deadline([], 1) == 3600


@pytest.mark.parametrize(
    "seconds, durations, expected",
    [
        (31.0, [9.0, 10.0, 11.0], True),
        (30.0, [9.0, 10.0, 11.0], False),  # not more than three times the median
        (1e6, [9.0, 10.0], False),  # two durations don't say what is usual
        (1e6, [], False),
        (31.0, [1.0, 10.0, 1000.0], True),  # the median, not the mean or the longest
    ],
)
def test_a_straggler_takes_several_times_the_median(seconds, durations, expected):
    assert is_straggler(seconds, durations, 3.0) is expected


def test_the_fifth_loss_ends_the_run():
    losses = LossCounter()
    for attempt in range(ATTEMPTS - 1):
        losses.add(A, "the gradient of convnet-in in step 3", "node died", "run again")
        assert (losses[A], losses[B]) == (attempt + 1, 0)
    with pytest.raises(UserError) as error:
        losses.add(A, "the gradient of convnet-in in step 3", "node died", "run again")
    assert str(error.value) == "the gradient of convnet-in in step 3 was lost 5 times (node died): run again"
    assert error.value.code == 1


def test_a_wait_is_logged_once_and_ends_with_an_error():
    now, lines = [0.0], []
    wait = Wait(
        lambda: now[0], lines.append, log_after=10, patience=20,
        message=lambda: "waiting", error=lambda seconds: f"waited {seconds:g} s",
    )  # fmt: skip

    def check_at(seconds):
        now[0] = seconds
        wait.check()
        return len(lines)

    assert [check_at(seconds) for seconds in (0, 10, 10.5, 15, 20)] == [0, 0, 1, 1, 1]
    wait.restart()
    assert [check_at(seconds) for seconds in (29, 30, 31, 40)] == [1, 1, 2, 2]
    with pytest.raises(UserError, match="waited 21 s") as error:
        check_at(41)
    assert error.value.code == 1
    assert lines == ["waiting", "waiting"]
