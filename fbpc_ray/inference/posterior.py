"""Eqs. 15-16: the Gaussian approximation of a function-space posterior at the pseudocoreset.

    q(f_u) = N(f_u | g_theta(u), Psi)                                                              (Eq. 15)
    theta^(0) = theta,  theta^(k) = theta^(k-1) - lr * grad loss(theta^(k-1)),  mean = g_sg(theta^(0))(u)
    Psi = sg(diag(1/K sum_k g_theta^(k)(u)^2 - (1/K sum_k g_theta^(k)(u))^2))                      (Eq. 16)

The same functions serve both sides: `batches` are real images on the expert side, and the pseudocoreset on the u side.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbpc_ray.core.types import Batch, Forward, Loss, LossAndGrad, Params


class FunctionPosterior(NamedTuple):
    """q(f_u) of Eq. 15 for m images and d classes."""

    mean: Tensor
    """(m, d) logits at theta^(0). Gradient flows to the images, not to the parameters."""
    variance: Tensor
    """(m, d) the diagonal of Psi in squared logits. No gradient flows."""


def loss_and_grad(forward: Forward, criterion: Loss = cross_entropy) -> LossAndGrad:
    """Return the mean loss of a batch, by default cross-entropy, and its gradient, by autograd."""

    def of(params: Params, batch: Batch) -> tuple[Tensor, Params]:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        with torch.enable_grad():
            loss = criterion(forward(leaves, batch.images), batch.labels)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        return loss.detach(), dict(zip(leaves, gradients, strict=True))

    return of


def sgd_trajectory(
    loss_and_grad: LossAndGrad, params: Params, batches: Iterable[Batch], learning_rate: float
) -> Iterator[Params]:
    """Yield theta^(1), theta^(2), ...: one plain SGD step on the mean cross-entropy of each batch (Eq. 16's `opt`).

    `params` is left as it is; what is yielded carries no gradient and may be kept.
    """
    for batch in batches:
        _, gradients = loss_and_grad(params, batch)
        params = {name: value.detach() - learning_rate * gradients[name] for name, value in params.items()}
        yield params


@torch.no_grad()
def empirical_variance(logits: Iterable[Tensor]) -> Tensor:
    """Return Psi of Eq. 16: the biased (1/K) elementwise variance (m, d) of K logits (m, d), without gradient.

    Welford's recurrence: E[g^2] - E[g]^2 as printed cancels in float32. Raises ValueError when there is no tensor.
    """
    mean, squares, count = torch.zeros(()), torch.zeros(()), 0
    for value in logits:
        count += 1
        if count == 1:
            mean, squares = value.clone(), torch.zeros_like(value)
            continue
        deviation = value - mean
        mean = mean + deviation / count
        squares = squares + deviation * (value - mean)
    if count == 0:
        raise ValueError("Eq. 16 needs at least one parameter sample (K >= 1)")
    return squares / count


@torch.no_grad()
def variances(logits: Forward, samples: Iterable[Params], views: Sequence[Tensor]) -> list[Tensor]:
    """Return Psi of Eq. 16 at each of `views` (b, c, h, w) of the same images, with one pass over the samples."""
    of_all = empirical_variance(torch.cat([logits(sample, view) for view in views]) for sample in samples)
    return list(of_all.split(len(views[0])))


def posterior_at(forward: Forward, params: Params, images: Tensor, variance: Tensor | None) -> FunctionPosterior:
    """Return Eq. 15's posterior of logits at `images`, with the `variance` Psi; None gives Psi = I (FBPC-isotropic)."""
    mean = forward({name: value.detach() for name, value in params.items()}, images)
    return FunctionPosterior(mean, torch.ones_like(mean) if variance is None else variance)
