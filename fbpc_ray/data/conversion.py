"""Convert arrays of images and labels, from npz files or Python, to a checked split."""

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.labels import from_one_hot
from fbpc_ray.data.raw import RawSplit


def to_split(
    origin: str, keys: tuple[str, str], images: np.ndarray, labels: np.ndarray, channels_first: bool = False
) -> RawSplit:
    """Convert arrays that `origin` calls by the names `keys`; images NHWC, NCHW or NHW, or known to be NCHW or NHW."""
    if images.ndim not in (3, 4):
        raise UserError(f"{origin}: {keys[0]} has shape {images.shape}; it must be NHWC, NCHW or NHW")
    notes = ()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if (numbers := from_one_hot(labels)) is not None:
        notes = (f"{origin}: {keys[1]} are one-hot, read as the numbers of {labels.shape[1]} classes",)
        labels = numbers
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{origin}: {keys[1]} is {labels.dtype} {labels.shape}; it must be integers, one per image, or names, or "
            "one-hot rows"
        )
    if len(images) != len(labels) or not len(labels):
        raise UserError(
            f"{origin}: {keys[0]} has {len(images)} images, {keys[1]} {len(labels)} labels; they must agree"
        )
    where = f"{origin}: {keys[0]}"
    return RawSplit(
        _channels_first(to_uint8(images, where), where, channels_first),
        _to_int64(labels, f"{origin}: {keys[1]}"),
        lambda index: f"{origin}, {keys[1]}[{index}]",
        notes,
    )


def _to_int64(labels: np.ndarray, where: str) -> np.ndarray:
    if labels.dtype.kind == "u" and labels.max() > np.iinfo(np.int64).max:
        raise UserError(f"{where} holds {labels.max()}; labels must run from 0 without gaps")
    return labels.astype(np.int64)


def to_uint8(images: np.ndarray, where: str) -> np.ndarray:
    """Convert integers in 0..255, or floats in [0, 1], to 8 bits. Raises UserError for other values."""
    if images.dtype == np.uint8:
        return images
    floating = np.issubdtype(images.dtype, np.floating)
    top = 1 if floating else 255
    if not (floating or np.issubdtype(images.dtype, np.integer)) or not images.size:
        raise UserError(f"{where} is {images.dtype} {images.shape}; save uint8, or floats in [0, 1]")
    if not (images.min() >= 0 and images.max() <= top):  # also true for NaN
        raise UserError(f"{where} holds values outside 0..{top} ({images.dtype}); save uint8, or floats in [0, 1]")
    return np.rint(images * 255.0).astype(np.uint8) if floating else images.astype(np.uint8)


def _channels_first(images: np.ndarray, where: str, known: bool) -> np.ndarray:
    if images.ndim == 3 or known:
        return np.ascontiguousarray(images[:, None] if images.ndim == 3 else images)
    last, first = (images.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first or not images.size:
        why = "could be NHWC and NCHW" if last else "is not NHWC, NCHW (1 or 3 channels) or NHW"
        raise UserError(f"{where} of shape {images.shape} {why}; save it as NHW, or with 1 or 3 channels")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if last else images)
