"""The ten corruptions of Table 3 at five severities: those of CIFAR-10-C (Hendrycks and Dietterich, 2019).

Definitions and constants are the published ones, ImageNet-C/create_c/make_cifar_c.py in hendrycks/robustness, which
differ from ImageNet-C's. They are made for 32x32 RGB images. What holds for others, with s = (shorter side) / 32:
lengths (blur widths, displacements, flakes) grow with s. Blur kernels are sampled each min(1, s) pixels, and a sample
that falls between pixels is shared linearly by its neighbours; frost, snow and elastic displacements are drawn at the
size whose shorter side is 32 and resampled. Shares (pixelate) and levels (the rest) stay. One channel is one of three
equal ones, except that speckle draws once for it, and JPEG stores grey.

A higher severity need not lie farther from the clean image: by the constants below, elastic_transform moves pixels
less and less (but ever more unevenly), motion_blur 3 and 4 are alike, frost 4 and 5 darken what frost 3 brightens,
and defocus_blur 3 blurs images much larger than 32x32 a little more than 4.

Frost is not the published one: that blends in five photographs, which are not ours to ship. Here five procedural
textures stand in, with the mean colour and the contrast of the photographs but not their crystals, so accuracies
under frost are NOT comparable with CIFAR-10-C's. The other nine were held against the published definitions run on
ImageMagick 6.9.11, OpenCV 5.0 and scikit-image 0.26 with the same draws: a level or two apart at most, and equal at
90 to 100 % of the pixels. The draws differ: the published files are one draw of an unseeded generator.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from io import BytesIO
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator
from torch.nn.functional import grid_sample, interpolate

from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.rng import generator

SEVERITIES = (1, 2, 3, 4, 5)
RECIPE = 1
"""Of the code below: raised whenever it gives other images for the same constants."""

FROST_NOTE = (
    "frost is made with procedural textures instead of CIFAR-10-C's photographs: "
    "its numbers are not comparable with published ones"
)

SIZE = 32  # the shorter side for which the constants are stated
CHUNK = 250  # images at a time, for the memory; no image depends on it
GREY = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]

FROST = (
    ((78, 149, 166), 18.0),
    ((201, 205, 214), 20.0),
    ((201, 205, 214), 20.0),
    ((138, 153, 166), 28.0),
    ((112, 123, 135), 38.0),
)
"""Mean RGB and standard deviation of the lightness, in 0..255, of the five photographs at a fifth of their size."""


class Corruption(NamedTuple):
    """One row of the published definitions."""

    abbreviation: str
    """As in Table 3."""
    function: Callable[[np.ndarray, Any, list[Generator]], np.ndarray]
    """(images (n, c, h, w) uint8, the constants of one severity, a generator for each image) -> the same shape."""
    constants: tuple[Any, ...]
    """One for each severity."""


def corrupt(images: np.ndarray, name: str, severity: int, seed: int, *, first: int = 0) -> np.ndarray:
    """images (n, c, h, w) uint8, c 1 or 3 -> the same images with the corruption `name`; pure.

    Image i depends on (seed, name, severity, first + i) and on its pixels alone: an array may be cut anywhere, `first`
    being the place of its first image in the whole.
    """
    check(name, severity)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise TypeError(f"corrupt takes uint8 images (n, 1 or 3, h, w), not {images.dtype} {images.shape}")
    _, function, constants = CORRUPTIONS[name]
    corrupted = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        sources = [generator(seed, "corruption", name, severity, first + start + i) for i in range(len(part))]
        corrupted[start : start + CHUNK] = function(part, constants[severity - 1], sources)
    return corrupted


def check(name: str, severity: int) -> None:
    """Raise UserError unless there is such a corruption."""
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}; {closest(name, list(CORRUPTIONS))}")
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity} does not exist; give 1 to {SEVERITIES[-1]}")


# ---- the ten


def brightness(images: np.ndarray, add: float, sources: list[Generator]) -> np.ndarray:
    """Add to the value of HSV, hue and saturation kept: RGB grows in proportion to its maximum."""
    pixels = _unit(images)
    value = pixels.max(1, keepdims=True)
    brighter = np.minimum(value + np.float32(add), 1)
    return _bytes(np.where(value > 0, pixels * (brighter / np.where(value > 0, value, 1)), brighter))


def defocus_blur(images: np.ndarray, c: tuple[float, float], sources: list[Generator]) -> np.ndarray:
    """Convolve with a disk of a radius, its rim softened by a narrow Gaussian; mirrored about the edge pixels."""
    return _bytes(_blurred(_unit(images), disk(*c, *_scale(images)), "reflect"))


def elastic_transform(images: np.ndarray, c: tuple[float, float, float], sources: list[Generator]) -> np.ndarray:
    """A random affine map, then smooth random displacements: (their size, their smoothness, jitter of the map's three
    points), as shares of the image's size. Severity 1 is the map alone, and the map is strongest there."""
    size, smoothness, jitter = c
    height, width = images.shape[2:]
    side, field = min(height, width), _field(images)
    drawn = [
        (torch.rand((3, 2), generator=g, dtype=torch.float64), torch.rand((2, *field), generator=g)) for g in sources
    ]
    centre, reach = np.array([width // 2, height // 2]), max(side // 3, 1)
    points = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])  # x, y
    moved = points + jitter * side * (2 * _stacked(points for points, _ in drawn) - 1)
    back = np.linalg.solve(
        np.concatenate([moved, np.ones((len(moved), 3, 1))], 2), np.broadcast_to(points, moved.shape)
    )
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    places = np.stack([x, y, np.ones_like(x)], 2) @ back[:, None]  # (n, h, w, 2): where each pixel comes from
    pixels = _sampled(_unit(images), places, mirror_on_pixels=True)
    if size:
        noise = 2 * _stacked(noise for _, noise in drawn) - 1
        smooth = _resampled(_gaussian(noise, smoothness * SIZE, 3, "symmetric"), height, width)
        shift = size * side * smooth.transpose(0, 2, 3, 1)
        pixels = _sampled(pixels, np.stack([x, y], 2) + shift, mirror_on_pixels=False)
    return _bytes(pixels)


