"""Hamiltonian Monte Carlo with its accept step: what SGHMC (Eq. 27) is checked against, for small networks.

    E(theta)    = U(theta) / T                              (nats; the target is exp(-E))
    H(theta, p) = E(theta) + |p|^2 / 2,  p ~ N(0, I) afresh each transition
    leapfrog:     p <- p - step/2 grad E;   theta <- theta + step p;   p <- p - step/2 grad E
    accept with   min(1, exp(H(before) - H(after)))

Temperature. A pseudocoreset's U is the *mean* cross-entropy plus weight_decay / 2 |theta|^2 (sghmc.py), and Eq. 27 with
consistent noise has temperature d = c / m with c = 0.01 and m images. So T = d makes HMC target what it targets:

    E = U / d = (sum_i CE_i + m weight_decay / 2 |theta|^2) / c

the posterior of the *summed* loss under the prior N(0, 1 / (m weight_decay) I), tempered to c (c = 1: Bayes' rule).

Everything runs in the dtype of the parameters. E is large (about 1e5 where c is 0.01), so that in float32 H's rounding
alone is some 1e-2 nats: give parameters and images in float64 (`in_float64`) where acceptance is to be exact.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fbpc_ray.core.types import Batch, Params

Energy = Callable[[Params], Tensor]
"""E: parameters -> () nats, or (chains,) where the first dimension of each parameter counts independent chains."""


class Transition(NamedTuple):
    """One proposal and what became of it; its tensors are of the shape of E, () or (chains,)."""

    params: Params
    """The state after: the proposal where it was accepted, else the state before. Carries no gradient."""
    accepted: Tensor
    """bool."""
    change: Tensor
    """H(proposal) - H(before), nats; infinite where the proposal is not finite, which is never accepted."""


class Acceptance(NamedTuple):
    """Sums over transitions, by chain. Merge with `+`."""

    proposals: int
    accepted: Tensor
    """How many were accepted, () or (chains,) float64."""
    probability: Tensor
    """Sum of min(1, exp(-change)): what `accepted` is expected to be, with less noise."""
    diverged: Tensor
    """How many proposals were not finite."""

    @property
    def rate(self) -> Tensor:
        """Share that was accepted, () or (chains,)."""
        return self.accepted / self.proposals

    def __add__(self, other: "Acceptance") -> "Acceptance":  # type: ignore[override]
        return Acceptance._make(a + b for a, b in zip(self, other, strict=True))


def tempered(potential: Callable[[Params, Batch], Tensor], batch: Batch, temperature: float) -> Energy:
    """E = U / T on all of `batch`; with the temperature d of consistent SGHMC, the distribution that it samples."""
    return lambda params: potential(params, batch) / temperature


def in_float64(params: Params, batch: Batch) -> tuple[Params, Batch]:
    """The same parameters and images in double precision."""
    return {name: value.double() for name, value in params.items()}, batch._replace(images=batch.images.double())


def hmc(
    energy: Energy, params: Params, *, step: float, leapfrogs: int, source: torch.Generator
) -> Iterator[Transition]:
    """Endless transitions from `params`, of `leapfrogs` (1 or more) leapfrog steps of size `step` each.

    Raises ValueError where E is not finite at the start: no proposal could be compared with it.
    """
    params = {name: value.detach() for name, value in params.items()}
    before, gradient = _energy_and_gradient(energy, params)
    if not before.isfinite().all():
        raise ValueError(f"the energy at the start is {before.tolist()}")
    while True:
        momentum = {
            name: torch.randn(value.shape, generator=source, dtype=value.dtype).to(value.device)
            for name, value in params.items()
        }
        proposal, arrived, after, slope = _trajectory(energy, params, momentum, gradient, step, leapfrogs)
        change = (after + kinetic(arrived, after.ndim)) - (before + kinetic(momentum, before.ndim))
        change = change.where(change.isfinite(), torch.inf)
        uniform = torch.rand(change.shape, generator=source, dtype=change.dtype).to(change.device)
        accepted = uniform < accept_probability(change)
        params = _choose(accepted, proposal, params)
        gradient = _choose(accepted, slope, gradient)
        before = torch.where(accepted, after, before)
        yield Transition(params, accepted, change)


def leapfrog(energy: Energy, params: Params, momentum: Params, *, step: float, leapfrogs: int) -> tuple[Params, Params]:
    """(theta, p) after `leapfrogs` steps. With -p it goes back the way it came: reversible, and of volume 1."""
    _, gradient = _energy_and_gradient(energy, params)
    return _trajectory(energy, params, momentum, gradient, step, leapfrogs)[:2]


def kinetic(momentum: Params, chain_dimensions: int) -> Tensor:
    """|p|^2 / 2 of each chain; 0 leading dimensions count chains, or 1."""
    parts = [p.reshape(*p.shape[:chain_dimensions], -1).square().sum(-1) for p in momentum.values()]
    return 0.5 * torch.stack(parts).sum(0)


def accept_probability(change: Tensor) -> Tensor:
    """min(1, exp(-change)) for change = H(proposal) - H(before): downhill always, uphill seldom."""
    return (-change).clamp(max=0).exp()


def acceptance(transitions: Iterable[Transition]) -> Acceptance:
    """Their statistics, by chain. Raises ValueError where there is none."""
    each = [
        Acceptance(1, t.accepted.double(), accept_probability(t.change).double(), t.change.isinf().double())
        for t in transitions
    ]
    if not each:
        raise ValueError("no transition")
    total = each[0]
    for one in each[1:]:
        total = total + one
    return total


def _trajectory(
    energy: Energy, params: Params, momentum: Params, gradient: Params, step: float, leapfrogs: int
) -> tuple[Params, Params, Tensor, Params]:
    """(theta, p, E(theta), grad E(theta)) at the end, from theta's `gradient`."""
    if leapfrogs < 1:
        raise ValueError(f"{leapfrogs} leapfrog steps: at least 1 is needed")
    value = torch.zeros(())
    for _ in range(leapfrogs):
        momentum = {name: p - 0.5 * step * gradient[name] for name, p in momentum.items()}
        params = {name: theta + step * momentum[name] for name, theta in params.items()}
        value, gradient = _energy_and_gradient(energy, params)
        momentum = {name: p - 0.5 * step * gradient[name] for name, p in momentum.items()}
    return params, momentum, value, gradient


def _energy_and_gradient(energy: Energy, params: Params) -> tuple[Tensor, Params]:
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    value = energy(leaves)
    # The chains being independent, the gradient of their sum holds that of each.
    gradients = torch.autograd.grad(value.sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def _choose(mask: Tensor, new: Params, old: Params) -> Params:
    """`new` in the chains where `mask`, else `old`."""
    return {
        name: torch.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), new[name], value)
        for name, value in old.items()
    }
