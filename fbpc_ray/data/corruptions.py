"""The ten corruptions of Table 3 at five severities, from CIFAR-10-C (Hendrycks and Dietterich, 2019).

Definitions and constants are the published ones, ImageNet-C/create_c/make_cifar_c.py in hendrycks/robustness, which
differ from ImageNet-C's. They are made for 32x32 RGB images. For other sizes, with s = (shorter side) / 32: lengths
(blur widths, displacements, flakes) grow with s. Blur kernels are sampled every min(1, s) pixels, and a sample between
pixels is shared linearly by its neighbours; frost, snow and elastic displacements are drawn at the size whose shorter
side is 32, then resampled. Shares (pixelate) and levels (the rest) don't depend on s. A grey image is treated as three
equal channels, except that speckle draws its noise once, and JPEG stores grey.

A higher severity is not always farther from the clean image: with the constants below, elastic_transform moves pixels
less with each severity (but more unevenly), motion_blur 3 and 4 are alike, frost 3 brightens while frost 4 and 5
darken, and defocus_blur 3 blurs images much larger than 32x32 a little more than 4.

Frost is not the published one, which blends in five photographs that we may not ship. Five procedural textures replace
them, with the mean colour and the contrast of the photographs but not their crystals, so accuracies under frost are NOT
comparable with CIFAR-10-C's. The other nine were compared with the published definitions run on ImageMagick 6.9.11,
OpenCV 5.0 and scikit-image 0.26 with the same draws: they differ by at most two levels, and 90 to 100 % of the pixels
are equal. The draws differ: the published files are one draw of an unseeded generator.
"""

from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator

from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.rng import generator
from fbpc_ray.data.image_filters import (
    SIZE,
    correlate,
    disk,
    draw_angles,
    enlarge,
    field_size,
    gaussian_filter,
    luma,
    map_pictures,
    motion_filter,
    resample,
    sample_at,
    scale,
    stack,
    to_bytes,
    to_unit,
)

SEVERITIES = (1, 2, 3, 4, 5)
RECIPE = 1
"""Version of this code and of image_filters.py: raised whenever the same constants give other images."""

FROST_NOTE = (
    "frost is made with procedural textures instead of CIFAR-10-C's photographs: "
    "its numbers are not comparable with published ones"
)

CHUNK = 250  # images at a time, which bounds the memory; no image depends on it

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
    """In Table 3."""
    function: Callable[[np.ndarray, Any, list[Generator]], np.ndarray]
    """(images (n, c, h, w) uint8, constants of one severity, a generator for each image) -> (n, c, h, w) uint8."""
    constants: tuple[Any, ...]
    """Of each severity."""


def corrupt(images: np.ndarray, name: str, severity: int, seed: int, *, first: int = 0) -> np.ndarray:
    """Corrupt images (n, c, h, w) uint8, c 1 or 3. A pure function.

    Image i depends only on its pixels and on (seed, name, severity, first + i): the images of a split may be corrupted
    in parts, `first` being the index of a part's first image in the split.
    """
    check(name, severity)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise TypeError(f"corrupt: expected uint8 images (n, 1 or 3, h, w), got {images.dtype} {images.shape}")
    _, function, constants = CORRUPTIONS[name]
    corrupted = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        sources = [generator(seed, "corruption", name, severity, first + start + i) for i in range(len(part))]
        corrupted[start : start + CHUNK] = function(part, constants[severity - 1], sources)
    return corrupted


def check(name: str, severity: int) -> None:
    """Raise UserError for an unknown corruption or severity."""
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}; {closest(name, list(CORRUPTIONS))}")
    if severity not in SEVERITIES:
        raise UserError(f"severity must be 1 to {SEVERITIES[-1]}, got {severity}")


# ---- the ten corruptions


def brightness(images: np.ndarray, add: float, sources: list[Generator]) -> np.ndarray:
    """Add to the value of HSV; hue and saturation stay, so RGB grows in proportion to its maximum."""
    pixels = to_unit(images)
    value = pixels.max(1, keepdims=True)
    brighter = np.minimum(value + np.float32(add), 1)
    return to_bytes(np.where(value > 0, pixels * (brighter / np.where(value > 0, value, 1)), brighter))


def defocus_blur(images: np.ndarray, c: tuple[float, float], sources: list[Generator]) -> np.ndarray:
    """Convolve with a disk (radius, softness of its rim); images are mirrored about their edge pixels."""
    return to_bytes(correlate(to_unit(images), disk(*c, *scale(images)), "reflect"))


def elastic_transform(images: np.ndarray, c: tuple[float, float, float], sources: list[Generator]) -> np.ndarray:
    """Apply a random affine map, then smooth random displacements.

    The constants are the size of the displacements, their smoothness, and the jitter of the map's three points, as
    shares of the image's size. Severity 1 has no displacements, but the strongest map.
    """
    size, smoothness, jitter = c
    height, width = images.shape[2:]
    side, field = min(height, width), field_size(images)
    drawn = [
        (torch.rand((3, 2), generator=g, dtype=torch.float64), torch.rand((2, *field), generator=g)) for g in sources
    ]
    centre, reach = np.array([width // 2, height // 2]), max(side // 3, 1)
    points = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])  # x, y
    moved = points + jitter * side * (2 * stack(points for points, _ in drawn) - 1)
    back = np.linalg.solve(
        np.concatenate([moved, np.ones((len(moved), 3, 1))], 2), np.broadcast_to(points, moved.shape)
    )
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    places = np.stack([x, y, np.ones_like(x)], 2) @ back[:, None]  # (n, h, w, 2): where each pixel comes from
    pixels = sample_at(to_unit(images), places, mirror_on_pixels=True)
    if size:
        noise = 2 * stack(noise for _, noise in drawn) - 1
        smooth = resample(gaussian_filter(noise, smoothness * SIZE, 3, "symmetric"), height, width)
        shift = size * side * smooth.transpose(0, 2, 3, 1)
        pixels = sample_at(pixels, np.stack([x, y], 2) + shift, mirror_on_pixels=False)
    return to_bytes(pixels)