def frost(images: np.ndarray, c: tuple[float, float], sources: list[Generator]) -> np.ndarray:
    """(share of the image) x image + (share of the frost) x a random crop of one of five procedural textures."""
    keep, add = c
    rows, columns = _field(images)
    crops = np.empty((len(images), 3, rows, columns), np.float32)
    for crop, source in zip(crops, sources, strict=True):
        which, down, right = torch.rand(3, generator=source, dtype=torch.float64).tolist()
        texture = frost_texture(int(which * len(FROST)))
        side = texture.shape[1]
        lines = (int(down * side) + np.arange(rows)) % side
        crop[:] = texture[:, lines[:, None], (int(right * side) + np.arange(columns)) % side]
    crops = _resampled(crops, *images.shape[2:])
    crops = crops if images.shape[1] == 3 else _grey(crops)
    return _bytes(np.float32(keep) * _unit(images) + np.float32(add) * crops)


def gaussian_blur(images: np.ndarray, sigma: float, sources: list[Generator]) -> np.ndarray:
    """Convolve with a Gaussian, cut off at four standard deviations; the edge pixels continue outside."""
    return _bytes(_gaussian(_unit(images), sigma, 4, "edge", *_scale(images)))


def jpeg_compression(images: np.ndarray, quality: int, sources: list[Generator]) -> np.ndarray:
    """Store as JPEG of a quality (Pillow's scale, chroma at half size as is its default) and read."""

    def stored(picture: Image.Image) -> Image.Image:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(images, stored)


def motion_blur(images: np.ndarray, c: tuple[float, float], sources: list[Generator]) -> np.ndarray:
    """Smear to one side (radius, sigma) at an angle from -45 to 45 degrees."""
    angles = _angles(sources, -45, 45)
    return _bytes(_smeared(_unit(images), *c, angles, *_scale(images)))


