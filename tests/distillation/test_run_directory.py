"""The images that a run directory remembers, for the picture of the coreset over the steps."""

import pytest
import torch

from fbpc_ray.distillation import run_directory
from fbpc_ray.distillation.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    monkeypatch.setattr(run_directory, "REMEMBERED", 4)
    return RunDirectory(tmp_path)


def remember(run: RunDirectory, *steps: int) -> list[int]:
    """Remember an image of each step's level; return the steps remembered then, each with its own image."""
    for step in steps:
        run.remember(step, torch.full((2, 1, 3, 3), step, dtype=torch.uint8))
    history = run.history()
    assert all((images == step).all() for step, images in history.items())
    return list(history)


def test_every_other_step_is_dropped_where_there_are_too_many_but_never_the_first(run):
    assert remember(run, 0, 5, 10, 15) == [0, 5, 10, 15]
    assert remember(run, 20) == [0, 10, 20]
    assert remember(run, 25, 30) == [0, 20, 30]


def test_a_run_that_goes_back_forgets_the_steps_after(run):
    """It resumed from an earlier checkpoint; the images of those steps are another process's."""
    remember(run, 0, 5, 10)
    assert remember(run, 4) == [0, 4]
    assert remember(run, 4) == [0, 4]


def test_images_of_another_shape_are_forgotten(run):
    remember(run, 0, 5)
    run.remember(10, torch.zeros(3, 1, 3, 3, dtype=torch.uint8))
    assert list(run.history()) == [10]
