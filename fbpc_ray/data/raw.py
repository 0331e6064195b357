"""`RawDataset`, which every reader returns: decoded images as whole arrays; and the helpers that readers share."""

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fbpc_ray.core.errors import UserError

SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
"""Name of a folder, or first word of a parquet file's name (lower case) -> the split that it holds."""

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
"""What PIL may take a file for, whatever its name: it would run Ghostscript, a program of its own, on PostScript."""


class RawSplit(NamedTuple):
    """One split as it lies in the files."""

    images: np.ndarray
    """(n, c, h, w) uint8, C-contiguous, n >= 1."""
    labels: np.ndarray
    """(n,) int64, not yet checked against the classes."""
    place: Callable[[int], str]
    """Index of an image -> where it comes from, for messages: 'train-0.parquet, row 7'."""


class RawDataset(NamedTuple):
    """All that a reader found."""

    origin: str
    """Path or name, for messages."""
    classes: tuple[str, ...] | None
    """Class names in label order; None when the source names none."""
    parts: dict[str, RawSplit]
    """'train' always; 'validation' and 'test' where the source has them."""
    notes: tuple[str, ...] = ()


def decode(files: Iterable[bytes | None], count: int, place: Callable[[int], str]) -> np.ndarray:
    """`count` encoded images -> (count, 3, h, w) uint8; all of one size, grey ones turned to RGB."""
    images = np.empty((0, 3, 0, 0), np.uint8)
    for index, data in enumerate(files):
        try:
            pixels = _rgb(data)
        except Exception as error:  # a decoder fails in any way on damaged bytes
            raise UserError(f"{place(index)}: not a readable image ({line(error)}); mend or remove it") from error
        if index == 0:
            images = np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise UserError(
                f"{place(index)}: the image is {size(pixels)}, the first one ({place(0)}) is {size(images)}; "
                "all images must have one size; docs/faq.md says how to resize them"
            )
        images[index] = pixels
    return images


def _rgb(data: bytes | None) -> np.ndarray:
    """One encoded image -> (3, h, w) uint8. PIL in one thread takes 0.08 ms for 32x32; threads don't help."""
    if data is None:
        raise ValueError("no image bytes")
    with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode}, only 8 bits a channel are supported")
        if image.mode == "P":  # a palette may hold transparency, which only RGBA takes without a warning
            image = image.convert("RGBA")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)


def size(images: np.ndarray) -> str:
    """'32x32' (width x height), with the channels where they aren't three."""
    channels, height, width = images.shape[-3:]
    return f"{width}x{height}" + (f" with {channels} channel(s)" if channels != 3 else "")


def line(error: Exception) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def listed(names: Iterable[Path | str]) -> str:
    """The first few names, for messages."""
    names = [name.name if isinstance(name, Path) else name for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