def pixelate(images: np.ndarray, share: float, sources: list[Generator]) -> np.ndarray:
    """Shrink to a share of each side by averaging boxes, then enlarge by repeating pixels."""
    height, width = images.shape[2:]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return _each(images, lambda picture: picture.resize(small, box).resize((width, height), box))


def snow(images: np.ndarray, c: tuple[float, ...], sources: list[Generator]) -> np.ndarray:
    """Whiten, and add flakes: noise (mean, std) enlarged by a zoom, kept above a threshold, smeared downwards
    (radius, sigma), and the same again turned by 180 degrees. `keep` is the share that is not whitened."""
    mean, std, zoom, threshold, radius, sigma, keep = c
    noise = _stacked(torch.randn((1, *_field(images)), generator=source) for source in sources)
    flakes = _enlarged(noise * np.float32(std) + np.float32(mean), zoom)
    flakes = _bytes(np.where(flakes < threshold, 0, flakes))
    flakes = _unit(_bytes(_smeared(_unit(flakes), radius, sigma, _angles(sources, -135, -45))))
    flakes = _resampled(flakes + flakes[:, :, ::-1, ::-1], *images.shape[2:])
    pixels = _unit(images)
    white = np.maximum(pixels, _grey(pixels) * np.float32(1.5) + np.float32(0.5))
    return _bytes(np.float32(keep) * pixels + np.float32(1 - keep) * white + flakes)


def speckle_noise(images: np.ndarray, std: float, sources: list[Generator]) -> np.ndarray:
    """Add Gaussian noise whose standard deviation is a share of each pixel's level."""
    noise = _stacked(torch.randn(images.shape[1:], generator=source) for source in sources)
    return _bytes(_unit(images) * (1 + np.float32(std) * noise))


