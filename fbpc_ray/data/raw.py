"""`RawDataset`, the decoded images that every reader returns, and helpers that readers share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fbpc_ray.core.errors import UserError

BAR_DELAY = 5.0
"""Seconds of reading until a terminal shows a bar."""

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for one in Git LFS."""


class RawSplit(NamedTuple):
    """One split as it lies in the files."""

    images: np.ndarray
    """(n, c, h, w) uint8, C-contiguous, n >= 1."""
    labels: np.ndarray
    """(n,) int64, not yet checked against the classes."""
    place: Callable[[int], str]
    """Index of an image -> where it comes from, for messages: 'train-0.parquet, row 7'."""
    notes: tuple[str, ...] = ()


class RawDataset(NamedTuple):
    """All that a reader found."""

    origin: str
    """Path or name, for messages."""
    classes: tuple[str, ...] | None
    """Class names in label order; None when the source names none."""
    parts: dict[str, RawSplit]
    """'train' always; 'validation' and 'test' where the source has them."""
    notes: tuple[str, ...] = ()


def check_is_not_pointer(path: Path, start: bytes) -> None:
    """Raise UserError where a file that begins with `start` is a Git LFS pointer."""
    if start.startswith(LFS_POINTER):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def size(images: np.ndarray) -> str:
    """Describe an image size: '32x32' (width x height), with the channels unless they are three."""
    channels, height, width = images.shape[-3:]
    return f"{width}x{height}" + (f" with {channels} channel(s)" if channels != 3 else "")


def line(error: Exception) -> str:
    """Return an error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
