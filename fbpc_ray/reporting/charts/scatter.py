"""Points of two quantities, such as accuracy against ECE: colours for coresets, shapes for inference."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fbpc_ray.core.storage import Place
from fbpc_ray.reporting.charts.comparison import SHAPES
from fbpc_ray.reporting.charts.style import DPI, GREY, LABEL, PALETTE, TICK, TITLE, broken, padded, save, tidy, wrapped

Points = Mapping[tuple[str, str], tuple[float, float]]
"""{(coreset, inference): (x, y)}."""


def scatter(
    panels: Mapping[str, Points], x_label: str, y_label: str, title: str, path: Place, *, log_x: bool = False
) -> None:
    """Write a PNG with a panel of points for each title; both axes are the same in all panels.

    Raises:
        ValueError: there is no point.
        OSError: `path` can't be written.
    """
    keys = [key for points in panels.values() for key in points]
    if not keys:
        raise ValueError("no values to draw")
    coresets, inferences = (list(dict.fromkeys(key[place] for key in keys)) for place in (0, 1))
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(coresets)}
    shapes = {name: SHAPES[index % len(SHAPES)] for index, name in enumerate(inferences)}
    figure = Figure(figsize=(1.9 + 3.9 * len(panels), 4.0), dpi=DPI, layout="constrained")
    padded(figure)
    figure.suptitle(broken(title, figure), fontsize=TITLE + 1, parse_math=False)
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (heading, points) in zip(grid, panels.items(), strict=True):
        for (coreset, inference), (x, y) in points.items():
            axes.plot(x, y, shapes[inference], color=colours[coreset], markersize=7, markeredgecolor="white", alpha=0.9)
        axes.set_title(wrapped(heading, 40), fontsize=TITLE, parse_math=False)
        if log_x:
            axes.set_xscale("log")
        axes.set_xlabel(x_label, fontsize=LABEL)
        axes.margins(0.08)
        tidy(axes)
    grid[0].set_ylabel(y_label, fontsize=LABEL)
    handles = [Line2D([], [], linestyle="none", marker="o", color=colours[name], label=name) for name in coresets]
    handles += [Line2D([], [], linestyle="none", marker=shapes[name], color=GREY, label=name) for name in inferences]
    figure.legend(handles=handles, loc="outside right center", fontsize=TICK, frameon=False)
    save(figure, path)
