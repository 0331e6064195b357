"""The loop's consumers: when a checkpoint is saved, and what a failure leaves."""

from typing import Any, cast

import pytest
import torch

from fbpc_ray.core.config import Distillation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation.loop import Checkpointer, Step, follow
from fbpc_ray.distillation.state import State

FIRST = State(0, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0.0)


class Folder:
    """Records which steps are saved; the save of step `broken` fails."""

    def __init__(self, broken: int = 0):
        self.attempts: list[int] = []
        self.broken = broken

    def save(self, state: State, rows: list[dict[str, Any]], fingerprint: str) -> None:
        self.attempts.append(state.step)
        assert [row["step"] for row in rows] == list(range(1, state.step + 1))
        if state.step == self.broken:
            raise UserError("the store is gone")


def steps(last: int, failing: int = 0):
    for number in range(1, last + 1):
        if number == failing:
            raise UserError("not finite")
        yield Step(FIRST._replace(step=number), [], 0, 0.0, [{"step": number}])


def run(folder: Folder, source, *consumers, every: int = 2, last: int = 5, shown=lambda state: None) -> State:
    settings = Distillation(steps=last, checkpoint_every=every)
    return follow(source, Checkpointer(cast(Any, folder), FIRST, [], settings, shown), consumers, Interruption(()))


def test_checkpoints_come_at_the_interval_and_after_the_last_step():
    folder, seen, shown = Folder(), [], []
    state = run(
        folder, steps(5), lambda step: seen.append(step.state.step), shown=lambda state: shown.append(state.step)
    )
    assert (state.step, seen) == (5, [1, 2, 3, 4, 5])
    assert folder.attempts == shown == [2, 4, 5]


def test_a_step_that_fails_leaves_a_checkpoint_of_the_one_before():
    folder = Folder()
    with pytest.raises(UserError, match="not finite"):
        run(folder, steps(5, failing=4))
    assert folder.attempts == [2, 3]


def test_a_consumer_that_fails_leaves_a_checkpoint_of_its_step():
    folder = Folder()

    def consume(step: Step) -> None:
        if step.state.step == 3:
            raise UserError("diverged")

    with pytest.raises(UserError, match="diverged"):
        run(folder, steps(5), consume)
    assert folder.attempts == [2, 3]


def test_a_checkpoint_that_fails_is_not_tried_again():
    folder = Folder(broken=4)
    with pytest.raises(UserError, match="store is gone"):
        run(folder, steps(5))
    assert folder.attempts == [2, 4]
