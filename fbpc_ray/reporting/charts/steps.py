"""Metrics over the steps of a distillation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fbpc_ray.core.storage import Place
from fbpc_ray.reporting.charts.style import (
    DPI,
    LABEL,
    LONGEST,
    NAME,
    TICK,
    TITLE,
    ending,
    line_style,
    padded,
    save,
    tidy,
    wrapped,
)


class Course(NamedTuple):
    """One quantity over the steps."""

    title: str
    unit: str
    lines: Sequence[tuple[str, Sequence[float], Sequence[float], bool]]
    """(label, steps, values, dashed). Lines of one label, in one panel or several, have one colour."""
    counts: bool = False
    """Whether values are whole numbers from 0 up."""


DENSE = 50
"""Points from which a line is smoothed by its mean over a window, with the unsmoothed line faint behind it."""


def over_steps(courses: Sequence[Course], path: Place, title: str = "") -> None:
    """Write a PNG with a panel for each course, two side by side.

    Raises:
        ValueError: there is no course, or one without lines.
        OSError: `path` can't be written.
    """
    if not courses or not all(course.lines for course in courses):
        raise ValueError("no values to draw")
    columns = min(2, len(courses))
    rows = math.ceil(len(courses) / columns)
    figure = Figure(figsize=(4.3 * columns, 2.7 * rows + 0.6), dpi=DPI, layout="constrained")
    padded(figure)
    if title:
        figure.suptitle(wrapped(title, LONGEST * columns + 10), fontsize=TITLE + 1, parse_math=False)
    labels = list(dict.fromkeys(label for course in courses for label, *_ in course.lines))
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, course in enumerate(courses):
        axes = grid[divmod(index, columns)]
        for label, steps, values, dashed in course.lines:
            _line(axes, labels.index(label), steps, values, dashed)
        axes.set_title(wrapped(course.title, LONGEST + 10), fontsize=TITLE, parse_math=False)
        axes.set_ylabel(course.unit, fontsize=LABEL)
        axes.set_xlabel("step", fontsize=LABEL)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.locator_params(axis="y", nbins=5, integer=course.counts)
        if course.counts:
            axes.set_ylim(0, None)
        tidy(axes)
    for index in range(len(courses), rows * columns):
        grid[divmod(index, columns)].remove()
    handles = [Line2D([], [], linewidth=1.8, **line_style(index)) for index in range(len(labels))]
    names = [ending(label, NAME) for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=2 * columns, fontsize=TICK, frameon=False)
    save(figure, path)


def _line(axes: Axes, index: int, steps: Sequence[float], values: Sequence[float], dashed: bool) -> None:
    style = line_style(index)
    if dashed:
        style["linestyle"] = "--"
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if len(x) < DENSE:
        axes.plot(x, y, linewidth=1.5, marker="o" if len(x) == 1 else None, markersize=4, **style)
        return
    axes.plot(x, y, linewidth=0.5, alpha=0.22, color=style["color"])
    window = window_of(len(x))
    means = np.convolve(y, np.full(window, 1 / window), "valid")
    axes.plot(np.convolve(x, np.full(window, 1 / window), "valid"), means, linewidth=1.8, **style)


def window_of(points: int) -> int:
    """Return the window, in points, over which a line is smoothed; 1 for a line that is not."""
    return points // 15 if points >= DENSE else 1
