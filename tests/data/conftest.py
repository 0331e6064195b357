"""A run and a coreset to export, and folders of images."""

import numpy as np
import pytest
import torch
from support.data_files import write_splits
from support.exports import NAMES
from support.runs import distil, flags

from fbpc_ray.core.rng import generator
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, Split


@pytest.fixture(scope="session")
def exported_run(small, tmp_path_factory):
    """Two steps on digits, evaluated by short chains."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    distil(*flags(small, backend="serial", steps=2, ipc=2, out=str(folder)))
    return folder


@pytest.fixture(scope="session")
def colour_data() -> Dataset:
    """Three classes of 5x4 pixels in colour."""
    images = np.zeros((9, 3, 5, 4), np.uint8)
    split = Split(images, np.arange(9) % 3)
    return Dataset("mine", NAMES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), split, split, split, (), "")


@pytest.fixture(scope="session")
def original() -> Coreset:
    """Of another normalisation than the data set's, beyond 0..1, and not in the order of the labels."""
    images = 2 * torch.randn(6, 3, 5, 4, generator=generator(0, "images"))
    return Coreset(images, torch.arange(6) % 3, (1 / 3, 0.1, 0.2), (0.25, 0.3, 0.1), NAMES)


@pytest.fixture
def class_folders(tmp_path):
    """4 train and 3 test images of each of the classes a and b."""
    return write_splits(tmp_path / "good")
