"""Image data that is in memory already: arrays, tensors, or any map-style torch Dataset, as a reader's `RawDataset`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.raw import RawDataset, RawSplit
from fbpc_ray.data.readers import arrays

ORIGIN = "the data given"


def read(train: Any, test: Any = None, validation: Any = None, classes: Sequence[str] | None = None) -> RawDataset:
    """The data of up to three splits, each (images, labels) or a torch Dataset of (image, label). Raises UserError.

    images are a tensor (n, c, h, w) or (n, h, w), or an array as in an npz file: NHWC, NCHW or NHW. An image of a
    Dataset is a tensor (c, h, w) or (h, w), or a PIL image or an array (h, w, c) or (h, w). Pixels are uint8 or floats
    in 0..1, which become 8 bits. Names of the classes are `classes`, else those that the Dataset has, else numbers.
    """
    given = {"train": train, "validation": validation, "test": test}
    parts = {split: _part(split, each) for split, each in given.items() if each is not None}
    names = classes if classes is not None else getattr(train, "classes", None)
    return RawDataset(ORIGIN, tuple(map(str, names)) if names is not None else None, parts)


def _part(split: str, given: Any) -> RawSplit:
    keys = f"{split} images", f"{split} labels"
    if isinstance(given, tuple | list) and len(given) == 2:
        images, labels = given
        return arrays(ORIGIN, keys, _array(images), _array(labels), channels_first=isinstance(images, Tensor))
    if not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        raise UserError(
            f"{ORIGIN}: {split} is a {type(given).__name__}; give (images, labels), or a torch Dataset with a length"
        )
    return arrays(ORIGIN, keys, *_collected(split, given), channels_first=True)


def _collected(split: str, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """All images (n, c, h, w) and labels (n,) of a torch Dataset."""
    images, labels = [], []
    for index in range(len(data)):
        where = f"{ORIGIN}: {split}[{index}]"
        try:
            image, label = data[index]
            label = int(label)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} is no pair of an image and a whole number ({error}); give such") from None
        pixels = _array(image)
        if pixels.ndim == 3 and not isinstance(image, Tensor):
            pixels = pixels.transpose(2, 0, 1)
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or (images and pixels.shape != images[0].shape):
            first = f", the first one is {images[0].shape}" if images else ""
            raise UserError(f"{where} is an image of {pixels.shape}{first}; all must be (c, h, w) of one size")
        images.append(pixels)
        labels.append(label)
    if not images:
        raise UserError(f"{ORIGIN}: {split} is empty; give at least one image of each class")
    return np.stack(images), np.array(labels)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Image.Image) and value.mode not in ("L", "RGB"):
        value = value.convert("RGB")
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
