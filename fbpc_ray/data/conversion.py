"""Convert arrays of images and labels, from npz files or Python, to a checked split."""

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.raw import RawSplit

MOST_CHANNELS = 4
"""A tensor with more channels than this, and a last axis of 1 or 3, has its channels last."""


def to_split(
    origin: str, keys: tuple[str, str], images: np.ndarray, labels: np.ndarray, channels_first: bool = False
) -> RawSplit:
    """Convert arrays that `origin` calls by the names `keys`; images NHWC, NCHW or NHW, or known to be NCHW or NHW."""
    where, where_labels = f"{origin}: {keys[0]}", f"{origin}: {keys[1]}"
    if images.ndim not in (3, 4):
        raise UserError(f"{where} has shape {images.shape}; it must be NHWC, NCHW or NHW")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{where_labels} is {labels.dtype} {labels.shape}; it must be integers, one per image, or names, or "
            "one-hot rows"
        )
    if len(images) != len(labels):
        raise UserError(f"{where} has {len(images)} images, {keys[1]} {len(labels)} labels; they must agree")
    if not len(images):
        raise UserError(f"{where} is empty; add images, or leave out this split")
    return RawSplit(
        _channels_first(to_uint8(images, where), where, channels_first),
        _to_int64(labels, where_labels),
        lambda index: f"{origin}, {keys[1]}[{index}]",
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
    low, high = images.min(), images.max()
    if np.isnan(low):
        raise UserError(f"{where} holds NaN ({images.dtype}); replace it")
    if low < 0 or high > top:
        raise UserError(
            f"{where} holds values outside 0..{top} ({images.dtype}), from {low:g} to {high:g}; save uint8, or floats "
            "in [0, 1]"
        )
    return np.rint(images * 255.0).astype(np.uint8) if floating else images.astype(np.uint8)


def check_channels_first(shape: tuple[int, ...], where: str) -> None:
    """Raise UserError for a shape (..., c, h, w) of images whose channels are last."""
    if shape[-1] in (1, 3) and shape[-3] > MOST_CHANNELS:
        raise UserError(
            f"{where} of shape {shape} would be images of {shape[-3]} channels: the channels of a tensor come before "
            "height and width; permute it"
        )


def _channels_first(images: np.ndarray, where: str, known: bool) -> np.ndarray:
    if images.ndim == 3:
        return np.ascontiguousarray(images[:, None])
    if known:
        check_channels_first(images.shape, where)
        return np.ascontiguousarray(images)
    last, first = (images.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first or not images.size:
        why = "could be NHWC and NCHW" if last else "is not NHWC, NCHW (1 or 3 channels) or NHW"
        raise UserError(f"{where} of shape {images.shape} {why}; save it as NHW, or with 1 or 3 channels")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if last else images)