CORRUPTIONS: dict[str, Corruption] = {
    "brightness": Corruption("BN", brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "defocus_blur": Corruption("DB", defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "elastic_transform": Corruption(
        "ET",
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "frost": Corruption("FT", frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "gaussian_blur": Corruption("GB", gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "jpeg_compression": Corruption("JPEG", jpeg_compression, (80, 65, 58, 50, 40)),
    "motion_blur": Corruption("MB", motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "pixelate": Corruption("PIX", pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "snow": Corruption(
        "SN",
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "speckle_noise": Corruption("SP", speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
}
"""Name, as CIFAR-10-C's files are called -> what it is and its five published constants, in Table 3's order."""


# ---- levels and draws


def _unit(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels of [0, 1], clipped -> uint8, the fraction of a level cut off: the published code does, and ImageMagick.

    A thousandth of a level more keeps float32's rounding from costing a whole one.
    """
    return (np.clip(pixels, 0, 1) * np.float32(255) + np.float32(1e-3)).astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(n, c, h, w) -> (n, 1, h, w): the luma of RGB."""
    return pixels if pixels.shape[1] == 1 else (pixels * GREY).sum(1, keepdims=True)


def _stacked(drawn: Any) -> np.ndarray:
    return np.stack([tensor.numpy() for tensor in drawn])


def _angles(sources: list[Generator], low: float, high: float) -> np.ndarray:
    """(n,) radians, uniform between two angles in degrees."""
    drawn = _stacked(torch.rand((), generator=source, dtype=torch.float64) for source in sources)
    return np.deg2rad(low + (high - low) * drawn)


def _each(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Change every image as a picture of 8 bits, grey or RGB."""
    pictures = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    pictures = pictures[..., 0] if images.shape[1] == 1 else pictures
    changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])
    return changed.reshape(len(images), *images.shape[2:], -1).transpose(0, 3, 1, 2)


# ---- sizes


def _scale(images: np.ndarray) -> tuple[float, float]:
    """(zoom, step): a kernel's lengths grow by zoom, and its samples lie `step` pixels apart."""
    scale = min(images.shape[2:]) / SIZE
    return max(scale, 1.0), min(scale, 1.0)


def _field(images: np.ndarray) -> tuple[int, int]:
    """(rows, columns) of the images at the size whose shorter side is 32."""
    side = min(images.shape[2:])
    return round(images.shape[2] * SIZE / side), round(images.shape[3] * SIZE / side)


def _resampled(field: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, c, rows, columns) -> (n, c, height, width): averaged areas where it shrinks, linear where it grows."""
    if field.shape[2:] == (height, width):
        return field
    smaller = height < field.shape[2]
    options: dict[str, Any] = {"mode": "area"} if smaller else {"mode": "bilinear", "align_corners": False}
    return interpolate(torch.from_numpy(np.ascontiguousarray(field)), (height, width), **options).numpy()


def _enlarged(field: np.ndarray, zoom: float) -> np.ndarray:
    """(n, 1, rows, columns) -> the same shape: the middle, enlarged linearly, corner pixels on corner pixels."""
    if zoom == 1:
        return field
    whole = field.shape[2:]
    inner = [math.ceil(side / zoom) for side in whole]
    top, left = ((side - small) // 2 for side, small in zip(whole, inner, strict=True))
    crop = torch.from_numpy(np.ascontiguousarray(field[:, :, top : top + inner[0], left : left + inner[1]]))
    large = interpolate(crop, [round(side * zoom) for side in inner], mode="bilinear", align_corners=True).numpy()
    top, left = ((size - side) // 2 for size, side in zip(large.shape[2:], whole, strict=True))
    return large[:, :, top : top + whole[0], left : left + whole[1]]


# ---- kernels: {(row, column) of a pixel from the centre: weight}, the weights adding to 1


def disk(radius: float, softness: float, zoom: float = 1.0, step: float = 1.0) -> dict[tuple[int, int], float]:
    """The pixels within `radius` of the centre with equal weights, smoothed by three taps (at zoom 1) of a Gaussian."""
    half, soft = int(radius * zoom), max(1, round(zoom))
    reach = np.arange(-half, half + 1)
    inside = (reach[:, None] ** 2 + reach**2 <= (radius * zoom) ** 2) * 1.0
    tap = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * (softness * zoom) ** 2))
    rows = np.stack([np.convolve(row, tap) for row in inside])
    weights = np.stack([np.convolve(column, tap) for column in rows.T], 1)
    grid = np.arange(-half - soft, half + soft + 1) * step
    points = np.stack(np.meshgrid(grid, grid, indexing="ij"), 2)
    return shared(points.reshape(-1, 2), weights.ravel())


def gaussian_line(sigma: float, cut: float, zoom: float = 1.0, step: float = 1.0) -> dict[tuple[int, int], float]:
    """A row of samples of a Gaussian within `cut` standard deviations."""
    half = int(cut * sigma * zoom + 0.5)
    reach = np.arange(-half, half + 1)
    points = np.stack([np.zeros(len(reach)), reach * step], 1)
    return shared(points, np.exp(-(reach**2) / (2 * (sigma * zoom) ** 2)))


def shared(points: np.ndarray, weights: np.ndarray) -> dict[tuple[int, int], float]:
    """Weights (k,) at points (k, 2), row and column, each shared linearly by the pixels around it; normalised."""
    taps: dict[tuple[int, int], float] = defaultdict(float)
    for pixel, share in _corners(points):
        for (row, column), weight in zip(pixel.tolist(), (weights * share / weights.sum()).tolist(), strict=True):
            if weight:
                taps[row, column] += weight
    return dict(taps)


def _corners(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Points (..., 2) -> the four pixels around each, (..., 2) whole numbers, and each one's share (...)."""
    whole = np.floor(points).astype(np.int64)
    part = points - whole
    return [
        (whole + corner, np.prod(np.where(np.array(corner) == 1, part, 1 - part), -1))
        for corner in product((0, 1), repeat=2)
    ]


# ---- filters: (n, c, h, w) float32 to the same; each image by itself, in an order of operations that is fixed


def _blurred(pixels: np.ndarray, taps: dict[tuple[int, int], float], edge: Any) -> np.ndarray:
    """Correlate with a kernel; `edge` is numpy.pad's mode."""
    height, width = pixels.shape[2:]
    up, left = (max(abs(tap[axis]) for tap in taps) for axis in (0, 1))
    padded = np.pad(pixels, ((0, 0), (0, 0), (up, up), (left, left)), edge)
    blurred = np.zeros_like(pixels)
    for (row, column), weight in taps.items():
        top, start = up + row, left + column
        blurred += np.float32(weight) * padded[:, :, top : top + height, start : start + width]
    return blurred


def _gaussian(
    pixels: np.ndarray, sigma: float, cut: float, edge: Any, zoom: float = 1.0, step: float = 1.0
) -> np.ndarray:
    """Along the columns, then along the rows."""
    line = gaussian_line(sigma, cut, zoom, step)
    return _blurred(_blurred(pixels, {(b, a): w for (a, b), w in line.items()}, edge), line, edge)


def _smeared(
    pixels: np.ndarray, radius: float, sigma: float, angles: np.ndarray, zoom: float = 1.0, step: float = 1.0
) -> np.ndarray:
    """ImageMagick's motion blur: pixel p becomes the mean of p, p + d, p + 2 d, ... rounded to whole pixels, with the
    weights of half a Gaussian; d is one pixel long, at an angle (n,) from the right, clockwise. Edge pixels continue.
    """
    along = np.arange(2 * math.ceil(radius * zoom) + 1)
    weights = np.exp(-(along**2) / (2 * (sigma * zoom) ** 2))
    weights = weights / weights.sum()
    direction = np.stack([np.sin(angles), np.cos(angles)], 1)
    points = np.ceil(along[:, None, None] * direction - 0.5) * step  # (taps, n, 2)
    reach = int(np.abs(points).max()) + 2
    padded = np.pad(pixels, ((0, 0), (0, 0), (reach, reach), (reach, reach)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, pixels.shape[2:], (2, 3))
    which, smeared = np.arange(len(pixels)), np.zeros_like(pixels)
    for weight, point in zip(weights, points, strict=True):
        for pixel, share in _corners(point):
            if share.any():
                shifted = windows[which, :, reach + pixel[:, 0], reach + pixel[:, 1]]
                smeared += (weight * share).astype(np.float32)[:, None, None, None] * shifted
    return smeared


def _sampled(pixels: np.ndarray, places: np.ndarray, mirror_on_pixels: bool) -> np.ndarray:
    """The images at places (n, h, w, 2), column and row in pixels, linearly; mirrored on the middle or the rim of the
    edge pixels."""
    sides = np.array([pixels.shape[3], pixels.shape[2]], np.float64)
    grid = places * 2 / np.maximum(sides - 1, 1) - 1 if mirror_on_pixels else (places * 2 + 1) / sides - 1
    found = grid_sample(
        torch.from_numpy(pixels.astype(np.float64)),
        torch.from_numpy(grid),
        padding_mode="reflection",
        align_corners=mirror_on_pixels,
    )
    return found.numpy().astype(np.float32)


@cache
def frost_texture(which: int) -> np.ndarray:
    """(3, 128, 128) float32 in [0, 1], tileable, the same in every process. It stands for photograph `which`.

    Noise with about the photographs' spectrum (power falls as frequency ** -1.5), half of it folded into bright ridges.
    """
    source, side = generator(0, "frost texture", which), 128
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) * side
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1) ** -0.75, 0)
    white = torch.randn((2, side, side), generator=source, dtype=torch.float64).numpy()
    smooth, folded = np.fft.ifft2(np.fft.fft2(white) * amplitude).real
    colour, spread = FROST[which]
    lightness = spread * _standard(_standard(smooth) - _standard(np.abs(folded)))
    return (np.clip(np.array(colour)[:, None, None] + lightness, 0, 255) / 255).astype(np.float32)


def _standard(field: np.ndarray) -> np.ndarray:
    return (field - field.mean()) / field.std()
