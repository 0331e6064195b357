"""Images and labels from Python in forms that users have: read as they look, or refused with the cause and the fix."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import errors
from support.data_files import picture
from torch.utils.data import Dataset as TorchDataset

from fbpc_ray.core.errors import UserError
from fbpc_ray.data import arrays
from fbpc_ray.data.datasets import Dataset, assemble
from fbpc_ray.data.resize import Resizing

COUNT = 12
IMAGES = np.stack([picture(n % 3, n) for n in range(COUNT)])
"""(n, h, w, c)"""
PLANES = IMAGES.transpose(0, 3, 1, 2)
LABELS = np.arange(COUNT) % 3


def read(*splits: Any, **options: Any) -> Dataset:
    return assemble(arrays.read(*splits, **options), "own")


refusal = partial(errors.refusal, read)


def pairs(images: Any) -> list[tuple[Any, int]]:
    return list(zip(images, LABELS.tolist(), strict=True))


class Items(TorchDataset):
    """A Dataset of `count` items that `item` makes."""

    def __init__(self, item: Callable[[int], Any], count: int = COUNT):
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


# ---- the axis of channels


@pytest.mark.parametrize("size", [0, 8])
def test_arrays_of_a_dataset_or_a_list_have_their_channels_last_or_first(size):
    """Both give the same pixels; channels that come first are not taken for rows."""
    resizing = Resizing(size)
    for data in (pairs(IMAGES), pairs(PLANES), (list(IMAGES), LABELS), (list(PLANES), LABELS)):
        np.testing.assert_array_equal(read(data, (PLANES, LABELS), resizing=resizing).train.images, PLANES)


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_with_their_channels_last_are_refused(channels, size):
    """They would be images of 8 channels."""
    tensor = torch.tensor(IMAGES[..., :channels])
    for data in ((tensor, LABELS), pairs(tensor), (list(tensor), LABELS)):
        message = refusal(data, resizing=Resizing(size))
        assert "would be images of 8 channels" in message
        assert message.endswith("permute it")


def test_images_of_other_numbers_of_axes_are_refused():
    assert "train[0] is an image of (1, 8, 8, 3); it must be (c, h, w)" in refusal(pairs(IMAGES[:, None]))


# ---- PIL images


def test_pil_images_are_turned_as_in_files():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image = picture(0, 0, (12, 8))
    Image.fromarray(image).save(buffer, "PNG", exif=exif)
    for size, data in ((0, pairs([Image.open(buffer)] * COUNT)), (8, ([Image.open(buffer)] * COUNT, LABELS))):
        result = read(data, resizing=Resizing(size))
        assert "the data given, train: 12 of 12 images are turned as their EXIF orientation says" in result.notes
        if not size:
            np.testing.assert_array_equal(result.train.images[0], np.rot90(image, -1).transpose(2, 0, 1))


def test_grey_images_among_coloured_ones_are_refused_by_their_channels():
    mixed = [Image.fromarray(image).convert("L" if n == 4 else "RGB") for n, image in enumerate(IMAGES)]
    message = refusal(pairs(mixed))
    assert "train[4] is an image of 1 channels, the first one of 3; convert all to one mode" in message
    grey = refusal((IMAGES, LABELS), (IMAGES[..., 0], LABELS))
    assert grey.endswith("all images must have one number of channels: convert them")


def test_a_list_of_images_of_several_sizes_is_refused_with_the_argument():
    images = [IMAGES[0], IMAGES[1][:4], *IMAGES[2:]]
    message = refusal((images, LABELS))
    assert "train images[1] is an image of (3, 4, 8), the first one is (3, 8, 8)" in message
    assert "image_size=32" in message


# ---- labels


class Column:
    """Labels as a column of a table gives them: an array of objects."""

    def __init__(self, values: list[Any]):
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, object)


NAMES = ["cat", "dog", "eel"]


def test_names_in_a_column_of_objects_are_names():
    data = read((IMAGES, Column([NAMES[label] for label in LABELS])))
    assert data.classes == tuple(NAMES)
    assert data.train.labels.tolist() == read((IMAGES, LABELS)).train.labels.tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", 1] * 6, "train labels[1] is 1, others are names; use one form"),
        (Column(["cat", float("nan")] * 6), "train labels[1] is nan, others are names"),
        (Column([None] * 12), "train labels is object (12,)"),
    ],
    ids=["list", "missing", "none"],
)
def test_labels_of_two_forms_are_refused(labels, message):
    assert message in refusal((IMAGES, labels))


def test_one_hot_rows_have_a_column_for_each_class():
    """A class without an image is missed, as a folder without images is."""
    wide = np.eye(5)[LABELS]
    assert "class '3' (label 3)" in refusal((IMAGES, wide))
    assert "different numbers of columns (train 3, test 5)" in refusal((IMAGES, np.eye(3)[LABELS]), (IMAGES, wide))
    message = refusal((IMAGES, wide), classes=NAMES)
    assert "one-hot labels of train have 5 columns, but there are 3 classes" in message


@pytest.mark.parametrize("classes", ["abc", {"a", "b", "c"}, {"a": 0, "b": 1, "c": 2}, 3])
def test_class_names_without_an_order_are_refused(classes):
    message = refusal((IMAGES, LABELS), classes=classes)
    assert f"classes is a {type(classes).__name__}; it must be a list of names" in message


# ---- what is no data set


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "train is None; give (images, labels)"),
        ({"images": IMAGES, "labels": LABELS}, "train is a dict; give (images, labels)"),
        (IMAGES, "train is a ndarray; give (images, labels)"),
        (torch.tensor(0.3), "train is a Tensor; give (images, labels)"),
        ((pair for pair in pairs(IMAGES)), "train is a generator; give (images, labels)"),
        ((IMAGES[:0], LABELS[:0]), "train images is empty; add images"),
        (Items(lambda n: {"image": IMAGES[n], "label": 0}), "must be an (image, int label) pair (it is a dict)"),
        (Items(lambda n: IMAGES[n]), "train[0] must be an (image, int label) pair (it is a ndarray)"),
        (Items(lambda n: (IMAGES[n], 0), 20), "train[12] cannot be read (IndexError: index 12 is out of bounds"),
    ],
    ids=["none", "dict", "array", "number", "generator", "empty", "items are dicts", "items are images", "too long"],
)  # fmt: skip
def test_what_is_no_data_set_is_refused(data, message):
    assert message in refusal(data)


def test_an_error_of_a_dataset_names_its_item_and_stays_as_the_cause():
    def fail(number: int) -> Any:
        if number == 5:
            raise RuntimeError("disk on fire")
        return IMAGES[number], 0

    with pytest.raises(UserError, match=r"train\[5\] cannot be read \(RuntimeError: disk on fire\)") as caught:
        read(Items(fail))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES * 1.0, "outside 0..1 (float64), from 0 to 255"),
        (IMAGES / 127.5 - 1, "outside 0..1 (float64), from -1 to 1"),
        (IMAGES * np.nan, "holds NaN (float64)"),
    ],
)
def test_floats_of_another_range_are_refused_with_it(images, message):
    assert message in refusal((images, LABELS))
