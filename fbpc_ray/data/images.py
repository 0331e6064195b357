"""Encoded images -> uint8 pixels, upright, in RGB; and which PIL images have no 8 bits per channel."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import progress
from fbpc_ray.data.libtiff import collected_messages
from fbpc_ray.data.raw import BAR_DELAY, LFS_POINTER, line, size
from fbpc_ray.data.resize import UNCHANGED, Resizing, SeveralSizes, Sizes, resized

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
"""What PIL may take a file for, whatever its name: it would run Ghostscript, a program of its own, on PostScript."""

ORIENTATION = 0x0112
"""The EXIF tag: 1 is upright, 2 to 8 are turned or mirrored."""

DARK = 16
"""Level, of 255, that the upper 8 bits of 16 must reach in some image."""


class Pixels(NamedTuple):
    """One decoded image."""

    values: np.ndarray
    """(3, h, w) uint8."""
    orientation: int
    """EXIF orientation that was undone; 1 where there was none."""
    hidden: bool
    """Whether all of the picture is in the transparency: one colour, several alpha values."""
    deep: bool
    """Whether the file has 16 bits per channel, of which the upper 8 are read."""
    size: tuple[int, int]
    """(width, height) before it was resized."""
    damaged: bool = False
    """Whether libtiff printed errors of a file that it could read."""


def decode(
    files: Iterable[bytes | None], count: int, place: Callable[[int], str], origin: str,
    resizing: Resizing = UNCHANGED,
) -> tuple[np.ndarray, tuple[str, ...]]:  # fmt: skip
    """Decode `count` images to (count, 3, h, w) uint8; all of one size or resized, grey ones turned to RGB.

    Returns the images and notes on what `origin` holds. Raises UserError, naming the image.
    """
    sizes = Sizes(resizing)
    images, counts, first = np.empty((0, 3, 0, 0), np.uint8), Counter[str](), 1
    with progress(f"{origin}: images decoded", count, "image", delay=BAR_DELAY) as bar:
        for index, data in enumerate(files):
            try:
                pixels = _decode_one(data, resizing)
            except UnidentifiedImageError as error:
                known = ", ".join(IMAGE_FORMATS)
                raise UserError(
                    f"{place(index)}: not a readable image (its start is missing, or its format is none of {known}); "
                    "fix or remove it"
                ) from error
            except Exception as error:  # a decoder fails in any way on damaged bytes
                raise UserError(f"{place(index)}: not a readable image ({line(error)}); fix or remove it") from error
            if index == 0:
                images, first = np.empty((count, *pixels.values.shape), np.uint8), pixels.orientation
            if pixels.values.shape != images.shape[1:]:
                raise SeveralSizes(
                    f"{place(index)}: the image is {size(pixels.values)}{_turned(pixels.orientation)}, "
                    f"the first one ({place(0)}) is {size(images)}{_turned(first)}; "
                    "all images must have one size: resize them, such as by --image-size 32"
                )
            images[index] = pixels.values
            sizes.add(*pixels.size)
            counts.update(
                turned=pixels.orientation != 1, hidden=pixels.hidden, deep=pixels.deep, damaged=pixels.damaged
            )
            bar.update()
    _refuse_unseen(images, counts, origin)
    return images, (*_notes(counts, count, origin), *sizes.notes(origin))


def _refuse_unseen(images: np.ndarray, counts: Counter[str], origin: str) -> None:
    """Raise UserError where what all images show is in bits that are not read."""
    if not len(images):
        return
    if counts["hidden"] == len(images):
        raise UserError(
            f"{origin}: all images have their picture in the transparency, which is not read; paste the images onto a "
            "background"
        )
    if counts["deep"] == len(images) and images.max() < DARK:
        raise UserError(
            f"{origin}: the images have 16 bits per channel, of which the upper 8 are read and stay below {DARK} of "
            "255; scale the images to 8 bits"
        )


def _notes(counts: Counter[str], count: int, origin: str) -> Iterator[str]:
    """Yield notes on images that are not read as they are."""
    if counts["turned"]:
        yield turned_note(origin, counts["turned"], count)
    texts = {
        "hidden": "have all of their picture in the transparency, which is not read; paste them onto a background",
        "deep": "have 16 bits per channel, of which the upper 8 are read",
        "damaged": "are damaged TIFF files, read as far as they go; look at them",
    }
    yield from (f"{origin}: {counts[key]} of {count} images {text}" for key, text in texts.items() if counts[key])


def check_depth(image: Image.Image) -> None:
    """Raise ValueError where the pixels have no 8 bits per channel: PIL would cut their values off at 255."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode}, only 8 bits per channel are supported")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, without transparency. Raises ValueError as `check_depth`."""
    check_depth(image)
    if image.mode == "P":  # a palette may hold transparency, which only RGBA takes without a warning
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode_one(data: bytes | None, resizing: Resizing) -> Pixels:
    """Decode one image. PIL in one thread takes 0.08 ms for 32x32; threads don't help."""
    if data is None:
        raise ValueError("no image bytes")
    if data.startswith(LFS_POINTER):
        raise ValueError("a Git LFS pointer, not the image: run `git lfs pull` in its repository")
    messages: list[str] = []
    try:
        with collected_messages(data) as messages:
            pixels = _read(data, resizing)
    except Exception as error:
        if messages:
            raise ValueError(f"{line(error)}; {messages[0]}") from error
        raise
    return pixels._replace(damaged=bool(messages))


def _read(data: bytes, resizing: Resizing) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the size is an error
        opened = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
    with opened:
        deep = _has_16_bits(opened)
        opened.load()
        image, orientation = upright(opened)
        rgb = to_rgb(image)
        values = np.asarray(rgb).transpose(2, 0, 1)
        hidden = _is_hidden(image, values)
        if resizing.size:
            values = np.asarray(resized(rgb, resizing)).transpose(2, 0, 1)
        return Pixels(values, orientation, hidden, deep, rgb.size)


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether PIL drops the lower 8 of 16 bits: of RGB alone, grey images have a mode of 16 bits."""
    for tile in getattr(image, "tile", ()):
        values = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if any(isinstance(value, str) and ";16" in value for value in values):
            return True
        if tile.codec_name.startswith("ppm") and isinstance(values[-1], int) and values[-1] > 255:
            return True
    return False


def upright(image: Image.Image) -> tuple[Image.Image, int]:
    """Return the image turned as its EXIF orientation says, and that orientation, 1 for an upright image."""
    orientation = _orientation(image)
    return (image if orientation == 1 else ImageOps.exif_transpose(image)), orientation


def turned_note(origin: str, turned: int, count: int) -> str:
    """Write the note on the images that `upright` turned."""
    return f"{origin}: {turned} of {count} images are turned as their EXIF orientation says"


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  damaged EXIF data: the pixels are whole
        return 1
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def _is_hidden(image: Image.Image, values: np.ndarray) -> bool:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    if not values.size or (values != values[:, :1, :1]).any():
        return False
    low, high = image.convert("RGBA").getchannel("A").getextrema()
    return low != high


def _turned(orientation: int) -> str:
    return f" (turned as its EXIF orientation {orientation} says)" if orientation != 1 else ""
