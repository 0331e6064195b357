"""Charts: metrics over steps, scores as bars and curves, reliability diagrams, entropy histograms.

This file and image_grids.py alone import matplotlib, and only its objects (Figure, Agg), not pyplot.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fbpc_ray.core import files
from fbpc_ray.core.storage import Place
from fbpc_ray.reporting.image_grids import drawable

DPI = 150
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5F5F5F"
"""Blue and vermilion of Okabe and Ito's colour-blind safe palette, and a grey for guides."""
SIDE = 3.1  # inches: width of a panel
COLUMNS = 4  # panels side by side, at most
TITLE, LABEL, TICK = 10.0, 9.0, 8.0  # points
LONGEST = 34  # characters of a title's line
NAME = 22  # characters of a data set's name


class Bins(Protocol):
    """Sums over examples by bins of equal width over confidence (metrics.PredictiveStats)."""

    @property
    def bin_count(self) -> np.typing.ArrayLike: ...

    @property
    def bin_correct(self) -> np.typing.ArrayLike: ...

    @property
    def bin_confidence(self) -> np.typing.ArrayLike: ...


def reliability(stats: Mapping[str, Bins], path: Place, title: str = "", images: int = 0) -> None:
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
    _padded(figure)
    if title:
        figure.suptitle(_wrapped(title, 2 * LONGEST * columns), fontsize=TITLE + 1, parse_math=False)
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
    _save(figure, path)


def entropy_histogram(
    in_distribution: np.ndarray, out_of_distribution: np.ndarray, path: Place, title: str = "",
    classes: int | None = None,
    quantity: str = "predictive entropy", names: tuple[str, str] = ("in distribution", "out of distribution"),
) -> None:  # fmt: skip
    """Write a PNG of `quantity`, in nats, over in-distribution (n,) and other (k,) images.

    Args:
        classes: sets the range to that of an entropy, 0 to log(classes).

    Raises:
        ValueError: an array is empty or not finite.
        OSError: `path` can't be written.
    """
    values = [np.asarray(array, np.float64).ravel() for array in (in_distribution, out_of_distribution)]
    for name, array in zip(names, values, strict=True):
        if not len(array) or not np.isfinite(array).all():
            raise ValueError(f"{name}: must be 1 or more finite values, got {len(array)}")
    top = max(math.log(classes) if classes else 0.0, *(float(array.max()) for array in values)) or 1.0
    figure = Figure(figsize=(5.4, 3.6), dpi=DPI, layout="constrained")
    _padded(figure)
    axes = figure.add_subplot()
    edges = np.linspace(0, top, 31)
    for name, array, colour, line in zip(names, values, (BLUE, ORANGE), ("-", "--"), strict=True):
        shares = np.histogram(np.clip(array, 0, top), edges)[0] / len(array)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.22, linewidth=0)
        axes.stairs(
            shares,
            edges,
            color=colour,
            linestyle=line,
            linewidth=1.8,
            label=f"{_ending(name, NAME)} (n = {len(array):,})",
        )
    if classes:
        axes.axvline(math.log(classes), color=GREY, linewidth=1, linestyle=":", label=f"log {classes} (uniform)")
    axes.set(xlim=(0, top * 1.02), ylim=(0, None))
    axes.set_xlabel(f"{quantity} (nats)", fontsize=LABEL)
    axes.set_ylabel("share of images", fontsize=LABEL)
    if title:
        axes.set_title(_wrapped(title, 2 * LONGEST), fontsize=TITLE, parse_math=False)
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=TICK, frameon=False)
    _save(figure, path)


PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
"""Okabe and Ito's palette."""
MARK: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 5, "zorder": 3}


