"""`api.dataset`: images and labels in the forms that users have, splits, sizes, and wrong input."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import silent
from torch.utils.data import TensorDataset

from fbpc_ray import api
from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import Dataset


def test_images_of_several_sizes_and_a_share_of_tests(tmp_path, digits):
    """`image_size`, `resize` and a share as `test`, for names as for images; errors name the arguments."""
    images = [Image.fromarray(image[0]).resize((9 + n % 3, 8)) for n, image in enumerate(digits.train.images[:40])]
    labels = [f"class {n % 2}" for n in range(40)]
    mixed = list(zip(images, labels, strict=True))
    data = api.dataset(mixed, test=0.25, image_size=6, log=silent)
    assert (data.image_shape, data.classes) == ((1, 6, 6), ("class 0", "class 1"))
    assert np.bincount(data.test.labels).tolist() == [5, 5]
    other = api.dataset(mixed, test=0.25, image_size=6, resize="stretch", log=silent)
    assert other.fingerprint != data.fingerprint
    assert api.dataset("digits", image_size=6, log=silent).image_shape == (1, 6, 6)
    for number, (image, label) in enumerate(mixed):
        (tmp_path / label).mkdir(exist_ok=True)
        image.save(tmp_path / label / f"{number}.png")
    assert len(api.dataset(f"folder:{tmp_path}", test=0.5, image_size=6, log=silent).test.labels) == 20
    with pytest.raises(UserError, match="resize them, such as by image_size=32"):
        api.dataset(f"folder:{tmp_path}", log=silent)
    with pytest.raises(UserError, match="only parquet:PATH has columns"):
        api.dataset(mixed, label_column="label", log=silent)


def pairs(digits: Dataset, kind: str) -> Any:
    """The first 60 training images in one of the forms that are taken."""
    images, labels = digits.train.images[:60], digits.train.labels[:60]
    if kind == "tensors":
        return torch.tensor(images), torch.tensor(labels)
    if kind == "grey arrays":
        return images[:, 0], labels.astype(np.int32)
    if kind == "channels last":
        return images.transpose(0, 2, 3, 1), labels
    if kind == "floats":
        return images / 255, labels
    if kind == "TensorDataset":
        return TensorDataset(torch.tensor(images) / 255, torch.tensor(labels))
    return [(Image.fromarray(image[0]), int(label)) for image, label in zip(images, labels, strict=True)]


@pytest.mark.parametrize("kind", ["tensors", "grey arrays", "channels last", "floats", "TensorDataset", "pictures"])
def test_own_data_in_any_form_are_the_same_data(digits, kind):
    source = pairs(digits, kind)
    result = api.dataset(source, pairs(digits, "tensors"), classes=digits.classes, log=silent)
    assert result.train.images.dtype == np.uint8
    assert np.array_equal(result.train.images, digits.train.images[:60])
    assert np.array_equal(result.train.labels, digits.train.labels[:60])
    assert result.train.labels.dtype == np.int64
    assert result.classes == digits.classes


def test_own_data_without_a_test_split_hold_one_out_and_say_so(digits):
    lines: list[str] = []
    result = api.dataset(pairs(digits, "tensors"), validation=0.25, log=lines.append)
    assert len(result.train.labels) + len(result.validation.labels) + len(result.test.labels) == 60
    assert 8 <= len(result.test.labels) <= 15
    assert len(result.validation.labels)
    assert "serve as test" in lines[0]
    assert result.classes == tuple("0123456789")


def test_channels_of_a_tensor_come_first_whatever_their_number(digits):
    images = torch.tensor(digits.train.images[:60]).repeat(1, 4, 1, 1)
    result = api.dataset((images, digits.train.labels[:60]), log=silent)
    assert result.image_shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: api.dataset(3), "is a int"),
        (lambda data: api.dataset((data.train.images, data.train.labels[:5])), "they must agree"),
        (lambda data: api.dataset((data.train.images / 3.0, data.train.labels)), "outside 0..1"),
        (lambda data: api.dataset([(1, 2, 3)] * 4), "must be an .image, int label. pair"),
        (lambda data: api.dataset("digits", (1, 2)), "brings its test images"),
    ],
)
def test_wrong_data_is_one_line(digits, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(digits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", [True, False])
def test_splits_are_drawn_with_the_seed(digits, named):
    """Names as images: the same seed draws the same ones, of each class, and another seed others."""

    def drawn(seed: int) -> Dataset:
        source = "digits" if named else (digits.train.images, digits.train.labels)
        return api.dataset(source, validation=0.2, seed=seed, log=silent)

    one, same, other = drawn(3), drawn(3), drawn(4)
    assert np.array_equal(one.validation.images, same.validation.images)
    assert not np.array_equal(one.validation.images, other.validation.images)
    assert len(one.validation.labels) == len(other.validation.labels) > 200
    assert one.fingerprint == same.fingerprint != other.fingerprint
