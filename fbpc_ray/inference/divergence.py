"""Eqs. 8-10 by Eq. 17: Monte-Carlo gradient of the forward KL between function-space posteriors.

    grad_u KL(nu_x | nu_u) ~= grad_u 1/S sum_s [ -log p(y | mean_x + Psi_x^(1/2) eps_x^(s))
                                                 +log p(y | mean_u + Psi_u^(1/2) eps_u^(s)) ]

With a categorical likelihood, -log p is the cross-entropy. Its *mean* over the m images is taken: with the sum, the
learning rate alpha of the paper's Table 4 would be wrong by a factor m.

Soft labels p (m, d) enter nu_u ~ nu_0(f) exp(sum_jc p_jc log softmax_c(f_j)), and not nu_x. The derivative of the
normaliser of nu_u is an expectation under nu_u, so the gradient by the labels is the same difference, exact and without
a derivative of the MAP solve:

    d/dp_jc KL(nu_x | nu_u) = E_u[log softmax_c(f_j)] - E_x[log softmax_c(f_j)]                   (divided by m here)

It is 0 where both sides expect the same log-probabilities, the sufficient statistics of p. With p = softmax(z),
d/dz = p * (d/dp - sum_c p_c d/dp_c).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbpc_ray.inference.posterior import FunctionPosterior


class Divergence(NamedTuple):
    """The two terms of Eq. 17; `value` is what is differentiated with respect to the pseudocoreset."""

    value: Tensor
    """() expected_x - expected_u. Gradient flows to the images through both means."""
    expected_x: Tensor
    """() mean cross-entropy under q_x, nats per image. No gradient."""
    expected_u: Tensor
    """() mean cross-entropy under q_u, nats per image. No gradient."""


def expected_cross_entropy(
    posterior: FunctionPosterior, labels: Tensor, samples: int, source: torch.Generator
) -> Tensor:
    """Estimate () E_q[-log p(y | f)] of Eq. 17 by S = `samples` draws f = mean + Psi^(1/2) eps.

    It is the mean over draws and m images; `labels` are as in `Batch`.
    """
    mean, variance = posterior
    noise = torch.randn((samples, *mean.shape), generator=source).to(mean)  # (S, m, d)
    logits = mean + variance.sqrt() * noise
    return cross_entropy(logits.flatten(0, 1), labels.repeat(samples, *[1] * (labels.ndim - 1)))


def forward_kl(
    posterior_x: FunctionPosterior,
    posterior_u: FunctionPosterior,
    labels: Tensor,
    samples: int,
    source: torch.Generator,
) -> Divergence:
    """Estimate Eq. 17 by S = `samples` independent draws a side; `labels` (m,) or (m, d) as in `Batch`."""
    expected_x = expected_cross_entropy(posterior_x, labels, samples, source)
    expected_u = expected_cross_entropy(posterior_u, labels, samples, source)
    return Divergence(expected_x - expected_u, expected_x.detach(), expected_u.detach())
