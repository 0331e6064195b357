"""Comparisons of coresets: bars by network, curves against the size."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fbpc_ray.core.storage import Place
from fbpc_ray.reporting.charts.style import (
    DPI,
    GREY,
    LABEL,
    MARK,
    NAME,
    PALETTE,
    TICK,
    TITLE,
    broken,
    ending,
    line_style,
    padded,
    save,
    tidy,
    wrapped,
)


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
    labels = [wrapped(group, 14) for group in groups]
    inches = max(0.28 * len(names), 0.15 + 0.075 * max(map(len, labels), default=0))  # of a group: bars and name
    figure = Figure(figsize=(max(5.0, 1.2 + inches * len(groups)), 3.8), dpi=DPI, layout="constrained")
    padded(figure)
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
    axes.set_xticks(range(len(groups)), labels, fontsize=TICK)
    axes.set_ylabel(label, fontsize=LABEL)
    axes.set_title(broken(title, figure), fontsize=TITLE, parse_math=False)
    tidy(axes)
    fitting = int(figure.get_figwidth() / (0.55 + 0.075 * max(map(len, names), default=1)))  # inches of a name
    columns = max(1, min(4, len(names) + 1, fitting))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=TICK, frameon=False)
    save(figure, path)


class Curve(NamedTuple):
    """One line of a panel."""

    label: str
    points: Sequence[tuple[float, float, float]]
    """(x, mean, standard deviation), x ascending."""
    marks: Sequence[tuple[float, float]] = ()
    """(x, published value)."""


def curves(panels: Sequence[tuple[str, Sequence[Curve]]], across: str, path: Place, title: str = "") -> None:
    """Write a PNG with a panel for each (quantity, curves) against `across`, such as images per class.

    Curves of one label have one style in all panels; marks are diamonds of the same colour.

    Raises:
        ValueError: there is no curve, or one without points.
        OSError: `path` can't be written.
    """
    all_curves = [curve for _, lines in panels for curve in lines]
    if not all_curves or not all(curve.points for curve in all_curves):
        raise ValueError("no values to draw")
    figure = Figure(figsize=(max(4.6, 3.9 * len(panels)), 3.8), dpi=DPI, layout="constrained")
    padded(figure)
    if title:
        figure.suptitle(broken(title, figure), fontsize=TITLE + 1, parse_math=False)
    styles = {
        label: line_style(index) | {"marker": SHAPES[index % len(SHAPES)], "linewidth": 1.6, "markersize": 5}
        for index, label in enumerate(dict.fromkeys(curve.label for curve in all_curves))
    }
    places = sorted({x for curve in all_curves for x, *_ in curve.points})
    wide = places[0] > 0 and places[-1] >= 8 * places[0]
    for axes, (quantity, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in lines:
            style = styles[curve.label]
            x, means, spreads = zip(*curve.points, strict=True)
            axes.errorbar(x, means, spreads, elinewidth=1, capsize=3, **style)
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
        tidy(axes)
    handles = [Line2D([], [], **style) for style in styles.values()]
    names = [ending(label, NAME) for label in styles]
    if any(curve.marks for curve in all_curves):
        handles.append(Line2D([], [], linestyle="none", marker="D", **MARK))
        names.append("the paper's")
    figure.legend(handles, names, loc="outside lower center", ncols=2 * len(panels), fontsize=TICK, frameon=False)
    save(figure, path)


def _apart(values: Sequence[float], share: float = 0.07) -> list[int]:
    """Return indices of ascending values that leave room for a tick label each, the last one among them."""
    ticks: list[int] = []
    for index in reversed(range(len(values))):
        if not ticks or values[ticks[-1]] - values[index] >= share * (values[-1] - values[0]):
            ticks.append(index)
    return ticks[::-1]


SHAPES = "os^vDPX*"
"""Markers of curves, in the order of their labels."""
