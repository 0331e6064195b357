"""Convert arrays, tensors or a map-style torch Dataset to a reader's `RawDataset`."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.conversion import to_split, to_uint8
from fbpc_ray.data.images import check_depth, to_rgb
from fbpc_ray.data.labels import number_names
from fbpc_ray.data.raw import RawDataset, line
from fbpc_ray.data.resize import UNCHANGED, Resizing, Sizes, resized_arrays, resized_dataset

ORIGIN = "the data given"


def read(
    train: Any, test: Any = None, validation: Any = None, classes: Sequence[str] | None = None,
    resizing: Resizing = UNCHANGED,
) -> RawDataset:  # fmt: skip
    """Read up to three splits, each (images, labels) or a torch Dataset of (image, label). Raises UserError.

    Args:
        train: images are a tensor (n, c, h, w) or (n, h, w), or an array as in an npz file: NHWC, NCHW or NHW. An image
            of a Dataset is a tensor (c, h, w) or (h, w), or a PIL image or an array (h, w, c) or (h, w). Pixels are
            integers in 0..255, or floats in 0..1, which become 8 bits. Labels are integers, names or one-hot rows.
        classes: names of the classes, else those that the Dataset has, else numbers.
        resizing: with a size, a Dataset or a list may hold images of several sizes.
    """
    splits = {"train": train, "validation": validation, "test": test}
    raw_splits = {split: _arrays(split, data, resizing) for split, data in splits.items() if data is not None}
    names = classes if classes is not None else getattr(train, "classes", None)
    labels, numbered = number_names({split: arrays.labels for split, arrays in raw_splits.items()}, ORIGIN, names)
    parts = {}
    for split, arrays in raw_splits.items():
        keys = f"{split} images", f"{split} labels"
        part = to_split(ORIGIN, keys, arrays.images, labels[split], arrays.channels_first)
        parts[split] = part._replace(notes=(*part.notes, *arrays.notes))
    return resized_dataset(RawDataset(ORIGIN, numbered, parts), resizing)


class _Arrays(NamedTuple):
    """A split, not yet checked."""

    images: np.ndarray
    labels: np.ndarray
    channels_first: bool
    notes: tuple[str, ...] = ()


def _arrays(split: str, data: Any, resizing: Resizing) -> _Arrays:
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_list_of_pairs(data):
        images, labels = data
        if not (resizing.size and isinstance(images, tuple | list)):
            where, first = f"{ORIGIN}: {split}", isinstance(images, Tensor)
            return _Arrays(_to_array(images, f"{where} images"), _to_array(labels, f"{where} labels"), first)
        if len(images) != len(labels):
            raise UserError(f"{ORIGIN}: {split} has {len(images)} images, {len(labels)} labels; they must agree")
        data = list(zip(images, labels, strict=True))
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise UserError(
            f"{ORIGIN}: {split} is a {type(data).__name__}; give (images, labels), or a torch Dataset with a length"
        )
    sizes = Sizes(resizing)
    images, labels = _collect(split, data, sizes)
    return _Arrays(images, labels, True, sizes.notes(f"{ORIGIN}, {split}"))


def _is_list_of_pairs(data: Any) -> bool:
    """Return whether two elements are two (image, label) pairs, not the images and the labels."""
    return isinstance(data, list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and np.ndim(_or_none(pair[1])) == 0
        and isinstance(pair[0], Image.Image | Tensor | np.ndarray)
        for pair in data
    )  # fmt: skip


def _or_none(label: Any) -> Any:
    """Return tensors and arrays unchanged, and a 0-dimensional array for a plain value."""
    return label if isinstance(label, Tensor | np.ndarray | list | tuple) else None


def _collect(split: str, data: Any, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Collect all images (n, c, h, w) and labels (n,) of a torch Dataset; resize and count the images by `sizes`."""
    images, labels, dtype = list[np.ndarray](), list[Any](), None
    for index in range(len(data)):
        where = f"{ORIGIN}: {split}[{index}]"
        try:
            image, value = data[index]
            label = _to_label(value)
            if labels and _form(label) != _form(labels[0]):
                raise TypeError(f"got the label {label!r:.40}, the first one is {labels[0]!r:.40}")
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} must be an (image, int label) pair ({line(error)}); convert it") from None
        pixels = _to_array(image, where)
        if pixels.ndim == 3 and not isinstance(image, Tensor):
            pixels = pixels.transpose(2, 0, 1)
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        dtype = pixels.dtype if dtype is None else dtype
        if pixels.dtype != dtype:
            raise UserError(f"{where} is {pixels.dtype}, the first image is {dtype}; all must be of one type")
        if sizes.resizing.size and pixels.ndim == 3:
            sizes.add(pixels.shape[2], pixels.shape[1])
            try:
                pixels = resized_arrays(to_uint8(pixels, where)[None], sizes.resizing)[0]
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
        if pixels.ndim != 3 or (images and pixels.shape != images[0].shape):
            first = f", the first one is {images[0].shape}" if images else ""
            raise UserError(
                f"{where} is an image of {pixels.shape}{first}; all must be (c, h, w) of one size: resize them, such "
                "as by image_size=32"
            )
        images.append(pixels)
        labels.append(label)
    if not images:
        raise UserError(f"{ORIGIN}: {split} is empty; give at least one image of each class")
    return np.stack(images), np.array(labels, np.int64 if isinstance(labels[0], int) else None)


def _form(label: int | str | tuple[float, ...]) -> tuple[type, int]:
    """Return the type of a label, and the length of a row."""
    return type(label), len(label) if isinstance(label, tuple) else 0


def _to_label(value: Any) -> int | str | tuple[float, ...]:
    """Return an integer, a name or a row of numbers. Raises TypeError or ValueError.

    A tensor or an array of one element is its element.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim == 1 and len(value) > 1:
            return tuple(value.tolist())
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
