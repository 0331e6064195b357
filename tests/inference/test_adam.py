"""Adam as a function against torch's."""

import pytest
import torch

from fbpc_ray.inference.adam import adam_start, adam_step


def test_steps_are_those_of_torch():
    source = torch.Generator().manual_seed(0)
    value = torch.randn(5, generator=source)
    theirs, ours = value.clone().requires_grad_(), adam_start(value)
    optimizer = torch.optim.Adam([theirs], lr=0.03)
    for _ in range(20):
        theirs.grad = torch.randn(5, generator=source)
        ours = adam_step(ours, theirs.grad, 0.03)
        optimizer.step()
    assert ours.steps == 20
    torch.testing.assert_close(ours.value, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_small_gradients_are_held_back_by_epsilon_outside_the_root():
    """|g| = eps = 1e-8 moves by lr / 2 and |g| = 1e-6 by almost lr: eps is added to the root, as published."""
    state = adam_step(adam_start(torch.zeros(2, dtype=torch.float64)), torch.tensor([1e-8, 1e-6]).double(), 0.1)
    assert state.value.tolist() == pytest.approx([-0.05, -0.1 / 1.01])


def test_a_step_changes_nothing_in_place():
    start = adam_start(torch.ones(2))
    adam_step(start, torch.ones(2), 0.1)
    assert [part.tolist() for part in start[:3]] == [[1, 1], [0, 0], [0, 0]]
