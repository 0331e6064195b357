"""Eq. 27: stochastic-gradient Hamiltonian Monte Carlo, with which a coreset is evaluated.

    v     <- (1 - alpha) v - eta grad U(theta) + noise
    theta <- theta + v                                  (the new v: with the old one the chain is unstable)

    U(theta) = mean cross-entropy + weight_decay / 2 |theta|^2      (the second term: an isotropic Gaussian prior)

Eq. 27 prints the noise as N(0, 2d) with d = 0.01/m. Added to v as it stands, that is a temperature of about 3 and
chains explode; so three readings are offered, by their variance: see `noise_variance`.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from fbpc_ray.core.types import Batch, LossAndGrad, Params
from fbpc_ray.inference.vectors import flatten, standard_normal, unflatten

NOISE_READINGS: dict[str, Callable[[float, float, float], float]] = {
    "consistent": lambda eta, alpha, d: 2 * alpha * eta * d,
    "gradient": lambda eta, alpha, d: 2 * d * eta**2,
    "literal": lambda eta, alpha, d: 2 * d,
}


def noise_variance(reading: str, *, eta: float, alpha: float, d: float) -> float:
    """Return the variance of the noise that each step adds to v.

    consistent: 2 alpha eta d, whose stationary variance is d / curvature for small eta (temperature d);
    gradient: eta^2 2d, the noise added to the gradient; literal: 2d, as Eq. 27 is printed.
    """
    return NOISE_READINGS[reading](eta, alpha, d)


def sghmc(
    loss_and_grad: LossAndGrad,
    params: Params,
    batches: Iterable[Batch],
    *,
    eta: float,
    alpha: float,
    variance: float,
    source: torch.Generator,
    weight_decay: float = 0.0,
) -> Iterator[Params]:
    """Yield theta after each step of Eq. 27, one step a batch, from `params` at rest (v = 0).

    `alpha` is the friction, `eta` the step size, `variance` that of the noise (`noise_variance`). What is yielded
    carries no gradient and is not changed by later steps. theta, v, gradient and noise are vectors (P,) of all
    parameters: a step of a small network would cost more in calls than in arithmetic.
    """
    shapes = {name: value.shape for name, value in params.items()}
    theta = flatten(params).detach()
    v, scale = torch.zeros_like(theta), math.sqrt(variance)
    params = unflatten(theta, shapes)
    for batch in batches:
        _, gradients = loss_and_grad(params, batch)
        with torch.no_grad():
            gradient = flatten({name: gradients[name] for name in shapes}) + weight_decay * theta
            v = (1 - alpha) * v - eta * gradient
            if scale:
                v = v + scale * standard_normal(shapes, theta, source)
            theta = theta + v
            params = unflatten(theta, shapes)
        yield params
