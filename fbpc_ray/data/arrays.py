"""Convert arrays, tensors or a map-style torch Dataset to a reader's `RawDataset`."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.conversion import check_channels_first, to_split, to_uint8
from fbpc_ray.data.images import check_depth, to_rgb, turned_note, upright
from fbpc_ray.data.labels import to_numbers
from fbpc_ray.data.raw import RawDataset, line
from fbpc_ray.data.resize import UNCHANGED, Resizing, Sizes, resized_arrays, resized_dataset

ORIGIN = "the data given"
FORMS = "give (images, labels), or a torch Dataset with a length"


def read(
    train: Any, test: Any = None, validation: Any = None, classes: Sequence[str] | None = None,
    resizing: Resizing = UNCHANGED,
) -> RawDataset:  # fmt: skip
    """Read up to three splits, each (images, labels) or a torch Dataset of (image, label). Raises UserError.

    Args:
        train: images are a tensor (n, c, h, w) or (n, h, w), or an array as in an npz file: NHWC, NCHW or NHW. An image
            of a Dataset or a list is a tensor (c, h, w) or (h, w), a PIL image, which is turned as its EXIF orientation
            says, or an array (h, w, c) or (h, w), or (c, h, w) of 1 or 3 channels. Pixels are integers in 0..255, or
            floats in 0..1, which become 8 bits. Labels are integers, names or one-hot rows.
        classes: names of the classes, else those that the Dataset has, else numbers.
        resizing: with a size, a Dataset or a list may hold images of several sizes.
    """
    if train is None:
        raise UserError(f"{ORIGIN}: train is None; {FORMS}")
    splits = {"train": train, "validation": validation, "test": test}
    raw_splits = {split: _arrays(split, data, resizing) for split, data in splits.items() if data is not None}
    names = classes if classes is not None else getattr(train, "classes", None)
    numbered = to_numbers({split: arrays.labels for split, arrays in raw_splits.items()}, ORIGIN, names)
    parts = {}
    for split, arrays in raw_splits.items():
        keys = f"{split} images", f"{split} labels"
        part = to_split(ORIGIN, keys, arrays.images, numbered.labels[split], arrays.channels_first)
        parts[split] = part._replace(notes=arrays.notes)
    return resized_dataset(RawDataset(ORIGIN, numbered.classes, parts, numbered.notes), resizing)


class _Arrays(NamedTuple):
    """A split, not yet checked."""

    images: np.ndarray
    labels: np.ndarray
    channels_first: bool
    notes: tuple[str, ...] = ()


def _arrays(split: str, data: Any, resizing: Resizing) -> _Arrays:
    where = f"{ORIGIN}: {split}"
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_list_of_pairs(data):
        images, labels = data[0], _to_labels(data[1], f"{where} labels")
        if not isinstance(images, tuple | list):
            return _Arrays(_to_array(images, f"{where} images"), labels, isinstance(images, Tensor))
        collected = _Images(where, resizing)
        for index, image in enumerate(images):
            collected.add(image, f"{where} images[{index}]")
        return _Arrays(collected.stacked(), labels, True, collected.notes())
    return _of_dataset(data, where, resizing)


def _of_dataset(data: Any, where: str, resizing: Resizing) -> _Arrays:
    """Read all (image, label) pairs of a torch Dataset."""
    if isinstance(data, Mapping | str | np.ndarray | Tensor) or not all(
        hasattr(data, name) for name in ("__getitem__", "__len__")
    ):
        raise UserError(f"{where} is a {type(data).__name__}; {FORMS}")
    images, labels = _Images(where, resizing), list[Any]()
    for index in range(len(data)):
        place = f"{where}[{index}]"
        image, label = _pair(data, index, place)
        if labels and _form(label) != _form(labels[0]):
            raise UserError(
                f"{place} must be an (image, int label) pair (got the label {label!r:.40}, the first one is "
                f"{labels[0]!r:.40}); convert it"
            )
        images.add(image, place)
        labels.append(label)
    stacked = images.stacked()
    return _Arrays(stacked, np.array(labels, np.int64 if isinstance(labels[0], int) else None), True, images.notes())


def _pair(data: Any, index: int, place: str) -> tuple[Any, int | str | tuple[float, ...]]:
    """Return an image and its label. Raises UserError for what is no pair, and with any error of the Dataset."""
    try:
        pair = data[index]
    except Exception as error:  # the user's code
        raise UserError(f"{place} cannot be read ({type(error).__name__}: {line(error)}); correct the data") from error
    try:
        if isinstance(pair, Mapping | str | np.ndarray | Tensor):
            raise TypeError(f"it is a {type(pair).__name__}")
        image, label = pair
        return image, _to_label(label)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} must be an (image, int label) pair ({line(error)}); convert it") from None


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


class _Images:
    """Images of a split, collected one by one as (c, h, w) of one size."""

    def __init__(self, where: str, resizing: Resizing):
        self.where, self.sizes, self.arrays, self.turned = where, Sizes(resizing), list[np.ndarray](), 0
        self.dtype: np.dtype | None = None

    def add(self, image: Any, place: str) -> None:
        """Add a tensor (c, h, w), an array (h, w, c) or (c, h, w), a grey one (h, w), or a PIL image."""
        if isinstance(image, Image.Image):
            image, orientation = upright(image)
            self.turned += orientation != 1
        pixels = _planes(_to_array(image, place), isinstance(image, Tensor), place)
        self.dtype = self.dtype or pixels.dtype
        if pixels.dtype != self.dtype:
            raise UserError(f"{place} is {pixels.dtype}, the first image is {self.dtype}; all must be of one type")
        if self.sizes.resizing.size:
            self.sizes.add(pixels.shape[2], pixels.shape[1])
            try:
                pixels = resized_arrays(to_uint8(pixels, place)[None], self.sizes.resizing)[0]
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
        self._check_shape(pixels.shape, place)
        self.arrays.append(pixels)

    def _check_shape(self, shape: tuple[int, ...], place: str) -> None:
        first = self.arrays[0].shape if self.arrays else shape
        if shape[0] != first[0]:
            raise UserError(
                f"{place} is an image of {shape[0]} channels, the first one of {first[0]}; convert all to one mode, "
                "such as by image.convert('RGB')"
            )
        if shape != first:
            raise UserError(
                f"{place} is an image of {shape}, the first one is {first}; all must be (c, h, w) of one size: resize "
                "them, such as by image_size=32"
            )

    def stacked(self) -> np.ndarray:
        """Return all images (n, c, h, w). Raises UserError if there is none."""
        if not self.arrays:
            raise UserError(f"{self.where} is empty; give at least one image of each class")
        return np.stack(self.arrays)

    def notes(self) -> tuple[str, ...]:
        origin = self.where.replace(": ", ", ")
        turned = (turned_note(origin, self.turned, len(self.arrays)),) if self.turned else ()
        return (*turned, *self.sizes.notes(origin))


def _planes(pixels: np.ndarray, is_tensor: bool, place: str) -> np.ndarray:
    """Return one image as (c, h, w)."""
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise UserError(f"{place} is an image of {pixels.shape}; it must be (c, h, w), (h, w, c) or (h, w)")
    if is_tensor:
        check_channels_first(pixels.shape, place)
        return pixels
    channels_first = pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3)
    return pixels if channels_first else pixels.transpose(2, 0, 1)


def _to_labels(values: Any, where: str) -> np.ndarray:
    """Convert labels of a split to an array; names in an array of objects, such as a column of a table, are names."""
    array = _to_array(values, where)
    if array.ndim != 1 or not (array.dtype == object or (array.dtype.kind == "U" and isinstance(values, list | tuple))):
        return array
    items = list(values) if isinstance(values, list | tuple) else array.tolist()
    other = next((index for index, item in enumerate(items) if not isinstance(item, str)), None)
    if other is None:
        return np.array(items, np.str_)
    if any(isinstance(item, str) for item in items):
        raise UserError(f"{where}[{other}] is {items[other]!r:.40}, others are names; use one form")
    return array


def _form(label: int | str | tuple[float, ...]) -> tuple[type, int]:
    """Return the type of a label, and the length of a row."""
    return type(label), len(label) if isinstance(label, tuple) else 0


def _to_label(value: Any) -> int | str | tuple[float, ...]:
    """Return an integer, a name or a row of numbers. Raises TypeError or ValueError.

    A tensor or an array of one element is its element.
    """
    if isinstance(value, str):
        return str(value)
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
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{where}: cannot be read ({line(error)}); give uint8, or floats in [0, 1]") from None