def frost(images: np.ndarray, c: tuple[float, float], sources: list[Generator]) -> np.ndarray:
    """Blend with a random crop of one of five textures: (share of the image, share of the frost)."""
    keep, add = c
    rows, columns = field_size(images)
    crops = np.empty((len(images), 3, rows, columns), np.float32)
    for crop, source in zip(crops, sources, strict=True):
        choice, down, right = torch.rand(3, generator=source, dtype=torch.float64).tolist()
        texture = frost_texture(int(choice * len(FROST)))
        side = texture.shape[1]
        lines = (int(down * side) + np.arange(rows)) % side
        crop[:] = texture[:, lines[:, None], (int(right * side) + np.arange(columns)) % side]
    crops = resample(crops, *images.shape[2:])
    crops = crops if images.shape[1] == 3 else luma(crops)
    return to_bytes(np.float32(keep) * to_unit(images) + np.float32(add) * crops)


def gaussian_blur(images: np.ndarray, sigma: float, sources: list[Generator]) -> np.ndarray:
    """Convolve with a Gaussian, cut off at four standard deviations; edge pixels are repeated outside."""
    return to_bytes(gaussian_filter(to_unit(images), sigma, 4, "edge", *scale(images)))


def jpeg_compression(images: np.ndarray, quality: int, sources: list[Generator]) -> np.ndarray:
    """Store as JPEG of a quality (Pillow's scale and default, chroma at half size) and read."""

    def stored(picture: Image.Image) -> Image.Image:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return map_pictures(images, stored)


def motion_blur(images: np.ndarray, c: tuple[float, float], sources: list[Generator]) -> np.ndarray:
    """Smear to one side (radius, sigma), at a random angle from -45 to 45 degrees."""
    angles = draw_angles(sources, -45, 45)
    return to_bytes(motion_filter(to_unit(images), *c, angles, *scale(images)))


def pixelate(images: np.ndarray, share: float, sources: list[Generator]) -> np.ndarray:
    """Shrink to a share of each side by averaging boxes, then enlarge by repeating pixels."""
    height, width = images.shape[2:]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return map_pictures(images, lambda picture: picture.resize(small, box).resize((width, height), box))


def snow(images: np.ndarray, c: tuple[float, ...], sources: list[Generator]) -> np.ndarray:
    """Whiten, and add flakes.

    Flakes are noise (mean, std) enlarged by a zoom, set to 0 below a threshold, smeared downwards (radius, sigma), plus
    the same turned by 180 degrees. The last constant is the share of the image that is not whitened.
    """
    mean, std, zoom, threshold, radius, sigma, keep = c
    noise = stack(torch.randn((1, *field_size(images)), generator=source) for source in sources)
    flakes = enlarge(noise * np.float32(std) + np.float32(mean), zoom)
    flakes = to_bytes(np.where(flakes < threshold, 0, flakes))
    flakes = to_unit(to_bytes(motion_filter(to_unit(flakes), radius, sigma, draw_angles(sources, -135, -45))))
    flakes = resample(flakes + flakes[:, :, ::-1, ::-1], *images.shape[2:])
    pixels = to_unit(images)
    white = np.maximum(pixels, luma(pixels) * np.float32(1.5) + np.float32(0.5))
    return to_bytes(np.float32(keep) * pixels + np.float32(1 - keep) * white + flakes)


def speckle_noise(images: np.ndarray, std: float, sources: list[Generator]) -> np.ndarray:
    """Add Gaussian noise whose standard deviation is a share of each pixel's level."""
    noise = stack(torch.randn(images.shape[1:], generator=source) for source in sources)
    return to_bytes(to_unit(images) * (1 + np.float32(std) * noise))


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
"""Corruptions by the names of CIFAR-10-C's files, with their published constants, in the order of Table 3."""
PAIRS = tuple((name, severity) for name in CORRUPTIONS for severity in SEVERITIES)
"""Every corruption at every severity."""


# ---- frost


@cache
def frost_texture(index: int) -> np.ndarray:
    """Make the texture for photograph `index`: (3, 128, 128) float32 in [0, 1], tileable.

    The texture is the same in every process: noise with about the photographs' spectrum (power falls as
    frequency ** -1.5), half of it folded into bright ridges.
    """
    source, side = generator(0, "frost texture", index), 128
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) * side
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1) ** -0.75, 0)
    white = torch.randn((2, side, side), generator=source, dtype=torch.float64).numpy()
    smooth, folded = np.fft.ifft2(np.fft.fft2(white) * amplitude).real
    colour, spread = FROST[index]
    lightness = spread * _standard(_standard(smooth) - _standard(np.abs(folded)))
    return (np.clip(np.array(colour)[:, None, None] + lightness, 0, 255) / 255).astype(np.float32)


def _standard(field: np.ndarray) -> np.ndarray:
    return (field - field.mean()) / field.std()
