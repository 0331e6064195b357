"""The ten corruptions of Table 3, against their published definitions."""

import colorsys
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from support.corruption_draws import PUBLISHED, agree, draws, levels
from support.image_files import scenes

from fbpc_ray.core.errors import UserError
from fbpc_ray.data import corruptions, image_filters
from fbpc_ray.data.corruptions import (
    CORRUPTIONS,
    FROST,
    SEVERITIES,
    corrupt,
    frost_texture,
)

RANDOM = ("elastic_transform", "frost", "motion_blur", "snow", "speckle_noise")
SIZES = ((8, 8), (28, 28), (32, 32), (64, 64), (20, 44))


# ---- the published definitions, slowly


def slow_brightness(image: np.ndarray, add: float, source: torch.Generator) -> np.ndarray:
    def brighter(rgb: np.ndarray) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb(hue, saturation, min(value + add, 1))

    return levels(np.apply_along_axis(brighter, 0, image / 255))


def slow_defocus_blur(image: np.ndarray, c: tuple[float, float], source: torch.Generator) -> np.ndarray:
    grid = np.arange(-8, 9)
    aliased = (grid[:, None] ** 2 + grid**2 <= c[0] ** 2).astype(float)
    tap = np.exp(-np.array([1, 0, 1]) / (2 * c[1] ** 2))
    tap /= tap.sum()
    kernel = ndimage.correlate(aliased / aliased.sum(), tap[:, None] * tap)
    return levels(np.stack([ndimage.correlate(channel / 255, kernel, mode="mirror") for channel in image]))


def slow_elastic_transform(image: np.ndarray, c: tuple[float, ...], source: torch.Generator) -> np.ndarray:
    size, smoothness, jitter = (32 * value for value in c)
    moves = 2 * torch.rand((3, 2), generator=source, dtype=torch.float64).numpy() - 1
    noise = 2 * torch.rand((2, 32, 32), generator=source).double().numpy() - 1
    start = np.array([[26, 26], [26, 6], [6, 6]], float)
    to_source = np.linalg.inv(np.column_stack([start + jitter * moves, np.ones(3)])) @ start  # (x', y', 1) -> (x, y)
    y, x = np.mgrid[:32, :32].astype(float)
    from_x, from_y = (to_source[0, k] * x + to_source[1, k] * y + to_source[2, k] for k in (0, 1))
    image = np.stack([ndimage.map_coordinates(ch / 255, (from_y, from_x), order=1, mode="mirror") for ch in image])
    if size:
        dx, dy = (size * ndimage.gaussian_filter(n, smoothness, mode="reflect", truncate=3) for n in noise)
        image = np.stack([ndimage.map_coordinates(ch, (y + dy, x + dx), order=1, mode="reflect") for ch in image])
    return levels(image)


def slow_gaussian_blur(image: np.ndarray, sigma: float, source: torch.Generator) -> np.ndarray:
    return levels(
        np.stack([ndimage.gaussian_filter(channel / 255, sigma, mode="nearest", truncate=4) for channel in image])
    )


