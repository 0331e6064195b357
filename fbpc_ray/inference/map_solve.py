"""MAP solve of Algorithm 1 with its stopping rule: theta_u by Adam from a fresh initialisation.

repeat  theta <- Adam(theta, (u, y))  until  the current augmented mean loss <= gamma              (App. C.2)
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.optim.adam import adam

from fbpc_ray.core.types import Batch, LossAndGrad, Params
from fbpc_ray.inference.solution import Solution, SolverStatus


class SolveStats(NamedTuple):
    """What a solve cost, and how far it came."""

    steps: int
    """Adam steps taken."""
    loss: float
    """Mean of the last `batches_per_pass` losses, nats per image; of fewer where the solve ended earlier."""


def map_solve(
    loss_and_grad: LossAndGrad,
    params: Params,
    batches: Iterable[Batch],
    *,
    threshold: float,
    learning_rate: float,
    max_steps: int,
    batches_per_pass: int = 1,
) -> Solution[Params, SolveStats]:
    """Run Algorithm 1's inner loop: Adam until the mean loss of a pass is at most gamma.

    The objective is the mean cross-entropy, without a log-prior, as App. C.2's training loss: the prior is where
    `params` are drawn.

    Args:
        loss_and_grad: the mean cross-entropy of a batch and its gradient.
        params: a draw from the prior; left unchanged.
        batches: endless; the whole augmented pseudocoreset at each step, or its minibatches in turn.
        threshold: gamma, nats per image.
        max_steps: the solve ends after so many Adam steps.
        batches_per_pass: the mean of so many last losses, each taken before its step, is compared with gamma. No solve
            converges before so many batches.

    Returns:
        theta_u; `converged`, `max_steps` or `nonfinite`; the steps and the last mean loss.
    """
    solution = {name: value.detach().clone() for name, value in params.items()}
    values = list(solution.values())
    # Adam as a function: the class would have each process import torch's compiler, which takes seconds.
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    counts = [torch.zeros((), dtype=torch.float32, device=value.device) for value in values]
    recent: deque[float] = deque(maxlen=batches_per_pass)
    status, steps = SolverStatus.MAX_STEPS, 0
    for batch in batches:
        loss, gradients = loss_and_grad(solution, batch)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            status = SolverStatus.NONFINITE
            break
        if len(recent) == batches_per_pass and sum(recent) / batches_per_pass <= threshold:
            status = SolverStatus.CONVERGED
            break
        if steps == max_steps:
            break
        adam(
            values, [gradients[name] for name in solution], first, second, [], counts, fused=True, amsgrad=False,
            beta1=0.9, beta2=0.999, lr=learning_rate, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        steps += 1
    return Solution(solution, status, SolveStats(steps, sum(recent) / max(len(recent), 1)))
