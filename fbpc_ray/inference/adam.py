"""Adam (Kingma and Ba, 2015) as a pure function of its state, on one tensor.

m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
x <- x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from typing import NamedTuple

import torch
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class AdamState(NamedTuple):
    """A tensor that Adam moves, with its moments."""

    value: Tensor
    first: Tensor
    """m, of the shape of `value`."""
    second: Tensor
    """v, of the shape of `value`."""
    steps: int = 0
    """t: steps so far."""


def adam_start(value: Tensor) -> AdamState:
    """Start at `value` with moments of 0."""
    return AdamState(value, torch.zeros_like(value), torch.zeros_like(value))


def adam_step(state: AdamState, gradient: Tensor, learning_rate: float) -> AdamState:
    """Take one step; `state` is left as it is."""
    steps = state.steps + 1
    first = BETA_1 * state.first + (1 - BETA_1) * gradient
    second = BETA_2 * state.second + (1 - BETA_2) * gradient.square()
    scale = (second / (1 - BETA_2**steps)).sqrt() + EPSILON
    return AdamState(state.value - (learning_rate / (1 - BETA_1**steps)) * first / scale, first, second, steps)
