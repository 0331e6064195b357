"""How corruptions grow with severity and with the size of the image."""

import io
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.corruption_draws import PUBLISHED, agree, draws, levels
from support.image_files import scenes

from fbpc_ray.data import image_filters
from fbpc_ray.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
)
from fbpc_ray.data.image_filters import disk, gaussian_line, share_taps

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")


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
        result = corrupt(images, "frost", severity, 0).astype(float)
        likeness.append(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(result, images, strict=True)]))
    assert np.all(np.diff(likeness) < 0), likeness


def unevenness(severity: int, side: int) -> float:
    """Standard deviation, in pixels, of the places that pixels come from about the best affine map; the middle half.

    On a ramp a level says the place.
    """
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8) * (256 // side), (100, 1, side, side))
    middle = slice(side // 4, side - side // 4)
    rows, columns = np.mgrid[middle, middle].reshape(2, -1)
    affine = np.column_stack([rows, columns, np.ones(len(rows))])
    result = corrupt(ramp, "elastic_transform", severity, 0)[:, 0, middle, middle].reshape(100, -1).T / (256 // side)
    return math.sqrt(np.linalg.lstsq(affine, result)[1].mean() / len(rows))


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
