"""Closed forms that the tests hold the code against, each with its derivation. Nothing here comes from the package."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def sgd_on_quadratic(theta: Tensor, optimum: Tensor, hessian: Tensor, learning_rate: float, steps: int) -> list[Tensor]:
    """theta_k = theta* + (I - lr H)^k (theta_0 - theta*), k = 1..steps.

    For L = 1/2 (theta - theta*)^T H (theta - theta*) a gradient step maps the error e to (I - lr H) e.
    """
    contraction = torch.eye(len(theta), dtype=theta.dtype) - learning_rate * hessian
    return [optimum + torch.linalg.matrix_power(contraction, k) @ (theta - optimum) for k in range(1, steps + 1)]


def cross_entropy_potential(
    forward: Callable[[dict[str, Tensor], Tensor], Tensor], weight_decay: float
) -> Callable[[dict[str, Tensor], tuple[Tensor, Tensor]], Tensor]:
    """U of Eq. 27, () nats per image: -1/m sum_i log softmax(f(x_i))[y_i] + weight_decay / 2 |theta|^2."""

    def potential(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        likelihood = forward(params, images).log_softmax(-1).gather(-1, labels[:, None]).mean()
        return 0.5 * weight_decay * torch.stack([value.square().sum() for value in params.values()]).sum() - likelihood

    return potential


def sghmc_variance(noise: float, eta: float, alpha: float, curvature: float) -> float:
    """Stationary variance of theta for v' = (1-a) v - eta h theta + n, theta' = theta + v', n ~ N(0, noise).

    With P = Var theta, Q = Var v, C = Cov(theta, v) at stationarity and b = 1 - a, g = eta h:
        theta' = theta + v'  =>  P = P + 2 Cov(theta, v') + Q  =>  Cov(theta, v') = b C - g P = -Q / 2
        C = Cov(theta', v') = Cov(theta, v') + Q = Q / 2   =>   b Q / 2 - g P = -Q / 2   =>   Q = 2 g P / (1 + b)
        Q = b^2 Q + g^2 P - 2 b g C + noise = b^2 Q + g^2 P - b g Q + noise
    and with 1 + b = 2 - a:  P = noise (2 - a) / (a g (2 (2 - a) - g)).
    """
    g = eta * curvature
    return noise * (2 - alpha) / (alpha * g * (2 * (2 - alpha) - g))


def softmax_slow(logits: list[float]) -> list[float]:
    """Softmax by its definition, in Python floats."""
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def scores_slow(samples: list[list[list[float]]], labels: list[int], bins: int) -> dict[str, float]:
    """Accuracy, NLL, Brier and ECE of the model average of samples[s][i][c] (logits), one example at a time."""
    n, classes = len(labels), len(samples[0][0])
    correct = nll = brier = 0.0
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for i, label in enumerate(labels):
        each = [softmax_slow(sample[i]) for sample in samples]
        p = [sum(one[c] for one in each) / len(each) for c in range(classes)]
        best = max(range(classes), key=p.__getitem__)
        hit = float(best == label)
        correct += hit
        nll -= math.log(p[label])
        brier += sum((p[c] - (c == label)) ** 2 for c in range(classes))
        members[min(bins, max(1, math.ceil(p[best] * bins))) - 1].append((hit, p[best]))
    ece = sum(len(m) / n * abs(sum(h for h, _ in m) / len(m) - sum(c for _, c in m) / len(m)) for m in members if m)
    return {"accuracy": correct / n, "nll": nll / n, "brier": brier / n, "ece": ece}


QUARTIC_WITHIN_1 = 0.7436779
"""P(|w| < 1) under the density proportional to exp(-w^4 / 4): t = w^4 / 4 is Gamma(1/4, 1) (`quartic_draws`), so it is
the incomplete gamma function P(1/4, 1/4) = sum_n (1/4)^(1/4) (-1/4)^n / (n! (n + 1/4)) / Gamma(1/4)."""


def quartic_draws(count: int, source: torch.Generator) -> Tensor:
    """Exact draws (count,) float64 of the density proportional to exp(-w^4 / 4).

    With t = w^4 / 4 the density of t is t^(1/4 - 1) exp(-t), Gamma(1/4, 1), so w = +-(4 t)^(1/4). Gamma(1/4) is
    Gamma(5/4) U^4 (Stuart), and Gamma(5/4) comes by rejection (Marsaglia and Tsang).
    """
    a = 1.25 - 1 / 3
    draws: list[Tensor] = []
    while sum(map(len, draws)) < count:
        x = torch.randn(count, generator=source, dtype=torch.float64)
        u = torch.rand(count, generator=source, dtype=torch.float64)
        v = (1 + x / math.sqrt(9 * a)) ** 3
        accepted = (v > 0) & (u.log() < 0.5 * x * x + a - a * v + a * v.clamp(min=1e-300).log())
        draws.append(a * v[accepted])
    u = torch.rand(count, generator=source, dtype=torch.float64)
    sign = torch.randint(2, (count,), generator=source) * 2 - 1
    return sign * (4 * torch.cat(draws)[:count] * u**4) ** 0.25


class Gaussian(NamedTuple):
    """N(mean, covariance)."""

    mean: Tensor
    covariance: Tensor


def conjugate_posterior(inputs: Tensor, targets: Tensor) -> Gaussian:
    """Posterior of y ~ N(x . theta, 1), theta ~ N(0, I): covariance (I + X^T X)^-1, mean covariance X^T y."""
    precision = torch.eye(inputs.shape[1], dtype=inputs.dtype) + inputs.T @ inputs
    covariance = torch.linalg.inv(precision)
    return Gaussian(covariance @ inputs.T @ targets, covariance)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p | q) = 1/2 [ tr(Q^-1 P) + (q - p)^T Q^-1 (q - p) - dim + log det Q - log det P ]."""
    inverse, gap = torch.linalg.inv(q.covariance), q.mean - p.mean
    return 0.5 * (
        (inverse @ p.covariance).trace()
        + gap @ inverse @ gap
        - len(gap)
        + torch.logdet(q.covariance)
        - torch.logdet(p.covariance)
    )


def jacobian_gaussian(
    forward: Callable[[dict[str, Tensor], Tensor], Tensor],
    params: dict[str, Tensor],
    samples: list[dict[str, Tensor]],
    images: Tensor,
) -> tuple[Tensor, Tensor]:
    """Eqs. 12-13: mean g(mu) and diag(J Sigma J^T) of the linearised network at mu = `params`, each (m, d).

    Sigma is the covariance of `samples` about their mean (1/K), Eq. 12's Cov(theta) by its samples. With the rows
    delta_k = theta_k - mean, J Sigma J^T = 1/K sum_k (J delta_k)(J delta_k)^T, whose diagonal needs no P x P matrix.
    """
    names = list(params)
    jacobian = torch.func.jacrev(forward)(params, images)  # {name: (m, d, *shape)}
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    moved = sum(
        torch.einsum("mdp,kp->kmd", jacobian[name].flatten(2), (s - s.mean(0)).flatten(1))
        for name, s in stacked.items()
    )
    assert isinstance(moved, Tensor)
    return forward(params, images), moved.square().mean(0)


def entropies_slow(samples: list[list[list[float]]]) -> list[tuple[float, float]]:
    """(entropy of the mean, mean of the entropies) of samples[s][i][c] (logits), one example at a time."""

    def entropy(p: list[float]) -> float:
        return -sum(value * math.log(value) for value in p if value > 0)

    items = []
    for i in range(len(samples[0])):
        each = [softmax_slow(sample[i]) for sample in samples]
        mean = [sum(column) / len(each) for column in zip(*each, strict=True)]
        items.append((entropy(mean), sum(map(entropy, each)) / len(each)))
    return items


def auroc_slow(inside: list[float], outside: list[float]) -> float:
    """The share of pairs in which the OOD score is larger, ties counting one half."""
    wins = [1.0 if k > n else 0.5 if k == n else 0.0 for n in inside for k in outside]
    return sum(wins) / len(wins)


def nll_of_batches_slow(losses: list[list[float]], size: int) -> float:
    """BPC's NLL of losses[s][i]: the mean over a batch, then the mixture over samples, weighted by the batch's size."""
    n, total = len(losses[0]), 0.0
    for start in range(0, n, size):
        each = [one[start : start + size] for one in losses]
        means = [sum(one) / len(one) for one in each]
        total -= len(each[0]) * math.log(sum(math.exp(-mean) for mean in means) / len(means))
    return total / n


def sgd_rate_derivative(theta: Tensor, optimum: Tensor, hessian: Tensor, learning_rate: float, steps: int) -> Tensor:
    """d theta_K / d lr of `sgd_on_quadratic`: -K H (I - lr H)^(K - 1) (theta_0 - theta*)."""
    contraction = torch.eye(len(theta), dtype=theta.dtype) - learning_rate * hessian
    return -steps * hessian @ torch.linalg.matrix_power(contraction, steps - 1) @ (theta - optimum)


def sgd_target_derivative(hessian: Tensor, slope: Tensor, learning_rate: float, steps: int) -> Tensor:
    """d theta_K / dt (p, b) of `sgd_on_quadratic` for theta* = slope t + const: (I - (I - lr H)^K) slope."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    return (identity - torch.linalg.matrix_power(identity - learning_rate * hessian, steps)) @ slope


def sghmc_covariance(noise: float, eta: float, alpha: float, hessian: Tensor) -> Tensor:
    """Stationary covariance of theta for the curvature `hessian`: `sghmc_variance` of each of its eigenvectors, along
    which Eq. 27 moves by itself, the noise being isotropic."""
    curvatures, vectors = torch.linalg.eigh(hessian)
    variances = [sghmc_variance(noise, eta, alpha, curvature) for curvature in curvatures.tolist()]
    return vectors @ torch.tensor(variances, dtype=hessian.dtype).diag() @ vectors.T
