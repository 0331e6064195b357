"""Histograms of the uncertainties of two sets of values."""

import math

import numpy as np
from matplotlib.figure import Figure

from fbpc_ray.core.storage import Place
from fbpc_ray.reporting.charts.style import (
    BLUE,
    DPI,
    GREY,
    LABEL,
    LONGEST,
    NAME,
    ORANGE,
    TICK,
    TITLE,
    ending,
    padded,
    save,
    tidy,
    wrapped,
)


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
    padded(figure)
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
            label=f"{ending(name, NAME)} (n = {len(array):,})",
        )
    if classes:
        axes.axvline(math.log(classes), color=GREY, linewidth=1, linestyle=":", label=f"log {classes} (uniform)")
    axes.set(xlim=(0, top * 1.02), ylim=(0, None))
    axes.set_xlabel(f"{quantity} (nats)", fontsize=LABEL)
    axes.set_ylabel("share of images", fontsize=LABEL)
    if title:
        axes.set_title(wrapped(title, 2 * LONGEST), fontsize=TITLE, parse_math=False)
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=TICK, frameon=False)
    save(figure, path)