def bars(
    names: Sequence[str], groups: Sequence[str], values: Mapping[tuple[str, str], tuple[float, float]],
    marks: Mapping[tuple[str, str], float], label: str, title: str, path: Place,
) -> None:  # fmt: skip
    """Write a PNG of bars (mean, standard deviation) by (name, group), a colour for each name.

    Args:
        marks: published values, drawn as diamonds.

    Raises:
        OSError: `path` can't be written.
    """
    width = 0.8 / max(len(names), 1)
    shown = [_wrapped(group, 14) for group in groups]
    inches = max(0.28 * len(names), 0.15 + 0.075 * max(map(len, shown), default=0))  # of a group: bars and name
    figure = Figure(figsize=(max(5.0, 1.2 + inches * len(groups)), 3.8), dpi=DPI, layout="constrained")
    _padded(figure)
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        present = [(place, group) for place, group in enumerate(groups) if (name, group) in values]
        places = [place + (index - (len(names) - 1) / 2) * width for place, _ in present]
        heights = [values[name, group][0] for _, group in present]
        spreads = [values[name, group][1] for _, group in present]
        colour = PALETTE[index % len(PALETTE)]
        axes.bar(places, heights, width * 0.92, color=colour, label=name)
        axes.errorbar(places, heights, spreads, fmt="none", ecolor=GREY, elinewidth=1, capsize=2)
        for place, (_, group) in zip(places, present, strict=True):
            if (name, group) in marks:
                axes.plot(place, marks[name, group], "D", **MARK)
    if marks:
        axes.plot([], [], "D", label="the paper's", **MARK)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(groups)), shown, fontsize=TICK)
    axes.set_ylabel(label, fontsize=LABEL)
    axes.set_title(_broken(title, figure), fontsize=TITLE, parse_math=False)
    _tidy(axes)
    fitting = int(figure.get_figwidth() / (0.55 + 0.075 * max(map(len, names), default=1)))  # inches of a name
    columns = max(1, min(4, len(names) + 1, fitting))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=TICK, frameon=False)
    _save(figure, path)


class Curve(NamedTuple):
    """One line of a panel."""

    label: str
    points: Sequence[tuple[float, float, float]]
    """(x, mean, standard deviation), x ascending."""
    marks: Sequence[tuple[float, float]] = ()
    """(x, published value)."""


