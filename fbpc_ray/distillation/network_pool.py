"""Pool of networks of `--method vbpc` and `frepo`: their state, and the turn of each.

Each architecture has one pool. A step draws M of its slots without replacement (`--draws-per-step`), by (seed, step)
alone. A network is one vector, so that it travels and is stored as one: parameters, Adam's two moments, training steps
so far. So any worker computes the same bits, and a run resumes with them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.config import Distillation
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Params
from fbpc_ray.inference.adam import AdamState, adam_start
from fbpc_ray.inference.vectors import flatten

METHODS = ("vbpc", "frepo")
"""Methods with a pool."""


def slot(settings: Distillation, step: int, draw: int) -> int:
    """Return the slot that `draw` uses in `step`: the same number in the pool of each architecture."""
    order = torch.randperm(settings.pool_size, generator=generator(settings.seed, "step", step, "pool"))
    return int(order[draw])


def name(architecture: int, number: int) -> str:
    """Return the name of a slot in the state."""
    return f"{architecture}/{number}"


class Member(NamedTuple):
    """A network of the pool."""

    adam: AdamState
    """Its parameters as one vector (P,), with the moments of its training on u."""
    uses: int
    """Gradients that it has given. A first network counts some that it has not given, see `first_uses`."""


def first_uses(number: int, size: int, limit: int) -> int:
    """Return the uses that the first network of a slot counts: spread over 0..limit - 1.

    So the networks are replaced one after the other, not all at once.
    """
    return number * limit // size


def load(
    vector: np.ndarray | None,
    draw: Callable[[], Params],
    number: int,
    settings: Distillation,
    device: str | torch.device = "cpu",
) -> Member:
    """Return the network of slot `number`, on `device`.

    Args:
        vector: as `dump` made it; None for a slot that was never used.
        draw: draws from the prior, on `device`: a slot begins with it, and again after `pool_steps` uses.
    """
    if vector is None:
        return Member(adam_start(flatten(draw())), first_uses(number, settings.pool_size, settings.pool_steps))
    count, uses = (int(value) for value in vector[-2:])
    if uses >= settings.pool_steps:
        return Member(adam_start(flatten(draw())), 0)
    value, first, second = (torch.tensor(part, device=device) for part in np.split(vector[:-2], 3))
    return Member(AdamState(value, first, second, count), uses)


def dump(member: Member) -> Tensor:
    """Return a network as one vector (3 P + 2,) float32, on the CPU."""
    value, first, second, count = member.adam
    return torch.cat([value, first, second, torch.tensor([count, member.uses]).to(value)]).cpu()