def slow_jpeg_compression(image: np.ndarray, quality: int, source: torch.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def slow_smear(image: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """(h, w) float: ImageMagick's motion blur, pixel by pixel."""
    height, width = image.shape
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    smeared = np.zeros((height, width))
    for row, column in np.ndindex(height, width):
        for i, weight in enumerate(weights):
            down, right = math.ceil(i * sine - 0.5), math.ceil(i * cosine - 0.5)
            at = min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)
            smeared[row, column] += weight / sum(weights) * image[at]
    return smeared


def slow_motion_blur(image: np.ndarray, c: tuple[int, float], source: torch.Generator) -> np.ndarray:
    degrees = 90 * float(torch.rand((), generator=source, dtype=torch.float64)) - 45
    return levels(np.stack([slow_smear(channel / 255, *c, degrees) for channel in image]))


def slow_pixelate(image: np.ndarray, share: float, source: torch.Generator) -> np.ndarray:
    small = Image.fromarray(image.transpose(1, 2, 0)).resize((int(32 * share), int(32 * share)), Image.Resampling.BOX)
    place = ((np.arange(32) + 0.5) * int(32 * share) / 32).astype(int)  # each pixel shows the one that it lies in
    return np.asarray(small)[place][:, place].transpose(2, 0, 1)


def slow_snow(image: np.ndarray, c: tuple[float, ...], source: torch.Generator) -> np.ndarray:
    mean, std, zoom, threshold, radius, sigma, keep = c
    noise = torch.randn((1, 32, 32), generator=source)[0].double().numpy()
    degrees = 90 * float(torch.rand((), generator=source, dtype=torch.float64)) - 135
    side = math.ceil(32 / zoom)
    top = (32 - side) // 2
    flakes: Any = ndimage.zoom((mean + std * noise)[top : top + side, top : top + side], zoom, order=1, mode="nearest")
    trim = (len(flakes) - 32) // 2
    flakes = flakes[trim : trim + 32, trim : trim + 32]
    flakes = levels(np.where(flakes < threshold, 0, flakes)) / 255
    flakes = levels(slow_smear(flakes, int(radius), sigma, degrees)) / 255
    pixels = image / 255
    grey = 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
    white = np.maximum(pixels, 1.5 * grey + 0.5)
    return levels(keep * pixels + (1 - keep) * white + flakes + np.rot90(flakes, 2))


def slow_speckle_noise(image: np.ndarray, std: float, source: torch.Generator) -> np.ndarray:
    noise = torch.randn(image.shape, generator=source).double().numpy()
    return levels(image / 255 + image / 255 * std * noise)


SLOW: dict[str, Callable[..., np.ndarray]] = {
    name.removeprefix("slow_"): function
    for name, function in globals().items()
    if name.startswith("slow_") and name != "slow_smear"
}


def test_the_ten_of_table_3():
    assert [(name, c.abbreviation) for name, c in CORRUPTIONS.items()] == list(
        zip(PUBLISHED, ("BN", "DB", "ET", "FT", "GB", "JPEG", "MB", "PIX", "SN", "SP"), strict=True)
    )
    assert SEVERITIES == (1, 2, 3, 4, 5)
    assert {*SLOW, "frost"} == set(CORRUPTIONS)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", SLOW)
def test_the_published_definition(name, severity):
    images = scenes(2)
    constant = PUBLISHED[name][severity - 1]
    expected = [SLOW[name](image, constant, draws(name, severity, i)) for i, image in enumerate(images)]
    agree(corrupt(images, name, severity, 0), np.stack(expected))


MAGICK: dict[tuple[int, float, float], list[list[int]]] = {
    (6, 1.5, -30.0): [
        [0, 0, 0, 0, 0, 14, 48, 115, 200], [0, 0, 0, 0, 0, 14, 48, 115, 115], [0, 0, 0, 0, 0, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 107, 0, 0, 0, 0], [0, 14, 44, 85, 0, 0, 0, 0, 0],
        [0, 3, 0, 0, 0, 0, 0, 0, 0], [0, 37, 0, 0, 0, 0, 0, 0, 0], [30, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    (8, 3, -110.0): [
        [0, 0, 0, 0, 0, 0, 0, 0, 91], [0, 0, 0, 0, 0, 0, 0, 0, 44], [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 59, 0, 0, 0, 0], [0, 0, 0, 0, 56, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 47, 0, 0, 0], [0, 21, 0, 0, 0, 36, 0, 0, 0], [0, 19, 0, 0, 0, 24, 0, 0, 0],
    ],
}  # fmt: skip
"""(radius, sigma, angle) -> what MagickMotionBlurImage of ImageMagick 6.9.11-60 Q16, which made CIFAR-10-C's motion
and snow, gives for three bright pixels: 255 at (4, 4), 200 at (0, 8), 90 at (7, 1)."""


@pytest.mark.parametrize("case", MAGICK)
def test_motion_is_imagemagicks(case):
    image = np.zeros((9, 9))
    image[4, 4], image[0, 8], image[7, 1] = 255, 200, 90
    assert levels(slow_smear(image / 255, *case)).tolist() == MAGICK[case]
    pixels = (image / 255).astype(np.float32)[None, None]
    smeared = image_filters.motion_filter(pixels, case[0], case[1], np.deg2rad([case[2]]))
    assert levels(smeared)[0, 0].tolist() == MAGICK[case]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_blends_a_crop_of_a_texture(severity):
    """Both shares are the published ones; the crop is the same whatever the image, and lies in a texture."""
    keep, add = PUBLISHED["frost"][severity - 1]
    images = scenes(40) // 2
    black = corrupt(np.zeros_like(images), "frost", severity, 0)
    result = corrupt(images, "frost", severity, 0)
    unclipped = result < 255
    difference = (result.astype(float) - black - keep * images)[unclipped]
    assert np.abs(difference).max() <= 1 + 1e-3 and unclipped.mean() > 0.8
    tiled = [np.tile(np.floor(add * frost_texture(which) * 255 + 1e-3), (1, 2, 2)) for which in range(5)]
    found_in = []
    for crop in black:
        for which, whole in enumerate(tiled):
            windows = np.lib.stride_tricks.sliding_window_view(whole, (3, 1, 8))[0, :128, :128, :, 0]
            rows, columns = np.nonzero((np.abs(windows - crop[:, 0, :8]) <= 1).all((2, 3)))
            places = zip(rows, columns, strict=True)
            if any(np.abs(whole[:, r : r + 32, c : c + 32] - crop).max() <= 1 for r, c in places):
                found_in.append(which)
    assert len(found_in) == 40 and min(np.bincount(found_in, minlength=5)) >= 3
    assert len({crop.tobytes() for crop in black}) == 40


def test_frost_textures_are_like_the_photographs():
    """Mean colour, contrast and spectrum: what was measured of the five."""
    for which, (colour, spread) in enumerate(FROST):
        texture = frost_texture(which) * 255
        assert texture.shape == (3, 128, 128) and texture.dtype == np.float32
        np.testing.assert_allclose(texture.mean((1, 2)), colour, atol=2)
        assert texture.mean(0).std() == pytest.approx(spread, rel=0.1)
        power = np.abs(np.fft.fft2(texture.mean(0) - texture.mean())) ** 2
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
        bands = [power[(radius > r / 128) & (radius <= 2 * r / 128)].mean() for r in (2, 4, 8, 16, 32)]
        slope = np.polyfit(np.log([2, 4, 8, 16, 32]), np.log(bands), 1)[0]
        assert -1.7 < slope < -0.7, slope
    assert not np.array_equal(frost_texture(1), frost_texture(2))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_speckle_grows_with_the_level(severity):
    images = np.zeros((30, 3, 32, 32), np.uint8)
    images[10:20], images[20:] = 60, 120
    noisy = corrupt(images, "speckle_noise", severity, 0) + 0.5  # the mean of what was cut off
    assert np.all(noisy[:10] == 0.5)
    for part, level in ((noisy[10:20], 60), (noisy[20:], 120)):
        std = PUBLISHED["speckle_noise"][severity - 1]
        assert part.std() / level == pytest.approx(math.hypot(std, 0.29 / level), rel=0.02)
        assert part.mean() == pytest.approx(level, abs=0.3)
        assert abs(np.corrcoef(part[:, 0].ravel(), part[:, 1].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("severity", SEVERITIES)
def test_angles_fill_their_range(severity):
    """Motion to the right within 45 degrees; flakes fall."""
    bright = np.zeros((200, 1, 32, 32), np.uint8)
    bright[:, :, 16, 16] = 255
    smeared = corrupt(bright, "motion_blur", severity, 0).astype(float)[:, 0]
    rows, columns = np.mgrid[:32, :32] - 16
    mass = smeared.sum((1, 2))
    down, left = (smeared * rows).sum((1, 2)) / mass, -(smeared * columns).sum((1, 2)) / mass
    assert (left > 0).all() and (np.abs(down) <= left + 0.5).all()
    angles = np.rad2deg(np.arctan2(down, left))
    assert angles.min() < -38 and angles.max() > 38 and abs(angles.mean()) < 6


# ---- what holds for all


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_image_and_each_by_itself(name, size, channels, monkeypatch):
    images = scenes(5, size[0], size[1], channels)
    images.setflags(write=False)
    for severity in (1, 5):
        result = corrupt(images, name, severity, 3)
        assert result.dtype == np.uint8 and result.shape == images.shape and result.flags.c_contiguous
        assert result.flags.writeable and not np.array_equal(result, images)
        for i in (0, 4):
            alone = corrupt(images[i : i + 1], name, severity, 3, first=i)
            assert np.array_equal(alone[0], result[i])
        with monkeypatch.context() as patch:
            patch.setattr(corruptions, "CHUNK", 2)
            assert np.array_equal(corrupt(images, name, severity, 3), result)
        assert np.array_equal(corrupt(images, name, severity, 4), result) == (name not in RANDOM)
        assert np.array_equal(corrupt(images, name, severity, 3, first=1), result) == (name not in RANDOM)
    assert corrupt(images[:0], name, 1, 0).shape == (0, channels, *size)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_images_pass(name):
    for size in ((1, 1), (2, 2), (3, 5), (1, 40)):
        images = scenes(3, *size)
        for severity in SEVERITIES:
            assert corrupt(images, name, severity, 0).shape == images.shape


@pytest.mark.parametrize("name", RANDOM)
def test_draws_differ_between_images_and_severities(name):
    same = np.repeat(scenes(1), 20, 0)
    result = corrupt(same, name, 2, 0)
    assert len({image.tobytes() for image in result}) > (8 if name == "motion_blur" else 19)  # near angles are alike
    if name == "motion_blur":  # severities 3 and 4 differ in nothing but the draw
        assert not np.array_equal(corrupt(same, name, 3, 0), corrupt(same, name, 4, 0))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_one_channel_is_one_of_three_equal_ones(name):
    """As the published code turns grey into RGB. Speckle draws once, frost is grey, JPEG rounds differently."""
    grey = scenes(6, channels=1)
    one = corrupt(grey, name, 3, 0)
    three = corrupt(np.repeat(grey, 3, 1), name, 3, 0)
    if name == "speckle_noise":
        assert abs(one.astype(float).std() - three.std()) < 2
    elif name == "frost":
        luma = np.tensordot([0.299, 0.587, 0.114], three.astype(float), (0, 1))[:, None]
        assert np.abs(one - luma)[(three < 255).all(1, keepdims=True)].max() < 2
    else:
        assert np.abs(one.astype(int) - three).max() <= 2


@pytest.mark.parametrize("name", ["defocus_blur", "gaussian_blur", "motion_blur", "elastic_transform", "pixelate"])
def test_a_plain_image_stays(name):
    """Kernels add to one, and edges bring nothing in."""
    for size in SIZES:
        images = np.repeat(np.array([0, 1, 127, 254, 255], np.uint8), 3 * math.prod(size)).reshape(5, 3, *size)
        for severity in SEVERITIES:
            assert np.array_equal(corrupt(images, name, severity, 0), images), (size, severity)


# ---- refused


def test_what_does_not_exist_is_refused():
    images = scenes(1)
    with pytest.raises(UserError, match=r"unknown corruption 'fog'.*frost"):
        corrupt(images, "fog", 1, 0)
    for severity in (0, 6, -1):
        with pytest.raises(UserError, match=rf"severity must be 1 to 5, got {severity}"):
            corrupt(images, "snow", severity, 0)
    for wrong in (images.astype(np.float32), images[0], scenes(1, channels=2)):
        with pytest.raises(TypeError, match="uint8 images"):
            corrupt(wrong, "snow", 1, 0)
