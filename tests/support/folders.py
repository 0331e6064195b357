"""What is read of a folder of images, and with which words one is refused."""

from pathlib import Path

import numpy as np
import pytest

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import Dataset, load


def read(path: Path) -> Dataset:
    return load(f"folder:{path}")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def counts(data: Dataset) -> tuple[list[int], list[int], list[int]]:
    """Images of each class in train, validation and test."""
    splits = data.train, data.validation, data.test
    train, held, test = (np.bincount(split.labels, minlength=len(data.classes)).tolist() for split in splits)
    return train, held if sum(held) else [], test


def notes(data: Dataset) -> str:
    return "\n".join(data.notes)
