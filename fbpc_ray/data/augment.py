"""Differentiable siamese augmentation (DSA), vectorised; drawing and applying are separate functions.

One operation is drawn for the whole batch, and parameters for each image. "Siamese": both terms of a loss see images
augmented by the same `Draw`. Images are normalised, so a value of zero is the channel mean.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fbpc_ray.core.types import Augment

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT, SCALE, ROTATION = 0.125, 0.5, 1.2, 15.0


class Draw(NamedTuple):
    """One draw of DSA for b images; `apply` repeats the same augmentation with it."""

    operation: str
    uniform: Tensor
    """(b, 3) on [0, 1): parameters of each image; operations with fewer parameters ignore the rest."""


def draw(count: int, source: torch.Generator) -> Draw:
    """Draw one of the six operations uniformly, and parameters for `count` images."""
    choice = int(torch.randint(len(OPERATIONS), (), generator=source))
    return Draw(list(OPERATIONS)[choice], torch.rand((count, 3), generator=source))


def apply(drawn: Draw, images: Tensor) -> Tensor:
    """Augment images (b, c, h, w); differentiable in the images."""
    return OPERATIONS[drawn.operation](images, drawn.uniform.to(images))


def dsa(count: int, source: torch.Generator) -> Augment:
    """Draw DSA for `count` images and return it as a function."""
    drawn = draw(count, source)
    return lambda images: apply(drawn, images)


def identity(count: int, source: torch.Generator) -> Augment:
    """Return the function that leaves images unchanged."""
    return lambda images: images


AUGMENTATIONS: dict[str, Callable[[int, torch.Generator], Augment]] = {"dsa": dsa, "none": identity}
"""Functions that draw an augmentation, by the values of `--augment`."""


def color(images: Tensor, uniform: Tensor) -> Tensor:
    """Change brightness by +-0.5, then saturation by U[0, 2], then contrast by U[.5, 1.5].

    Saturation scales about the mean over channels, contrast about the mean of the image.
    """
    brightness, saturation, contrast = (u.view(-1, 1, 1, 1) for u in uniform.unbind(1))
    images = images + (brightness - 0.5) * BRIGHTNESS
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (saturation * SATURATION) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + CONTRAST) + mean


def crop(images: Tensor, uniform: Tensor) -> Tensor:
    """Shift by whole pixels, up to 12.5 % of each axis; fill with zeros."""
    height, width = images.shape[2:]
    down = _integer(uniform[:, 0], *_within(height))
    right = _integer(uniform[:, 1], *_within(width))
    # Shifting is multiplying by a shifted identity matrix: exact, differentiable, deterministic on every device.
    return _shift(height, down).to(images) @ images @ _shift(width, right).to(images).transpose(-1, -2)


def cutout(images: Tensor, uniform: Tensor) -> Tensor:
    """Zero a square of half the side with a uniform centre; it may reach beyond the edge."""
    keep = torch.ones_like(images[:, :1])
    inside = []
    for axis, size in enumerate(images.shape[2:]):
        side = int(size * CUTOUT + 0.5)
        centre = _integer(uniform[:, axis], 0, size - side % 2)
        start = (centre - side // 2)[:, None]
        position = torch.arange(size, device=images.device)
        inside.append((position >= start) & (position < start + side))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images * keep.masked_fill(square, 0.0)


def flip(images: Tensor, uniform: Tensor) -> Tensor:
    """Mirror left and right with probability one half."""
    return torch.where((uniform[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)


def scale(images: Tensor, uniform: Tensor) -> Tensor:
    """Shrink or magnify about the centre: sample each axis at U[1/1.2, 1.2] times the position."""
    factor = uniform[:, :2] * (SCALE - 1 / SCALE) + 1 / SCALE
    return _warp(images, torch.diag_embed(factor))


def rotate(images: Tensor, uniform: Tensor) -> Tensor:
    """Rotate by +-15 degrees about the centre, in the coordinates of a square image."""
    angle = (uniform[:, 0] - 0.5) * 2 * math.radians(ROTATION)
    cosine, sine = angle.cos(), angle.sin()
    return _warp(images, torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}


def _within(size: int) -> tuple[int, int]:
    """Return the smallest and the largest shift of `crop` along an axis."""
    reach = int(size * CROP + 0.5)
    return -reach, reach


def _integer(uniform: Tensor, low: int, high: int) -> Tensor:
    """Map a uniform number on [0, 1) to an integer from low to high, both included."""
    return (uniform * (high - low + 1)).long().clamp(max=high - low) + low


def _shift(size: int, by: Tensor) -> Tensor:
    """Return matrices S, (b, 1, size, size), with (S x)[i] = x[i - by], zero outside."""
    position = torch.arange(size, device=by.device)
    return (position[:, None] - by.view(-1, 1, 1) == position).float()[:, None]


def _warp(images: Tensor, linear: Tensor) -> Tensor:
    """Resample bilinearly at `linear` (b, 2, 2) times the output position, zero outside."""
    theta = torch.cat([linear, linear.new_zeros(len(linear), 2, 1)], 2)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    if images.device.type == "cuda" and images.requires_grad:  # CUDA sums the gradient of grid_sample in any order
        return sample_bilinear(images, grid)
    return grid_sample(images, grid, align_corners=False)


def sample_bilinear(images: Tensor, grid: Tensor) -> Tensor:
    """Do what `grid_sample(images, grid, align_corners=False)` does, by `gather`, whose gradient is deterministic.

    No gradient flows to `grid` (b, h, w, 2).
    """
    height, width = images.shape[2:]
    x, y = (((grid[..., axis] + 1) * size - 1) / 2 for axis, size in enumerate((width, height)))
    left, top, pixels = x.floor(), y.floor(), images.flatten(2)
    total = torch.zeros_like(images)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = (1 - (y - row).abs()) * (1 - (x - column).abs()) * inside
        place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().flatten(1)
        values = pixels.gather(2, place[:, None].expand(-1, images.shape[1], -1))
        total = total + weight[:, None] * values.view_as(images)
    return total
