"""Algorithm 1's inner loop: the MAP solution theta_u of the pseudocoreset, by Adam from a fresh initialisation.

repeat  theta <- Adam(theta, (u, y))  until  the current augmented mean loss <= gamma              (App. C.2)
"""

import math
from collections import deque
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

import torch
from torch.optim.adam import adam

from fbpc_ray.core.types import Batch, LossGradient, Params


class SolverStatus(StrEnum):
    """How a solve ended."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    NONFINITE = "nonfinite"


class MapSolution(NamedTuple):
    """A MAP solution and how it was reached."""

    params: Params
    """theta_u. No gradient flows."""
    ending: SolverStatus
    steps: int
    """Adam steps taken."""
    loss: float
    """The last mean loss seen, nats an image."""


def map_solve(
    slope: LossGradient,
    params: Params,
    batches: Iterable[Batch],
    *,
    threshold: float,
    learning_rate: float,
    max_steps: int,
    batches_per_pass: int = 1,
) -> MapSolution:
    """Adam on the mean cross-entropy of each batch until the loss of one pass is `threshold` (gamma) or less.

    `slope` gives that loss and its gradient. `batches` is endless: the augmented pseudocoreset afresh each step, or its
    minibatches in turn; the loss of a pass is the mean of the last `batches_per_pass` losses, each taken before its
    step. `params` (the draw from the prior) is left as it is.
    """
    solution = {name: value.detach().clone() for name, value in params.items()}
    values = list(solution.values())
    # Adam as a function: the class would have each process import torch's compiler, which takes seconds.
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    counts = [torch.zeros((), dtype=torch.float32, device=value.device) for value in values]
    recent: deque[float] = deque(maxlen=batches_per_pass)
    ending, steps = SolverStatus.MAX_STEPS, 0
    for batch in batches:
        loss, gradients = slope(solution, batch)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            ending = SolverStatus.NONFINITE
            break
        if len(recent) == batches_per_pass and sum(recent) / batches_per_pass <= threshold:
            ending = SolverStatus.CONVERGED
            break
        if steps == max_steps:
            break
        adam(
            values, [gradients[name] for name in solution], first, second, [], counts, fused=True, amsgrad=False,
            beta1=0.9, beta2=0.999, lr=learning_rate, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        steps += 1
    return MapSolution(solution, ending, steps, sum(recent) / max(len(recent), 1))
