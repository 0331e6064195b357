"""Style of all charts: colours, sizes of text, and helpers that fit text to its place.

The files of this folder and image_grids.py alone import matplotlib, and only its objects (Figure, Agg), not pyplot.
"""

import io
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
"""Okabe and Ito's palette."""
MARK: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 5, "zorder": 3}
LINES = [colour for colour in PALETTE if colour != "#F0E442"]  # without yellow, which is faint on white


def line_style(index: int) -> dict[str, Any]:
    """Return colour and line style of the label number `index`."""
    return {"color": LINES[index % len(LINES)], "linestyle": ("-", ":", "-.")[index // len(LINES) % 3]}


def padded(figure: Figure) -> None:
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg]


def tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=TICK)
    axes.spines[["top", "right"]].set_visible(False)


def wrapped(text: str, width: int) -> str:
    """Return the text as one line, cut to `width` characters."""
    line = drawable(" ".join(text.split()))
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}…"


def broken(text: str, figure: Figure) -> str:
    """Break a title at spaces into at most two lines as wide as the figure."""
    width = int(figure.get_figwidth() / 0.095)
    return "\n".join(textwrap.wrap(drawable(text), width, max_lines=2, placeholder=" …"))


def ending(text: str, width: int) -> str:
    """Return the last `width` characters, by which paths differ."""
    line = drawable(" ".join(text.split()))
    return line if len(line) <= width else f"…{line[1 - width :]}"


def save(figure: Figure, path: Place) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    files.write_bytes(path, buffer.getvalue())
