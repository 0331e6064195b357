"""What is read of a folder of images, and with which words one is refused."""

from functools import partial
from pathlib import Path

import numpy as np
from support import errors

from fbpc_ray.data.datasets import Dataset, load


def read(path: Path) -> Dataset:
    return load(f"folder:{path}")


refusal = partial(errors.refusal, read)
"""The line that refuses what `read` is given."""


def counts(data: Dataset) -> tuple[list[int], list[int], list[int]]:
    """Images of each class in train, validation and test."""
    splits = data.train, data.validation, data.test
    train, held, test = (np.bincount(split.labels, minlength=len(data.classes)).tolist() for split in splits)
    return train, held if sum(held) else [], test


def notes(data: Dataset) -> str:
    return "\n".join(data.notes)
