"""Each corruption against its published definition, written out slowly on scipy, colorsys and Pillow.

PUBLISHED is a second transcription of the constants."""

import colorsys
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import ndimage
from support.image_files import scenes

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data import corruptions, image_filters
from fbpc_ray.data.corruptions import (
    CORRUPTIONS,
    FROST,
    SEVERITIES,
    corrupt,
    frost_texture,
)
from fbpc_ray.data.image_filters import disk, gaussian_line, share_taps

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")

PUBLISHED: dict[str, list[Any]] = {
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "elastic_transform": [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
    "jpeg_compression": [80, 65, 58, 50, 40],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "snow": [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ],
    "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
}  # fmt: skip
RANDOM = ("elastic_transform", "frost", "motion_blur", "snow", "speckle_noise")
SIZES = ((8, 8), (28, 28), (32, 32), (64, 64), (20, 44))


def draws(name: str, severity: int, index: int, seed: int = 0) -> torch.Generator:
    return generator(seed, "corruption", name, severity, index)


def levels(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, cut off."""
    return np.floor(np.clip(pixels, 0, 1) * 255 + 1e-3).astype(np.uint8)


def agree(found: np.ndarray, expected: np.ndarray, share: float = 2e-3) -> None:
    """Equal but for a few single levels, where float32 and float64 fall on two sides of a whole one."""
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and np.mean(difference > 0) <= share, (difference.max(), np.mean(difference > 0))


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
    found = corrupt(images, "frost", severity, 0)
    unclipped = found < 255
    difference = (found.astype(float) - black - keep * images)[unclipped]
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
        found = corrupt(images, name, severity, 3)
        assert found.dtype == np.uint8 and found.shape == images.shape and found.flags.c_contiguous
        assert found.flags.writeable and not np.array_equal(found, images)
        for i in (0, 4):
            alone = corrupt(images[i : i + 1], name, severity, 3, first=i)
            assert np.array_equal(alone[0], found[i])
        with monkeypatch.context() as patch:
            patch.setattr(corruptions, "CHUNK", 2)
            assert np.array_equal(corrupt(images, name, severity, 3), found)
        assert np.array_equal(corrupt(images, name, severity, 4), found) == (name not in RANDOM)
        assert np.array_equal(corrupt(images, name, severity, 3, first=1), found) == (name not in RANDOM)
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
    found = corrupt(same, name, 2, 0)
    assert len({image.tobytes() for image in found}) > (8 if name == "motion_blur" else 19)  # near angles are alike
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


def rises(name: str, images: np.ndarray) -> list[float]:
    """Mean squared distance from the clean images, by severity."""
    return [float(np.mean((corrupt(images, name, s, 0).astype(float) - images) ** 2)) for s in SEVERITIES]


def check_rises(images: np.ndarray) -> None:
    """Distance grows with severity, but where the published constants themselves say otherwise."""
    for name in CORRUPTIONS:
        distance = rises(name, images)
        steps = np.diff(distance)
        if name == "elastic_transform":  # an affine jitter of 0.08, 0.07, 0.06, 0.05, 0.03 is most of it
            assert np.all(steps < 0), (name, distance)
        elif name == "frost":  # 4 and 5 darken the image by 0.85, 0.75 under nearly the frost of 3
            assert np.all(steps[:2] > 0), (name, distance)
        elif name == "motion_blur":  # 3 and 4 have the same sigma, and differ in a tail of exp(-18)
            assert np.all(steps[[0, 1, 3]] > 0) and abs(steps[2]) < 0.05 * distance[2], (name, distance)
        else:
            assert np.all(steps > 0), (name, distance)
        assert distance[0] > 1


def test_severity_on_synthetic_images():
    check_rises(scenes(150))


@needs_shared
def test_severity_on_cifar10():
    file = SHARED / "cifar10-jpeg" / "test-00000-of-00001.parquet"
    column = pq.read_table(file, columns=["img"]).column("img").slice(0, 300).to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))).transpose(2, 0, 1) for row in column])
    check_rises(images)


def test_frost_hides_more_with_severity():
    """The share of frost to image, which does rise: .2, .3, .44, .47, .6."""
    images = scenes(100)
    likeness = []
    for severity in SEVERITIES:
        found = corrupt(images, "frost", severity, 0).astype(float)
        likeness.append(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(found, images, strict=True)]))
    assert np.all(np.diff(likeness) < 0), likeness


def unevenness(severity: int, side: int) -> float:
    """Standard deviation, in pixels, of the places that pixels come from about the best affine map; the middle half.

    On a ramp a level says the place.
    """
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8) * (256 // side), (100, 1, side, side))
    middle = slice(side // 4, side - side // 4)
    rows, columns = np.mgrid[middle, middle].reshape(2, -1)
    affine = np.column_stack([rows, columns, np.ones(len(rows))])
    found = corrupt(ramp, "elastic_transform", severity, 0)[:, 0, middle, middle].reshape(100, -1).T / (256 // side)
    return math.sqrt(np.linalg.lstsq(affine, found)[1].mean() / len(rows))


def test_elastic_grows_uneven_with_severity_and_size():
    uneven = [unevenness(severity, 32) for severity in SEVERITIES]
    assert uneven[0] < 0.05  # rounding: an eighth of a pixel a level
    assert np.all(np.diff(uneven[1:]) > 0.05), uneven
    # a white field smoothed with sigma has the standard deviation 1 / (sqrt(3) 2 sqrt(pi) sigma); size x that:
    assert uneven[4] == pytest.approx(3.2 / (math.sqrt(3) * 2 * math.sqrt(math.pi) * 0.96), rel=0.15)
    assert unevenness(5, 64) == pytest.approx(2 * uneven[4], rel=0.2)
    assert unevenness(4, 16) == pytest.approx(uneven[3] / 2, rel=0.2)


# ---- other sizes


def test_kernels_add_to_one_and_are_even():
    for zoom, step in ((1, 1), (2, 1), (7, 1), (1, 0.25), (1, 0.875)):
        disks = [disk(radius, softness, zoom, step) for radius, softness in PUBLISHED["defocus_blur"]]
        for taps in (*disks, gaussian_line(0.7, 4, zoom, step)):
            assert sum(taps.values()) == pytest.approx(1, abs=1e-12) and min(taps.values()) > 0
            for (row, column), weight in taps.items():
                assert taps[-row, -column] == pytest.approx(weight)


def test_lengths_grow_with_the_image():
    """Standard deviations on 64x64 are twice those on 32x32; a disk becomes one of twice the radius."""
    for sigma in (1, 2.5):
        line = gaussian_line(sigma, 4, 2)
        assert math.sqrt(sum(w * c**2 for (_, c), w in line.items())) == pytest.approx(2 * sigma, rel=1e-2)
    assert max(row for (row, _), weight in disk(1.5, 0.1, 2).items() if weight > 1e-6) == 3
    assert sum(weight > 1e-6 for weight in disk(1.5, 0.01, 2).values()) == 29  # points within 3 of the centre
    assert (
        max(row for row, _ in disk(0.3, 0.4)) == 1 and max(row for row, _ in disk(0.3, 0.4, 2)) == 2
    )  # the rim's reach
    bright = np.zeros((40, 1, 64, 64), np.uint8)
    bright[:, :, 32, 32] = 255
    small = np.zeros((40, 1, 32, 32), np.uint8)
    small[:, :, 16, 16] = 255

    def spread(images: np.ndarray) -> float:
        mass = corrupt(images, "motion_blur", 5, 0).astype(float)[:, 0]
        rows, columns = np.mgrid[: images.shape[2], : images.shape[3]] - images.shape[2] // 2
        return float((mass * np.hypot(rows, columns)).sum() / mass.sum())

    assert spread(bright) == pytest.approx(2 * spread(small), rel=0.1)


@pytest.mark.parametrize("name", ["gaussian_blur", "motion_blur"])
def test_a_small_image_is_blurred_as_one_of_32x32(name, digits):
    """8x8, each pixel repeated to 4x4, blurred, and averaged again: what sharing a sample between pixels comes to."""
    images = digits.test.images[:30]
    large = images.repeat(4, 2).repeat(4, 3)
    for severity in SEVERITIES:
        _, _, constants = CORRUPTIONS[name]
        blurred = image_filters.to_unit(large)
        if name == "gaussian_blur":
            blurred = image_filters.gaussian_filter(blurred, constants[severity - 1], 4, "edge")
        else:
            angles = image_filters.draw_angles([draws(name, severity, i) for i in range(30)], -45, 45)
            blurred = image_filters.motion_filter(blurred, *constants[severity - 1], angles)
        expected = blurred.reshape(30, 1, 8, 4, 8, 4).mean((3, 5))
        agree(corrupt(images, name, severity, 0), levels(expected))


def test_a_shared_sample_keeps_its_place():
    points = np.array([[0.25, -1.5], [2.0, 0.75], [-0.1, -0.1]])
    weights = np.array([1.0, 2.0, 5.0])
    taps = share_taps(points, weights)
    mean = sum(weight * np.array(place) for place, weight in taps.items())
    np.testing.assert_allclose(mean, weights @ points / 8)
    assert share_taps(np.array([[1.0, -2.0]]), np.array([3.0])) == {(1, -2): 1.0}


def test_frost_and_snow_keep_their_grain():
    """On black images of 8x8 and 64x64 they are those on 32x32, reduced by areas or enlarged linearly."""
    for name in ("frost", "snow"):
        whole, small, large = (
            corrupt(np.zeros((20, 3, side, side), np.uint8), name, 5, 0).astype(float) for side in (32, 8, 64)
        )
        pooled = whole.reshape(20, 3, 8, 4, 8, 4).mean((3, 5))
        assert np.abs(small - pooled).max() <= (1 if name == "frost" else 40) and np.abs(small - pooled).mean() < 2
        assert np.corrcoef(large.reshape(20, 3, 32, 2, 32, 2).mean((3, 5)).ravel(), whole.ravel())[0, 1] > 0.9


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
