"""Small problems that every solver and sampler of `fbpc_ray.inference` is held against, each with its closed form.

All are quadratic in the flattened parameters z: L(z) = 1/2 (z - z*)^T H (z - z*) + floor, with z* = `slope` t + const
for the targets t, which lie in the images. So gradient descent, its derivatives and the stationary distribution of
SGHMC are known exactly (oracles.py).

The solvers know losses as the cross-entropy of logits. A loss l > 0 becomes one by two logits and the label 0:

    f = (-log(e^l - 1), 0)   =>   CE(f, 0) = log(1 + e^log(e^l - 1)) = l
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]


class Problem(NamedTuple):
    """A loss and all that is known of it; float64."""

    name: str
    start: Params
    losses: Callable[[Params, Tensor], Tensor]
    """(parameters (..., *shape), images (b, c, 1, 1)) -> positive loss of each image (..., b), nats."""
    images: Tensor
    """(b, c, 1, 1); the last channel holds the target."""
    hessian: Tensor
    """(p, p) H of the mean loss."""
    optimum: Tensor
    """(p,) z*."""
    slope: Tensor
    """(p, b) dz* / dt."""
    floor: float
    """L(z*)."""

    @property
    def labels(self) -> Tensor:
        return torch.zeros(len(self.images), dtype=torch.long)

    def forward(self, params: Params, images: Tensor) -> Tensor:
        """Logits (b, 2) with the losses as cross-entropy; of C chains side by side (C b, 2)."""
        logit = -self.losses(params, images).expm1().log().flatten()
        return torch.stack([logit, torch.zeros_like(logit)], -1)

    def flat(self, params: Params) -> Tensor:
        """z (..., p) of parameters (..., *shape)."""
        return torch.cat([value.flatten(value.ndim - self.start[name].ndim) for name, value in params.items()], -1)

    def excess(self, params: Params) -> float:
        """L(z) - L(z*)."""
        error = self.flat(params) - self.optimum
        return 0.5 * float(error @ self.hessian @ error)


def _rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]


def quadratic() -> Problem:
    """Three images, image i with l_i = 3 h_i / 2 (q_i . w - t_i)^2 + .1: H = Q diag(h) Q^T, w* = Q t.

    With curvatures .5, 3 and 20 the largest one is far from the limit of small steps.
    """
    curvature, q = torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64), _rotation(3)
    targets = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)

    def losses(params: Params, images: Tensor) -> Tensor:
        return 1.5 * curvature * (params["w"] @ q - images.flatten()).square() + 0.1

    start = {"w": torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)}
    return Problem(
        "quadratic", start, losses, targets.view(3, 1, 1, 1), q @ curvature.diag() @ q.T, q @ targets, q, 0.1
    )


def regression(bias: bool) -> Problem:
    """Least squares on six images: l_i = (x_i . w + b - t_i)^2 / 2 + .1, z* = (A^T A)^-1 A^T t, H = A^T A / 6.

    A has a column of ones for the bias, a second tensor of the parameters.
    """
    source = torch.Generator().manual_seed(2)
    x, t = (torch.randn(6, size, generator=source, dtype=torch.float64) for size in (2, 1))

    def losses(params: Params, images: Tensor) -> Tensor:
        inputs, targets = images.flatten(1)[:, :2], images.flatten(1)[:, 2]
        outputs = params["w"] @ inputs.T + (params["b"] if bias else 0.0)
        return 0.5 * (outputs - targets).square() + 0.1

    start = {"w": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    if bias:
        start["b"] = torch.tensor([0.5], dtype=torch.float64)
    design = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], 1) if bias else x
    slope = torch.linalg.pinv(design)
    optimum = slope @ t[:, 0]
    floor = 0.5 * (design @ optimum - t[:, 0]).square().mean().item() + 0.1
    name, images = "regression with a bias" if bias else "regression", torch.cat([x, t], 1).view(6, 3, 1, 1)
    return Problem(name, start, losses, images, design.T @ design / 6, optimum, slope, floor)


PROBLEMS = (quadratic(), regression(bias=False), regression(bias=True))