def curves(panels: Sequence[tuple[str, Sequence[Curve]]], across: str, path: Place, title: str = "") -> None:
    """Write a PNG with a panel for each (quantity, curves) against `across`, such as images a class.

    Curves of one label have one style in all panels; marks are diamonds of the same colour.

    Raises:
        ValueError: there is no curve, or one without points.
        OSError: `path` can't be written.
    """
    every = [curve for _, lines in panels for curve in lines]
    if not every or not all(curve.points for curve in every):
        raise ValueError("no values to draw")
    figure = Figure(figsize=(max(4.6, 3.9 * len(panels)), 3.8), dpi=DPI, layout="constrained")
    _padded(figure)
    if title:
        figure.suptitle(_broken(title, figure), fontsize=TITLE + 1, parse_math=False)
    labels = list(dict.fromkeys(curve.label for curve in every))
    places = sorted({x for curve in every for x, *_ in curve.points})
    wide = places[0] > 0 and places[-1] >= 8 * places[0]
    for axes, (quantity, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in lines:
            style = _style(labels.index(curve.label)) | {"marker": SHAPES[labels.index(curve.label) % len(SHAPES)]}
            x, means, spreads = zip(*curve.points, strict=True)
            axes.errorbar(x, means, spreads, elinewidth=1, capsize=3, linewidth=1.6, markersize=5, **style)
            if curve.marks:  # larger than the points, so that both show where they agree
                published = MARK | {"markeredgecolor": style["color"], "markersize": 8.5, "zorder": 1.5}
                axes.plot(*zip(*curve.marks, strict=True), "D", **published)
        if wide:
            axes.set_xscale("log")
        ticks = _apart([math.log(place) if wide else place for place in places])
        axes.set_xticks([places[at] for at in ticks], [f"{places[at]:g}" for at in ticks])
        axes.minorticks_off()
        axes.margins(x=0.08)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
        axes.locator_params(axis="y", nbins=6)
        axes.set_title(quantity, fontsize=TITLE, parse_math=False)
        axes.set_xlabel(across, fontsize=LABEL)
        _tidy(axes)
    handles = [
        Line2D([], [], linewidth=1.6, marker=SHAPES[index % len(SHAPES)], markersize=5, **_style(index))
        for index in range(len(labels))
    ]
    names = [_ending(label, NAME) for label in labels]
    if any(curve.marks for curve in every):
        handles.append(Line2D([], [], linestyle="none", marker="D", **MARK))
        names.append("the paper's")
    figure.legend(handles, names, loc="outside lower center", ncols=2 * len(panels), fontsize=TICK, frameon=False)
    _save(figure, path)


def _apart(values: Sequence[float], share: float = 0.07) -> list[int]:
    """Return indices of ascending values that leave room for a tick label each, the last one among them."""
    ticks: list[int] = []
    for index in reversed(range(len(values))):
        if not ticks or values[ticks[-1]] - values[index] >= share * (values[-1] - values[0]):
            ticks.append(index)
    return ticks[::-1]


SHAPES = "os^vDPX*"
"""Markers of curves, in the order of their labels."""


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
    _padded(figure)
    if title:
        figure.suptitle(_wrapped(title, LONGEST * columns + 10), fontsize=TITLE + 1, parse_math=False)
    labels = list(dict.fromkeys(label for course in courses for label, *_ in course.lines))
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, course in enumerate(courses):
        axes = grid[divmod(index, columns)]
        for label, steps, values, dashed in course.lines:
            _line(axes, labels.index(label), steps, values, dashed)
        axes.set_title(_wrapped(course.title, LONGEST + 10), fontsize=TITLE, parse_math=False)
        axes.set_ylabel(course.unit, fontsize=LABEL)
        axes.set_xlabel("step", fontsize=LABEL)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.locator_params(axis="y", nbins=5, integer=course.counts)
        if course.counts:
            axes.set_ylim(0, None)
        _tidy(axes)
    for index in range(len(courses), rows * columns):
        grid[divmod(index, columns)].remove()
    handles = [Line2D([], [], linewidth=1.8, **_style(index)) for index in range(len(labels))]
    names = [_ending(label, NAME) for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=2 * columns, fontsize=TICK, frameon=False)
    _save(figure, path)


def _line(axes: Axes, index: int, steps: Sequence[float], values: Sequence[float], dashed: bool) -> None:
    style = _style(index)
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


LINES = [colour for colour in PALETTE if colour != "#F0E442"]  # without yellow, which is faint on white


def _style(index: int) -> dict[str, Any]:
    """Return colour and line style of the label number `index`."""
    return {"color": LINES[index % len(LINES)], "linestyle": ("-", ":", "-.")[index // len(LINES) % 3]}


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
    heading = f"{_wrapped(label, LONGEST)}\nECE {100 * ece:.1f} %, accuracy {100 * correct.sum() / total:.1f} %"
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
    _tidy(upper)
    _tidy(lower)
    return float(count.max())


def _padded(figure: Figure) -> None:
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg]


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=TICK)
    axes.spines[["top", "right"]].set_visible(False)


def _wrapped(text: str, width: int) -> str:
    """Return the text as one line, cut to `width` characters."""
    line = drawable(" ".join(text.split()))
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}…"


def _broken(text: str, figure: Figure) -> str:
    """Break a title at spaces into at most two lines as wide as the figure."""
    width = int(figure.get_figwidth() / 0.095)
    return "\n".join(textwrap.wrap(drawable(text), width, max_lines=2, placeholder=" …"))


def _ending(text: str, width: int) -> str:
    """Return the last `width` characters, by which paths differ."""
    line = drawable(" ".join(text.split()))
    return line if len(line) <= width else f"…{line[1 - width :]}"


def _save(figure: Figure, path: Place) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    files.write_bytes(path, buffer.getvalue())
