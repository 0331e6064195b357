"""Pixel operations of the corruptions: levels, draws, sizes, kernels and filters of image batches.

Kernels are sampled every `step` pixels and their lengths grow by `zoom`, see `scale`. Every filter treats each image by
itself, in a fixed order of operations.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, interpolate

SIZE = 32  # the shorter side for which the published constants are stated
GREY = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]


# ---- levels and draws


def to_unit(images: np.ndarray) -> np.ndarray:
    """Convert uint8 levels to float32 in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Clip pixels to [0, 1] and convert them to uint8, rounding down.

    The published code and ImageMagick round down, too. A thousandth of a level is added first, so that float32's
    rounding never costs a whole level.
    """
    return (np.clip(pixels, 0, 1) * np.float32(255) + np.float32(1e-3)).astype(np.uint8)


def luma(pixels: np.ndarray) -> np.ndarray:
    """Return the luma of RGB: (n, c, h, w) -> (n, 1, h, w)."""
    return pixels if pixels.shape[1] == 1 else (pixels * GREY).sum(1, keepdims=True)


def stack(draws: Iterable[Tensor]) -> np.ndarray:
    """Stack the draws of all images: n tensors (...) -> (n, ...)."""
    return np.stack([tensor.numpy() for tensor in draws])


def draw_angles(sources: list[Generator], low: float, high: float) -> np.ndarray:
    """Draw an angle for each image, uniform between two angles in degrees: (n,) radians."""
    drawn = stack(torch.rand((), generator=source, dtype=torch.float64) for source in sources)
    return np.deg2rad(low + (high - low) * drawn)


def map_pictures(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Apply `change` to every image as a PIL picture, grey or RGB."""
    pictures = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    pictures = pictures[..., 0] if images.shape[1] == 1 else pictures
    changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])
    return changed.reshape(len(images), *images.shape[2:], -1).transpose(0, 3, 1, 2)


# ---- sizes


def scale(images: np.ndarray) -> tuple[float, float]:
    """Return (zoom, step): a kernel's lengths grow by zoom, and its samples lie `step` pixels apart."""
    factor = min(images.shape[2:]) / SIZE
    return max(factor, 1.0), min(factor, 1.0)


def field_size(images: np.ndarray) -> tuple[int, int]:
    """Return (rows, columns) of the images at the size whose shorter side is 32."""
    side = min(images.shape[2:])
    return round(images.shape[2] * SIZE / side), round(images.shape[3] * SIZE / side)


