"""Parameters of a network as one vector, and back; normal draws of them."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from fbpc_ray.core.types import Params


def flatten(params: Params) -> Tensor:
    """Return parameters as one vector (P,)."""
    return torch.cat([value.flatten() for value in params.values()])


def unflatten(vector: Tensor, shapes: Mapping[str, torch.Size]) -> Params:
    """Invert `flatten`. Each tensor has its own memory: kernels may sum in another order at another alignment."""
    ends = list(accumulate(shape.numel() for shape in shapes.values()))
    parts = zip(shapes.items(), [0, *ends], ends)  # noqa: B905  the starts have one more
    return {name: vector[a:b].clone().view(shape) for (name, shape), a, b in parts}


def standard_normal(shapes: Mapping[str, torch.Size], like: Tensor, source: torch.Generator) -> Tensor:
    """Draw a vector (P,) on the device and of the type of `like`: on the CPU, parameter by parameter.

    One draw of all P would be another stream; a copy to a GPU for each parameter would take longer than the draw.
    """
    draws = [torch.randn(shape.numel(), generator=source, dtype=like.dtype) for shape in shapes.values()]
    return torch.cat(draws).to(like.device)
