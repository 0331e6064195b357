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

Gradient = Callable[[Params, Batch], Params]
"""(parameters, batch) -> the gradient of U(theta) by parameter."""

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


def potential_gradient(slope: LossAndGrad, weight_decay: float) -> Gradient:
    """Return grad U(theta) of the module docstring, from the gradient of the mean cross-entropy."""

    def of(params: Params, batch: Batch) -> Params:
        _, gradients = slope(params, batch)
        return {name: gradients[name] + weight_decay * value for name, value in params.items()}

    return of


def sghmc(
    gradient: Gradient,
    params: Params,
    batches: Iterable[Batch],
    *,
    eta: float,
    alpha: float,
    variance: float,
    source: torch.Generator,
) -> Iterator[Params]:
    """Yield theta after each step of Eq. 27, one step a batch, from `params` at rest (v = 0); `gradient` is grad U.

    `alpha` is the friction, `eta` the step size, `variance` that of the noise (`noise_variance`). What is yielded
    carries no gradient and is not changed by later steps.
    """
    velocity = {name: torch.zeros_like(value) for name, value in params.items()}
    scale = math.sqrt(variance)
    for batch in batches:
        gradients = gradient(params, batch)
        with torch.no_grad():
            for name, v in velocity.items():
                noise = torch.randn(v.shape, generator=source, dtype=v.dtype).to(v.device) if scale else 0.0
                velocity[name] = (1 - alpha) * v - eta * gradients[name] + scale * noise
            params = {name: (value + velocity[name]).detach() for name, value in params.items()}
        yield params