def resample(field: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (n, c, rows, columns) to (n, c, height, width): area means to shrink, bilinear to grow."""
    if field.shape[2:] == (height, width):
        return field
    smaller = height < field.shape[2]
    options: dict[str, Any] = {"mode": "area"} if smaller else {"mode": "bilinear", "align_corners": False}
    return interpolate(torch.from_numpy(np.ascontiguousarray(field)), (height, width), **options).numpy()


def enlarge(field: np.ndarray, zoom: float) -> np.ndarray:
    """Enlarge the middle of (n, 1, rows, columns) to the same shape: bilinear, with aligned corners."""
    if zoom == 1:
        return field
    whole = field.shape[2:]
    inner = [math.ceil(side / zoom) for side in whole]
    top, left = ((side - small) // 2 for side, small in zip(whole, inner, strict=True))
    crop = torch.from_numpy(np.ascontiguousarray(field[:, :, top : top + inner[0], left : left + inner[1]]))
    large = interpolate(crop, [round(side * zoom) for side in inner], mode="bilinear", align_corners=True).numpy()
    top, left = ((size - side) // 2 for size, side in zip(large.shape[2:], whole, strict=True))
    return large[:, :, top : top + whole[0], left : left + whole[1]]


# ---- kernels: {(row, column) relative to the centre: weight}; the weights sum to 1


def disk(radius: float, softness: float, zoom: float = 1.0, step: float = 1.0) -> dict[tuple[int, int], float]:
    """Weigh the pixels within `radius` equally, smoothed by a Gaussian of three taps (at zoom 1)."""
    half, soft = int(radius * zoom), max(1, round(zoom))
    reach = np.arange(-half, half + 1)
    inside = (reach[:, None] ** 2 + reach**2 <= (radius * zoom) ** 2) * 1.0
    tap = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * (softness * zoom) ** 2))
    rows = np.stack([np.convolve(row, tap) for row in inside])
    weights = np.stack([np.convolve(column, tap) for column in rows.T], 1)
    grid = np.arange(-half - soft, half + soft + 1) * step
    points = np.stack(np.meshgrid(grid, grid, indexing="ij"), 2)
    return share_taps(points.reshape(-1, 2), weights.ravel())


def gaussian_line(sigma: float, cut: float, zoom: float = 1.0, step: float = 1.0) -> dict[tuple[int, int], float]:
    """Sample a Gaussian within `cut` standard deviations, along a row."""
    half = int(cut * sigma * zoom + 0.5)
    reach = np.arange(-half, half + 1)
    points = np.stack([np.zeros(len(reach)), reach * step], 1)
    return share_taps(points, np.exp(-(reach**2) / (2 * (sigma * zoom) ** 2)))


def share_taps(points: np.ndarray, weights: np.ndarray) -> dict[tuple[int, int], float]:
    """Share weights (k,) at points (k, 2), row and column, among the pixels around; normalise."""
    taps: dict[tuple[int, int], float] = defaultdict(float)
    for pixel, share in _corners(points):
        for (row, column), weight in zip(pixel.tolist(), (weights * share / weights.sum()).tolist(), strict=True):
            if weight:
                taps[row, column] += weight
    return dict(taps)


def _corners(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the four pixels around each point, (..., 2) integers, each with its share (...)."""
    whole = np.floor(points).astype(np.int64)
    part = points - whole
    return [
        (whole + corner, np.prod(np.where(np.array(corner) == 1, part, 1 - part), -1))
        for corner in product((0, 1), repeat=2)
    ]


# ---- filters: (n, c, h, w) float32 -> (n, c, h, w) float32


def correlate(pixels: np.ndarray, taps: dict[tuple[int, int], float], edge: Any) -> np.ndarray:
    """Correlate with a kernel; `edge` is numpy.pad's mode."""
    height, width = pixels.shape[2:]
    up, left = (max(abs(tap[axis]) for tap in taps) for axis in (0, 1))
    padded = np.pad(pixels, ((0, 0), (0, 0), (up, up), (left, left)), edge)
    blurred = np.zeros_like(pixels)
    for (row, column), weight in taps.items():
        top, start = up + row, left + column
        blurred += np.float32(weight) * padded[:, :, top : top + height, start : start + width]
    return blurred


def gaussian_filter(
    pixels: np.ndarray, sigma: float, cut: float, edge: Any, zoom: float = 1.0, step: float = 1.0
) -> np.ndarray:
    """Filter with a Gaussian along the columns, then along the rows; `edge` is numpy.pad's mode."""
    line = gaussian_line(sigma, cut, zoom, step)
    return correlate(correlate(pixels, {(b, a): w for (a, b), w in line.items()}, edge), line, edge)


def motion_filter(
    pixels: np.ndarray, radius: float, sigma: float, angles: np.ndarray, zoom: float = 1.0, step: float = 1.0
) -> np.ndarray:
    """Blur as ImageMagick's motion blur does.

    Pixel p becomes the weighted mean of p, p + d, p + 2 d, ... rounded to whole pixels, with the weights of half a
    Gaussian; d is one pixel long, at an angle (n,) from the right, clockwise. Edge pixels are repeated outside.
    """
    along = np.arange(2 * math.ceil(radius * zoom) + 1)
    weights = np.exp(-(along**2) / (2 * (sigma * zoom) ** 2))
    weights = weights / weights.sum()
    direction = np.stack([np.sin(angles), np.cos(angles)], 1)
    points = np.ceil(along[:, None, None] * direction - 0.5) * step  # (taps, n, 2)
    reach = int(np.abs(points).max()) + 2
    padded = np.pad(pixels, ((0, 0), (0, 0), (reach, reach), (reach, reach)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, pixels.shape[2:], (2, 3))
    image, smeared = np.arange(len(pixels)), np.zeros_like(pixels)
    for weight, point in zip(weights, points, strict=True):
        for pixel, share in _corners(point):
            if share.any():
                shifted = windows[image, :, reach + pixel[:, 0], reach + pixel[:, 1]]
                smeared += (weight * share).astype(np.float32)[:, None, None, None] * shifted
    return smeared


def sample_at(pixels: np.ndarray, places: np.ndarray, mirror_on_pixels: bool) -> np.ndarray:
    """Sample images bilinearly at places (n, h, w, 2), column and row in pixels.

    Outside, images are mirrored about the middle of the edge pixels, or about their outer rim.
    """
    sides = np.array([pixels.shape[3], pixels.shape[2]], np.float64)
    grid = places * 2 / np.maximum(sides - 1, 1) - 1 if mirror_on_pixels else (places * 2 + 1) / sides - 1
    sampled = grid_sample(
        torch.from_numpy(pixels.astype(np.float64)),
        torch.from_numpy(grid),
        padding_mode="reflection",
        align_corners=mirror_on_pixels,
    )
    return sampled.numpy().astype(np.float32)
