"""Networks by name: the paper's, with the norms of Fig. 2, and a user's own by import path."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.models import custom
from fbpc_ray.models.convnet import NORMS, ConvNet, default_depth
from fbpc_ray.models.resnet import ResNet
from fbpc_ray.models.vgg_alexnet_lenet import alexnet, lenet, vgg11


class Spec(NamedTuple):
    """Everything that defines a network. Make it with `specify`, so that one network has one Spec."""

    architecture: str
    image_shape: tuple[int, int, int]
    """(c, h, w)."""
    classes: int
    width: int
    """Channels of ConvNet's convolutions, 128 in the paper; other networks scale with it. 0 if they don't."""
    depth: int
    """Blocks of ConvNet; 0 for other networks."""


def _fitting(spec: Spec, smallest: int, multiple: int) -> tuple[int, int, int]:
    """Check images and width for a network; return (channels, size, classes). Raises UserError."""
    (channels, height, width), name = spec.image_shape, spec.architecture
    if height != width:
        raise UserError(f"{name} takes square images, not {height}x{width}: crop or resize them")
    if height < smallest:
        raise UserError(
            f"images of {height}x{width} are too small for {name}, whose smallest size is {smallest}x{smallest}: "
            "enlarge them, or choose another network"
        )
    if spec.width % multiple:
        reason = "its 4 groups do not divide the channels" if name.endswith("-gn") else "it would have half a channel"
        raise UserError(f"{name} at --width {spec.width}: {reason}; make --width a multiple of {multiple}")
    return channels, height, spec.classes


def _convnet(norm: str, spec: Spec) -> nn.Module:
    shape = _fitting(spec, 1, 4 if norm == "gn" else 1)
    size, depth = shape[1], spec.depth
    if size >> depth < 1 or (norm == "in" and size >> (depth - 1) < 2):
        raise UserError(f"images of {size}x{size} are too small for a ConvNet of depth {depth}: lower --depth")
    return ConvNet(*shape, width=spec.width, depth=depth, norm=norm)


def _vgg11(norm: str, spec: Spec) -> nn.Module:
    return vgg11(*_fitting(spec, 8, 8 if norm == "gn" else 2), width=spec.width // 2, norm=norm)


def _resnet(blocks: tuple[int, ...], norm: str, spec: Spec) -> nn.Module:
    return ResNet(*_fitting(spec, 8, 8 if norm == "gn" else 2), width=spec.width // 2, blocks=blocks, norm=norm)


_NORMED: dict[str, Callable[[str, Spec], nn.Module]] = {
    "convnet": _convnet,
    "vgg11": _vgg11,
    "resnet18": partial(_resnet, (2, 2, 2, 2)),
    "resnet34": partial(_resnet, (3, 4, 6, 3)),
}
_PLAIN: dict[str, Callable[[Spec], nn.Module]] = {
    "lenet": lambda spec: lenet(*_fitting(spec, 12, 1)),
    "alexnet": lambda spec: alexnet(*_fitting(spec, 8, 2), width=spec.width // 2),
}
ARCHITECTURES: dict[str, Callable[[Spec], nn.Module]] = {
    **{f"{name}-{norm}": partial(make, norm) for name, make in _NORMED.items() for norm in NORMS},
    **_PLAIN,
}
"""Builders of networks by canonical name."""


def canonical(name: str) -> str:
    """Return the canonical name of a network: resnet18-in for resnet18. Raises UserError if unknown."""
    if name in ARCHITECTURES or ":" in name:
        return name
    if f"{name}-in" in ARCHITECTURES:
        return f"{name}-in"
    if (family := name.split("-")[0]) in _PLAIN:
        raise UserError(f"unknown architecture '{name}': {family} has no norms to choose from; give {family}")
    known = closest(name, list(ARCHITECTURES))
    raise UserError(f"unknown architecture '{name}': {known}, or MODULE:FUNCTION for your own")


def specify(name: str, image_shape: tuple[int, int, int], classes: int, width: int, depth: int) -> Spec:
    """Return the Spec of a network; depth 0 is the literature's. Raises UserError for an unknown name."""
    name = canonical(name)
    depth = (depth or default_depth(image_shape[1])) if name.startswith("convnet-") else 0
    return Spec(name, image_shape, classes, 0 if name == "lenet" or ":" in name else width, depth)


def build(spec: Spec) -> nn.Module:
    """Build the network of `spec`, initialised from torch's global generator. Raises UserError."""
    name = canonical(spec.architecture)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name](spec)
    return custom.build(name, spec.image_shape, spec.classes)
