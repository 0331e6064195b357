"""Convert arrays, tensors or a map-style torch Dataset to a reader's `RawDataset`."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.conversion import to_split
from fbpc_ray.data.images import check_depth, to_rgb
from fbpc_ray.data.raw import RawDataset, RawSplit, line

ORIGIN = "the data given"


def read(train: Any, test: Any = None, validation: Any = None, classes: Sequence[str] | None = None) -> RawDataset:
    """Read up to three splits, each (images, labels) or a torch Dataset of (image, label). Raises UserError.

    Args:
        train: images are a tensor (n, c, h, w) or (n, h, w), or an array as in an npz file: NHWC, NCHW or NHW. An image
            of a Dataset is a tensor (c, h, w) or (h, w), or a PIL image or an array (h, w, c) or (h, w). Pixels are
            integers in 0..255, or floats in 0..1, which become 8 bits. Labels are integers.
        classes: names of the classes, else those that the Dataset has, else numbers.
    """
    splits = {"train": train, "validation": validation, "test": test}
    parts = {split: _part(split, data) for split, data in splits.items() if data is not None}
    names = classes if classes is not None else getattr(train, "classes", None)
    return RawDataset(ORIGIN, tuple(map(str, names)) if names is not None else None, parts)


def _part(split: str, data: Any) -> RawSplit:
    keys = f"{split} images", f"{split} labels"
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_list_of_pairs(data):
        images, labels = (_to_array(values, f"{ORIGIN}: {key}") for key, values in zip(keys, data, strict=True))
        return to_split(ORIGIN, keys, images, labels, channels_first=isinstance(data[0], Tensor))
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise UserError(
            f"{ORIGIN}: {split} is a {type(data).__name__}; give (images, labels), or a torch Dataset with a length"
        )
    return to_split(ORIGIN, keys, *_collect(split, data), channels_first=True)


def _is_list_of_pairs(data: Any) -> bool:
    """Whether two elements are two (image, label) pairs, not the images and the labels."""
    return isinstance(data, list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and np.ndim(_or_none(pair[1])) == 0
        and isinstance(pair[0], Image.Image | Tensor | np.ndarray)
        for pair in data
    )  # fmt: skip


def _or_none(label: Any) -> Any:
    """A 0-dimensional stand-in for a plain value; tensors and arrays as they are."""
    return label if isinstance(label, Tensor | np.ndarray | list | tuple) else None


def _collect(split: str, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Collect all images (n, c, h, w) and labels (n,) of a torch Dataset."""
    images, labels = list[np.ndarray](), list[int]()
    for index in range(len(data)):
        where = f"{ORIGIN}: {split}[{index}]"
        try:
            image, value = data[index]
            label = _to_label(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} must be an (image, int label) pair ({line(error)}); convert it") from None
        pixels = _to_array(image, where)
        if pixels.ndim == 3 and not isinstance(image, Tensor):
            pixels = pixels.transpose(2, 0, 1)
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or (images and pixels.shape != images[0].shape):
            first = f", the first one is {images[0].shape}" if images else ""
            raise UserError(f"{where} is an image of {pixels.shape}{first}; all must be (c, h, w) of one size")
        if images and pixels.dtype != images[0].dtype:
            raise UserError(f"{where} is {pixels.dtype}, the first image is {images[0].dtype}; all must be of one type")
        images.append(pixels)
        labels.append(label)
    if not images:
        raise UserError(f"{ORIGIN}: {split} is empty; give at least one image of each class")
    return np.stack(images), np.array(labels, np.int64)


def _to_label(value: Any) -> int:
    """Return an integer, or the only element of an integer tensor or array. Raises TypeError or ValueError."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.item()
    label = operator.index(value)
    if abs(label) > np.iinfo(np.int64).max:
        raise ValueError(f"label {label} is too large")
    return label


def _to_array(value: Any, where: str) -> np.ndarray:
    """Convert a tensor, PIL image or array. Raises UserError for what has no plain numbers of 8 bits or floats."""
    try:
        if isinstance(value, Image.Image):
            check_depth(value)
            return np.asarray(value if value.mode == "L" else to_rgb(value))
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: cannot be read ({line(error)}); give uint8, or floats in [0, 1]") from None
