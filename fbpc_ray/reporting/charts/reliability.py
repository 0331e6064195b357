"""Reliability diagrams: accuracy against confidence, by bins of confidence."""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fbpc_ray.core.storage import Place
from fbpc_ray.reporting.charts.style import (
    BLUE,
    COLUMNS,
    DPI,
    GREY,
    LABEL,
    LONGEST,
    ORANGE,
    SIDE,
    TICK,
    TITLE,
    padded,
    save,
    tidy,
    wrapped,
)


class Bins(Protocol):
    """Sums over examples by bins of equal width over confidence (metrics.PredictiveStats)."""

    @property
    def bin_count(self) -> np.typing.ArrayLike: ...

    @property
    def bin_correct(self) -> np.typing.ArrayLike: ...

    @property
    def bin_confidence(self) -> np.typing.ArrayLike: ...


def reliability_diagram(stats: Mapping[str, Bins], path: Place, title: str = "", images: int = 0) -> None:
    """Write a reliability diagram as PNG: accuracy against confidence, a panel for each label of `stats`.

    A bar is the accuracy of a bin, the dot its mean confidence. The line between them is the calibration error of the
    bin; its mean length, weighted by count, is the ECE in the title. Below: the number of images in each bin.

    Args:
        images: number of images, if several chains scored them and the mean over chains is drawn; 0 for one set.

    Raises:
        ValueError: `stats` is empty.
        OSError: `path` can't be written.
    """
    if not stats:
        raise ValueError("no coreset to draw")
    rows, columns = math.ceil(len(stats) / COLUMNS), min(len(stats), COLUMNS)
    figure = Figure(figsize=(SIDE * columns + 0.6, 4.4 * rows + 0.6), dpi=DPI, layout="constrained")
    padded(figure)
    if title:
        figure.suptitle(wrapped(title, 2 * LONGEST * columns), fontsize=TITLE + 1, parse_math=False)
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=(3, 1) * rows)
    most = 0.0
    for index, (label, bins) in enumerate(stats.items()):
        row, column = divmod(index, columns)
        most = max(
            most, _panel(grid[2 * row, column], grid[2 * row + 1, column], label, bins, images, first=column == 0)
        )
    for index in range(len(stats), rows * columns):
        row, column = divmod(index, columns)
        grid[2 * row, column].remove()
        grid[2 * row + 1, column].remove()
    for lower in (grid[2 * (index // columns) + 1, index % columns] for index in range(len(stats))):
        lower.set_ylim(0, 1.05 * most)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=TICK, frameon=False)
    save(figure, path)


def _panel(upper: Axes, lower: Axes, label: str, stats: Bins, images: int, first: bool) -> float:
    """Draw the panel of one coreset; return the largest number of images in a bin."""
    count, correct, confidence = (
        np.asarray(sums, np.float64) for sums in (stats.bin_count, stats.bin_correct, stats.bin_confidence)
    )
    total = count.sum()
    if not total:
        raise ValueError(f"{label}: no example was scored")
    width, full = 1 / len(count), count > 0
    centres = (np.arange(len(count)) + 0.5)[full] * width
    accuracy, mean = correct[full] / count[full], confidence[full] / count[full]
    ece = np.abs(correct - confidence).sum() / total

    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
    upper.bar(centres, accuracy, width, color=BLUE, alpha=0.55, edgecolor="white", linewidth=0.6, label="accuracy")
    upper.vlines(mean, np.minimum(accuracy, mean), np.maximum(accuracy, mean), color=ORANGE, linewidth=1.6, label="gap")
    upper.plot(mean, mean, "o", color=ORANGE, markersize=3, clip_on=False, zorder=3)
    upper.set(xlim=(0, 1), ylim=(0, 1), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    heading = f"{wrapped(label, LONGEST)}\nECE {100 * ece:.1f} %, accuracy {100 * correct.sum() / total:.1f} %"
    upper.set_title(heading, fontsize=TITLE, parse_math=False)

    upper.tick_params(labelbottom=False)
    chains = round(total / images) if images else 1
    count = count / chains
    lower.bar(centres, count[full], width, color=GREY, alpha=0.6, edgecolor="white", linewidth=0.6)
    lower.set(xlim=(0, 1), xticks=np.linspace(0, 1, 6))
    lower.locator_params(axis="y", nbins=3, integer=True)
    over = f", mean of {chains} chains" if chains > 1 else ""
    lower.set_xlabel(f"confidence (n = {round(total / chains):,} images{over})", fontsize=LABEL)
    if first:
        upper.set_ylabel("accuracy", fontsize=LABEL)
        lower.set_ylabel("images", fontsize=LABEL)
    tidy(upper)
    tidy(lower)
    return float(count.max())
