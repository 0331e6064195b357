"""Whitening (ZCA) of coresets that others made: the linear map that test images take too.

    x' = (x - mean) matrix        x (c h w,): an image normalised as the data set is, in the order channel, row, column

A file is .npz with the arrays `mean` (c h w,) and `matrix` (c h w, c h w).
"""

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.types import Batch
from fbpc_ray.data.loader import DeviceDataset


class Whitening(NamedTuple):
    """A linear map of normalised images."""

    mean: np.ndarray
    """(p,) float32, p = c h w."""
    matrix: np.ndarray
    """(p, p) float32."""

    def digest(self) -> str:
        """Return a hash of the values."""
        return hashlib.sha256(self.mean.tobytes() + self.matrix.tobytes()).hexdigest()[:16]


def load(path: Path, image_shape: tuple[int, int, int]) -> Whitening:
    """Read the whitening of images of `image_shape` (c, h, w). Raises UserError for a file that holds none."""
    size = int(np.prod(image_shape))
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, matrix = (np.asarray(archive[name], np.float32) for name in ("mean", "matrix"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; give the .npz file of the whitening") from None
    except Exception as error:  # noqa: BLE001  a damaged file fails in any way
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no whitening ({line}); give an .npz file with the arrays mean and matrix") from None
    mean = mean.reshape(-1)
    if mean.shape != (size,) or matrix.shape != (size, size):
        raise UserError(
            f"{path}: expected mean ({size},) and matrix ({size}, {size}) for images {image_shape}, got {mean.shape} "
            f"and {matrix.shape}; give the whitening of these images"
        )
    if not (np.isfinite(mean).all() and np.isfinite(matrix).all()):
        raise UserError(f"{path}: mean or matrix is not finite; make the file again")
    return Whitening(mean, np.ascontiguousarray(matrix))


def save(whitening: Whitening, path: Path) -> None:
    """Write the whitening, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **whitening._asdict())
    files.write_bytes(path, buffer.getvalue())


class WhitenedDataset(DeviceDataset):
    """Images on the device, normalised, then whitened, batch by batch."""

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], of: Whitening):
        super().__init__(images, labels, mean, std)
        self.map = torch.tensor(of.mean, device=images.device), torch.tensor(of.matrix, device=images.device)

    def batch(self, index: Tensor) -> Batch:
        images, labels = super().batch(index)
        mean, matrix = self.map
        return Batch(((images.flatten(1) - mean) @ matrix).view_as(images), labels)
