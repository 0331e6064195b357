"""Resize images to a square by Pillow's bicubic filter, which is antialiased; 8 bits in, 8 bits out.

crop      the short side becomes --image-size, the middle of the long side stays (as torchvision's Resize and
          CenterCrop on a PIL image, to the bit)
stretch   both sides become --image-size
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.raw import RawDataset

MAX_SIZE = 4096
MAX_RATIO = 50
"""Long side / short side from which `crop` refuses an image: the rest of it would take memory without use."""
MODES = ("crop", "stretch")


class SeveralSizes(UserError):
    """Images of several sizes, which the reader was not asked to resize."""


class Resizing(NamedTuple):
    """How images are resized."""

    size: int = 0
    """Side of the square; 0: images stay as they are."""
    mode: str = "crop"

    def check(self) -> None:
        """Raise UserError for values that no images can be resized by."""
        if not 0 <= self.size <= MAX_SIZE:
            raise UserError(f"--image-size {self.size}: must be 0 (as the images are) to {MAX_SIZE}")
        if self.mode not in MODES:
            raise UserError(f"--resize {self.mode}: must be one of {', '.join(MODES)}")
        if self.mode != "crop" and not self.size:
            raise UserError(f"--resize {self.mode} needs a size: add --image-size 32")


UNCHANGED = Resizing()


def resized(image: Image.Image, resizing: Resizing) -> Image.Image:
    """Resize an image of mode RGB or L. Raises ValueError for an image that is too long to crop."""
    size, (width, height) = resizing.size, image.size
    if not size or (width, height) == (size, size):
        return image
    if resizing.mode == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    short, long = sorted((width, height))
    if long > MAX_RATIO * short:
        raise ValueError(f"{width}x{height}, too long to crop; --resize stretch takes it")
    scaled = [int(size * side / short) for side in (width, height)]
    left, top = (round((side - size) / 2) for side in scaled)
    image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def resized_arrays(images: np.ndarray, resizing: Resizing) -> np.ndarray:
    """Resize images (n, c, h, w) uint8 to (n, c, size, size). Raises ValueError as `resized`."""
    if not resizing.size or images.shape[2:] == (resizing.size, resizing.size):
        return images
    result = np.empty((*images.shape[:2], resizing.size, resizing.size), np.uint8)
    for image, target in zip(images, result, strict=True):
        if len(image) == 3:
            target[:] = np.asarray(resized(Image.fromarray(image.transpose(1, 2, 0)), resizing)).transpose(2, 0, 1)
            continue
        for channel, plane in zip(image, target, strict=True):
            plane[:] = np.asarray(resized(Image.fromarray(channel), resizing))
    return result


class Sizes:
    """Sizes of the images of a split before they are resized."""

    def __init__(self, resizing: Resizing):
        self.resizing, self.counts = resizing, Counter[tuple[int, int]]()

    def add(self, width: int, height: int, count: int = 1) -> None:
        """Count an image."""
        self.counts[width, height] += count

    def notes(self, origin: str) -> tuple[str, ...]:
        """Return a note on what was resized; none where every image had the size."""
        side = self.resizing.size
        if not side or set(self.counts) <= {(side, side)}:
            return ()
        ordered = sorted(self.counts, key=lambda size: (size[0] * size[1], size))
        texts = [f"{width}x{height}" for width, height in (ordered[0], ordered[-1])]
        sizes = f"size {texts[0]}" if len(ordered) == 1 else f"{len(ordered)} sizes, {texts[0]} to {texts[1]}"
        way = "short side, then centre crop" if self.resizing.mode == "crop" else "stretched"
        enlarged = sum(count for size, count in self.counts.items() if min(size) < side)
        larger = f"; {enlarged:,} of them were smaller" if enlarged else ""
        return (f"{origin}: {self.counts.total():,} images of {sizes}, resized to {side}x{side} ({way}){larger}",)


def resized_dataset(source: RawDataset, resizing: Resizing) -> RawDataset:
    """Resize the images of a data set, each split of one size, with a note. Raises UserError."""
    parts = {}
    for split, part in source.parts.items():
        sizes, (count, _, height, width) = Sizes(resizing), part.images.shape
        sizes.add(width, height, count)
        try:
            images = resized_arrays(part.images, resizing)
        except ValueError as error:
            raise UserError(f"{part.place(0)}: {error}") from None
        parts[split] = part._replace(images=images, notes=(*part.notes, *sizes.notes(f"{source.origin}, {split}")))
    return source._replace(parts=parts)
