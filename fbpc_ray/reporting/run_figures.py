"""Draw a run from its files: its images and its metrics over the steps."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fbpc_ray.core.storage import Place
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reporting import image_grids
from fbpc_ray.reporting.charts import steps

FOLLOWED = 10
"""Number of images shown over the steps, the first of each class."""


def followed(images: np.ndarray, labels: Tensor) -> np.ndarray:
    """Return the first image of each class, of at most `FOLLOWED`: (m, c, h, w) -> (k, c, h, w)."""
    _, first = np.unique(labels.numpy(), return_index=True)
    return images[first[:FOLLOWED]]


def over_time(run: RunDirectory, labels: Tensor, classes: tuple[str, ...], title: str) -> bool:
    """Draw the images over the steps. Return False, and draw nothing, for fewer than two steps."""
    history = {step: images.numpy() for step, images in run.history().items()}
    if len(history) < 2:
        return False
    indices = np.unique(labels.numpy())[:FOLLOWED].tolist()
    names = [classes[label] for label in indices]
    if any(len(images) != len(names) for images in history.values()):
        return False
    image_grids.coreset_over_time(history, names, run.over_time_path, title)
    return True


NATS, MAP, SCORE = "nats per image", "steps of the MAP solve", "validation accuracy"
COURSES = (
    ("loss", NATS, (("loss", False),)),
    ("terms of the loss: E_x solid, E_u dashed", NATS, (("expected_x", False), ("expected_u", True))),
    (MAP, "steps", (("map_steps", False),)),
    ("norm of the gradient", "", (("gradient_norm", False),)),
    ("validation NLL", "nats", (("val_nll", False),)),
    (SCORE, "%", (("val_accuracy", False),)),
)
"""Panels: title, unit, columns of metrics.parquet with whether their line is dashed."""


def course(rows: Sequence[Mapping[str, Any]], method: str, path: Place) -> None:
    """Draw loss, its terms, MAP solves and validation scores over the steps; nothing where the rows have none."""
    if courses := courses_of(rows, method):
        steps.over_steps(courses, path, f"{method} over the steps")


def courses_of(rows: Sequence[Mapping[str, Any]], method: str) -> list[steps.Course]:
    """Return what is drawn over the steps, as means over draws."""
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    courses = []
    for title, unit, columns in COURSES:
        lines = [
            (name, *points, dashed)
            for name in names
            for column, dashed in columns
            if (points := _points(rows, name, column, 100.0 if title == SCORE else 1.0))
        ]
        if lines:
            in_nats = unit != NATS or method.startswith(("fbpc", "vbpc"))  # others: of weights, in units of their own
            courses.append(steps.Course(title, unit if in_nats else "", lines, title == MAP))
    return courses


def window_of(courses: Sequence[steps.Course]) -> int:
    """Return the steps over which the longest line is smoothed."""
    return steps.window_of(max(len(at) for course in courses for _, at, _, _ in course.lines))


def _points(
    rows: Sequence[Mapping[str, Any]], name: str, column: str, scale: float
) -> tuple[list[int], list[float]] | None:
    """Return (steps, means over draws) of a column for one network; None without finite values."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        value = row.get(column)
        if row["architecture"] == name and isinstance(value, int | float) and math.isfinite(value):
            by_step.setdefault(row["step"], []).append(scale * float(value))
    steps = sorted(by_step)
    return (steps, [statistics.fmean(by_step[step]) for step in steps]) if steps else None
