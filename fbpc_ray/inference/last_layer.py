"""Gaussian last layer on fixed features in closed form: Bayesian linear regression, dual form.

    f_k(x) = w_k . phi(x),   w_k ~ N(0, I / rho),   Y_jk = f_k(u_j) + noise,   noise ~ N(0, sigma^2)

Phi (n, h) are the features of the n images u, Y (n, d) their targets, K = Phi Phi^T, A = K + lambda I and
lambda = rho sigma^2. Completing the square in w_k gives the posterior N(m_k, V), the same V for every class:

    V   = (rho I + Phi^T Phi / sigma^2)^-1    = 1/rho (I - Phi^T A^-1 Phi)      (Woodbury)
    m_k = V Phi^T Y_k / sigma^2               = Phi^T A^-1 Y_k                  (push-through identity)

Only A, which is n x n, is factorised, once; nothing of size h x h is formed. All is computed in float64: K's rounding
in float32 is as large as a small lambda, and the variance below is a difference of nearly equal numbers. Gradient flows
through everything.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

PROBIT = math.pi / 8
"""alpha: sigmoid(x) ~= Phi(sqrt(pi / 8) x), which have the same slope at 0."""


class LastLayer(NamedTuple):
    """Posterior of the last layer, in float64."""

    features: Tensor
    """(n, h) Phi."""
    factor: Tensor
    """(n, n) L, lower triangular, L L^T = A."""
    weights: Tensor
    """(n, d) A^-1 Y."""
    ridge: float | Tensor
    """lambda."""
    precision: float
    """rho."""


def posterior(features: Tensor, targets: Tensor, *, ridge: float | Tensor, precision: float = 1.0) -> LastLayer:
    """Solve for the posterior of the last layer by one Cholesky factorisation of A = Phi Phi^T + lambda I.

    Args:
        features: (n, h) Phi.
        targets: (n, d) Y.
        ridge: lambda = rho sigma^2, above 0.
        precision: rho of the prior N(0, I / rho).

    All is NaN where A is not positive definite in float64: features that are not finite, or a ridge too small.
    """
    phi, y = features.double(), targets.double()
    identity = torch.eye(len(phi), dtype=phi.dtype, device=phi.device)
    factor, failed = torch.linalg.cholesky_ex(phi @ phi.T + ridge * identity)
    factor = torch.where(failed > 0, torch.nan, factor)
    return LastLayer(phi, factor, torch.cholesky_solve(y, factor), ridge, precision)


def predictive(layer: LastLayer, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predictive mean (b, d) and variance (b,) at features (b, h).

        mean_k = m_k . phi     = (phi Phi^T) A^-1 Y_k
        s      = phi^T V phi   = 1/rho (|phi|^2 - |L^-1 Phi phi|^2)

    since phi^T Phi^T A^-1 Phi phi = |L^-1 Phi phi|^2. The noise of the targets is not in s.
    """
    phi = features.double()
    cross = phi @ layer.features.T
    explained = solve_triangular(layer.factor, cross.T, upper=False).square().sum(0)
    variance = (phi.square().sum(1) - explained) / layer.precision
    return cross @ layer.weights, variance.clamp(min=0.0)


def mean_field_logits(mean: Tensor, variance: Tensor) -> Tensor:
    """Return logits (b, d) whose softmax approximates E[softmax(f)], f_k ~ N(mean_k, variance).

        E[softmax(f)] ~= softmax(mean / sqrt(1 + pi/8 variance))

    It applies MacKay's E[sigmoid(a)] ~= sigmoid(mean / sqrt(1 + pi/8 s)) to each logit: the sigmoid is replaced by a
    Gaussian's distribution function of the same slope at 0, whose expectation is exact. The variance is the same for
    all classes, so it is one factor an image.
    """
    return mean / (1 + PROBIT * variance).sqrt()[:, None]


def kl_to_prior(layer: LastLayer) -> Tensor:
    """Return () KL(q || prior) in nats, the sum over the d classes, from n x n terms alone.

    KL(N(m, V) || N(0, I / rho)) = 1/2 [rho tr V + rho |m|^2 - h - log|rho V|]
    rho tr V  = h - tr(K A^-1) = h - n + lambda tr A^-1,      tr A^-1 = |L^-1|^2
    log|rho V| = log|I - Phi^T A^-1 Phi| = log(|lambda I| / |A|) = n log lambda - 2 sum_i log L_ii
    m_k        = Phi^T A^-1 Y_k
    """
    n, d = layer.weights.shape
    identity = torch.eye(n, dtype=layer.factor.dtype, device=layer.factor.device)
    trace = n - layer.ridge * solve_triangular(layer.factor, identity, upper=False).square().sum()  # tr(K A^-1)
    log_lambda = torch.as_tensor(layer.ridge, dtype=layer.factor.dtype).log()
    log_determinant = 2 * layer.factor.diagonal().log().sum() - n * log_lambda  # log|I + K / lambda|
    squares = (layer.features.T @ layer.weights).square().sum()
    return 0.5 * (d * (log_determinant - trace) + layer.precision * squares)


def relative_ridge(features: Tensor, ratio: float) -> Tensor:
    """Return () lambda = ratio tr(K) / n: a ridge relative to the mean squared norm of the features (n, h)."""
    return ratio * features.double().square().sum() / len(features)


def one_hot_targets(labels: Tensor, classes: int, scale: float) -> Tensor:
    """Return regression targets (n, d) of labels (n,): scale (one-hot - 1/d), float32; each row sums to 0."""
    return scale * (torch.nn.functional.one_hot(labels, classes) - 1 / classes).float()


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return () the mean over n images of |outputs - targets|^2 / 2, for outputs and targets (n, d)."""
    return 0.5 * (outputs - targets).square().sum(1).mean()
