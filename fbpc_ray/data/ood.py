"""Out-of-distribution test images: another data set's, as the networks of a data set can see them."""

import numpy as np
import torch

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import Dataset, Split


def check_resize(name: str, resize: bool) -> None:
    """Raise UserError for --ood-resize without --ood, the `name` of a data set."""
    if resize and not name:
        raise UserError("--ood-resize: there is no --ood to resize; add --ood DATA, or leave it out")


def ood_split(dataset: Dataset, other: Dataset, resize: bool = False) -> Split:
    """Return the test images of `other` as a network of `dataset` can see them; all labels are 0.

    Grey images become three channels where `dataset` has three; `resize` brings them to its size (bilinear,
    antialiased). Raises UserError for images of another size without `resize` (how they are resized is part of the
    result), and for coloured images where the networks see grey.
    """
    channels, *size = dataset.image_shape
    images = other.test.images
    if images.shape[1] != channels:
        if (images.shape[1], channels) != (1, 3):
            raise UserError(
                f"{other.name} has images of {images.shape[1]} channels, {dataset.name} of {channels}: "
                "choose out-of-distribution data with as many channels"
            )
        images = images.repeat(3, axis=1)
    if list(images.shape[2:]) != size:
        if not resize:
            raise UserError(
                f"{other.name} has images of {images.shape[2]}x{images.shape[3]}, {dataset.name} of "
                f"{size[0]}x{size[1]}: choose out-of-distribution data of that size, or add --ood-resize"
            )
        images = np.concatenate([_resized(images[at : at + 1024], size) for at in range(0, len(images), 1024)])
    return Split(np.ascontiguousarray(images), np.zeros(len(images), np.int64))


def _resized(images: np.ndarray, size: list[int]) -> np.ndarray:
    """Resize (n, c, h, w) uint8 to (n, c, *size) uint8."""
    pixels = torch.tensor(images, dtype=torch.float32)
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).numpy()
