"""The pictures are looked at pixel by pixel: every image where it belongs, sharp, and nothing else in its place."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbpc_ray.reporting import image_grids


def noise(count: int, channels: int, side: int) -> np.ndarray:
    """(count, channels, side, side) uint8, no two pictures alike."""
    return np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) of a PNG."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def find(sheet: np.ndarray, image: np.ndarray, factor: int) -> tuple[int, int]:
    """(y, x) at which `image` (c, h, w), enlarged by `factor`, lies in `sheet` (H, W, 3), pixel by pixel."""
    tile = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    tile = tile.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = tile.shape[:2]
    corner = (sheet[: 1 - height, : 1 - width] == tile[0, 0]).all(-1)
    for y, x in np.argwhere(corner).tolist():
        if (sheet[y : y + height, x : x + width] == tile).all():
            return y, x
    raise AssertionError("the image is not in the picture")


def test_array_of_one_a_class_is_a_compact_grid():
    images = noise(10, 1, 8)
    sheet = image_grids.coreset_array(images, np.arange(10))
    assert sheet.shape == (2 * 9 * 6 - 6, 5 * 9 * 6 - 6, 3)  # 2 x 5 tiles of 8 + 1 pixels, 6 times
    assert sheet.dtype == np.uint8
    for label in range(10):
        y, x = (label // 5) * 54, (label % 5) * 54
        for channel in range(3):
            np.testing.assert_array_equal(sheet[y : y + 48 : 6, x : x + 48 : 6, channel], images[label, 0])
            np.testing.assert_array_equal(sheet[y + 5 : y + 48 : 6, x + 5 : x + 48 : 6, channel], images[label, 0])
    assert (sheet[48:54] == 255).all()
    assert (sheet[:, 48:54] == 255).all()


def test_array_has_a_row_for_each_class_and_a_column_for_each_image():
    images = noise(6, 3, 32)
    labels = np.array([4, 2, 2, 4, 4, 7])  # neither sorted nor balanced, not all classes there
    sheet = image_grids.coreset_array(images, labels, min_width=10)
    assert sheet.shape == (3 * 33 - 1, 3 * 33 - 1, 3)
    rows = [[1, 2], [0, 3, 4], [5]]
    for line, row in enumerate(rows):
        for column in range(3):
            tile = sheet[line * 33 : line * 33 + 32, column * 33 : column * 33 + 32]
            expected = images[row[column]].transpose(1, 2, 0) if column < len(row) else np.full((32, 32, 3), 255)
            np.testing.assert_array_equal(tile, expected)


def test_array_is_limited_and_wide_enough():
    images, labels = noise(60, 1, 4), np.arange(60) % 12
    sheet = image_grids.coreset_array(images, labels, max_per_class=3, max_classes=2, min_width=100)
    factor = 8  # of 3 * 5 - 1 = 14 pixels, to reach 100
    assert sheet.shape == (9 * factor, 14 * factor, 3)
    np.testing.assert_array_equal(sheet[5 * factor : 9 * factor : factor, ::factor, 0][:, :4], images[1, 0])
    assert image_grids.coreset_array(noise(1, 3, 300), np.zeros(1, int)).shape == (300, 300, 3)


@pytest.mark.parametrize(("channels", "side", "factor"), [(1, 8, 12), (3, 32, 3)])
def test_grid_of_one_a_class(tmp_path: Path, channels: int, side: int, factor: int):
    images = noise(10, channels, side)
    labels = np.arange(10)[::-1].copy()  # the order of the file is not the order of the classes
    path = tmp_path / "new" / "coreset.png"
    image_grids.coreset_grid(images, labels, tuple("abcdefghij"), path, "a title")
    sheet = pixels(path)
    places = {int(label): find(sheet, image, factor) for image, label in zip(images, labels, strict=True)}
    assert sorted(places, key=lambda label: places[label]) == list(range(10))  # line by line, as classes are numbered
    assert len({y for y, _ in places.values()}) == 2
    assert len({x for _, x in places.values()}) == 5
    for y, x in places.values():  # a name over each image, and clear of it
        above = sheet[y - 25 : y, x : x + side * factor]
        assert (above < 128).any()
        assert (above[-2:] == 255).all()
    assert (sheet[18:50] < 128).any()  # the title
    border = [sheet[:10], sheet[-10:], sheet[:, :10], sheet[:, -10:]]
    assert all((edge == 255).all() for edge in border)
    assert list(path.parent.iterdir()) == [path]


def test_grid_with_rows(tmp_path: Path):
    images, labels = noise(12, 3, 8), np.repeat([2, 0, 1], 4)
    path = tmp_path / "coreset.png"
    image_grids.coreset_grid(images, labels, ("zero", "one", "a name that is by far too long for one row"), path)
    sheet = pixels(path)
    places = [find(sheet, image, 12) for image in images]
    by_class = {int(label): [places[i] for i in np.flatnonzero(labels == label)] for label in range(3)}
    for label in range(3):
        assert len({y for y, _ in by_class[label]}) == 1
        assert by_class[label] == sorted(by_class[label])
    assert by_class[0][0][0] < by_class[1][0][0] < by_class[2][0][0]
    left = min(x for _, x in places)
    for label in range(3):
        y = by_class[label][0][0]
        name = sheet[y : y + 96, :left]
        assert (name < 128).any()
        assert (name[:, -4:] == 255).all() and (name[:, :10] == 255).all()  # between margin and images


def test_many_classes_with_long_names_stay_apart(tmp_path: Path):
    """Wide letters as well: the names above neighbouring images have white between them."""
    names = tuple(f"N0{index:03d} WWWWWWWWWWWWWWWW, another name" for index in range(200))
    images, path = noise(200, 3, 16), tmp_path / "coreset.png"
    image_grids.coreset_grid(images, np.arange(200), names, path)
    sheet = pixels(path)
    places = [find(sheet, image, 6) for image in images[:20]]
    with pytest.raises(AssertionError, match="not in the picture"):
        find(sheet, images[20], 6)
    assert (sheet[max(y for y, _ in places) + 96 :] < 200).any()  # the line that says what is left out
    (y, x), (_, following) = places[0], places[1]
    middle = (x + 96 + following) // 2
    assert (sheet[y - 25 : y, middle - 2 : middle + 2] == 255).all()
    assert sheet.shape[1] < 1200


def test_names_are_cut_to_a_width():
    assert image_grids._fit("goldfish, Carassius auratus", 190) == "goldfish"
    cut = image_grids._fit("German short-haired pointer of a kind", 190)
    assert cut.startswith("German short") and cut.endswith("…")
    for name in ("iiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii", "W" * 40, "a $b_c$ " * 9):
        assert image_grids._text_width(image_grids._fit(name, 190), image_grids.NAME) <= 190
    assert image_grids._fit("wide", 1) == "…"
    assert [image_grids._columns(count) for count in (1, 5, 10, 20, 7, 100, 200)] == [1, 5, 5, 5, 4, 10, 20]


def test_odd_texts_and_sizes(tmp_path: Path):
    """A formula is text, empty names are none, and an oblong image keeps its shape."""
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 50), dtype=np.uint8)
    image_grids.coreset_grid(image, np.array([0, 1]), ("$x_", ""), tmp_path / "a.png", "50 % of $ and \\frac{")
    find(pixels(tmp_path / "a.png"), image[0], 2)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (noise(2, 2, 4), np.arange(2)),
        (noise(2, 3, 4).astype(np.float32), np.arange(2)),
        (noise(2, 3, 4)[0], np.arange(2)),
        (noise(2, 3, 4), np.arange(3)),
        (noise(0, 3, 4), np.arange(0)),
    ],
)
def test_what_is_no_picture_is_refused(images: np.ndarray, labels: np.ndarray, tmp_path: Path):
    with pytest.raises(ValueError, match="must be"):
        image_grids.coreset_array(images, labels)
    with pytest.raises(ValueError, match="must be"):
        image_grids.coreset_grid(images, labels, ("a", "b", "c"), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "coreset.png"
    image_grids.coreset_grid(noise(2, 1, 8), np.arange(2), ("a", "b"), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        image_grids.coreset_grid(noise(3, 1, 8), np.arange(3), ("a", "b", "c"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    Image.open(io.BytesIO(before)).verify()


@pytest.mark.parametrize(("channels", "side", "factor"), [(1, 8, 12), (3, 64, 2)])
def test_images_over_time_are_a_row_each_and_a_column_a_step(tmp_path: Path, channels: int, side: int, factor: int):
    """Of many steps the first, the last and those evenly between; names at the left, steps above."""
    every = noise(3 * 21, channels, side).reshape(21, 3, channels, side, side)
    history = {100 * step: every[step] for step in reversed(range(21))}
    path = tmp_path / "over-time.png"
    names = ["zero", "one, ones", "a name that is by far too long for one row"]
    image_grids.coreset_over_time(history, names, path, "fbpc over the steps")
    sheet = pixels(path)
    shown = [0, 3, 6, 9, 11, 14, 17, 20]
    places = [[find(sheet, every[step][row], factor) for step in shown] for row in range(3)]
    for row in places:
        assert len({y for y, _ in row}) == 1 and [x for _, x in row] == sorted({x for _, x in row})
    for column in zip(*places, strict=True):
        assert len({x for _, x in column}) == 1 and [y for y, _ in column] == sorted({y for y, _ in column})
    y, x = places[0][0]
    assert (sheet[y : y + factor * side, :x] < 128).any()  # its name
    assert (sheet[y - image_grids.NAME_LINE : y, x : x + factor * side] < 128).any()  # step 0
    with pytest.raises(AssertionError):
        find(sheet, every[1][0], factor)
    image_grids.coreset_over_time({0: every[0]}, names, path)
    with pytest.raises(ValueError, match="uint8"):
        image_grids.coreset_over_time({0: every[0].astype(np.float32)}, names, path)


def test_names_that_the_font_lacks_are_escaped_without_a_warning(tmp_path):
    """CJK and emoji: a picture with the code of each character, not boxes that all look alike."""
    assert image_grids.drawable("café 日💡") == "café \\u65e5\\U0001f4a1"
    with warnings.catch_warnings(action="error"):
        names = tuple(image_grids._fit(name, 400) for name in ("日本語", "💡", "naïve"))
        image_grids._png(np.zeros((64, 400, 3), np.uint8), [(0, 20, name, 10, "left", "top") for name in names])
    assert names == ("\\u65e5\\u672c\\u8a9e", "\\U0001f4a1", "naïve")
