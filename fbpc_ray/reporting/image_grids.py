"""Image grids of a pseudocoreset: one with titles and class names, and one of bare tiles for MLflow.

This file and charts/ alone import matplotlib, and only its objects (Figure, Agg): pyplot has global state and needs a
backend, which a tool without a screen should not.
"""

import bisect
import functools
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import FT2Font

from fbpc_ray.core import files
from fbpc_ray.core.storage import Place

PICTURED = (1, 3)
"""Numbers of channels that can be drawn."""
DPI = 150
# All lengths are whole pixels, so that every pixel of an image is a square of the same size.
TILE = 100  # side of an image, about
GAP = 9  # between images
MARGIN = 18
NAME = 8.0  # points: size of a class name
NAME_LINE = 25  # height of a line of names
WIDEST_NAME = 190
TITLE = 11.0  # points
TITLE_LINE = 46
Text = tuple[float, float, str, float, str, str]  # x and y from the top left in pixels, text, points, two alignments


def coreset_grid(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    path: Place,
    title: str = "",
    max_per_class: int = 10,
    max_classes: int = 20,
) -> None:
    """Write a PNG of the images, as `coreset_png` draws them. Raises OSError if `path` can't be written."""
    files.write_bytes(path, coreset_png(images, labels, classes, title, max_per_class, max_classes))


def coreset_png(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    title: str = "",
    max_per_class: int = 10,
    max_classes: int = 20,
) -> bytes:
    """Draw the images as a PNG.

    One image per class gives a compact grid with the class name above each image; more give a row for each class with
    its name at the left. Pixels stay sharp, one channel is grey, and long names are cut. Classes beyond `max_classes`
    (by label) and images beyond `max_per_class` are left out, with a note below the grid.

    Args:
        images: (m, c, h, w) uint8 with c 1 or 3.
        labels: (m,) integers, indices into `classes`.

    Raises ValueError for other shapes.
    """
    tiles, rows = _tiles(images, labels), _rows(labels, max_per_class, max_classes)
    factor = max(1, round(TILE / max(images.shape[2:])))
    height, width = factor * tiles.shape[1], factor * tiles.shape[2]
    names = [_fit(classes[int(labels[row[0]])], WIDEST_NAME) for row in rows]
    widest = max(_text_width(name, NAME) for name in names)
    note = _note(labels, rows)
    singles = int(np.bincount(labels).max()) == 1
    if singles:  # names above the images, columns as wide as the widest name
        columns = _columns(len(rows))
        left, above, step = 0, NAME_LINE, (max(width, widest) + GAP, height + NAME_LINE + GAP)
        places = [divmod(index, columns) for index in range(len(rows))]
    else:
        columns = max(len(row) for row in rows)
        left, above, step = widest + GAP, 0, (width + GAP, height + GAP)
        places = [(line, 0) for line in range(len(rows))]

    # A title or a note may be wider than a few images: the sheet grows, the images stay in its middle.
    inner = left + columns * step[0] - GAP
    sheet_width = max(inner, _text_width(title, TITLE), _text_width(note, NAME)) + 2 * MARGIN
    top = MARGIN + (TITLE_LINE if title else 0) + above
    bottom = top - above + (places[-1][0] + 1) * step[1] - GAP
    sheet = np.full((bottom + (GAP + NAME_LINE if note else 0) + MARGIN, sheet_width, 3), 255, np.uint8)
    x0 = (sheet_width - inner) // 2 + left + (step[0] - GAP - width) // 2
    texts: list[Text] = [(sheet_width / 2, MARGIN, title, TITLE, "center", "top")]
    texts += [(sheet_width / 2, sheet.shape[0] - MARGIN, note, NAME, "center", "bottom")]
    for (line, column), row, name in zip(places, rows, names, strict=True):
        y, x = top + line * step[1], x0 + column * step[0]
        for image in row:
            sheet[y : y + height, x : x + width] = tiles[image].repeat(factor, axis=0).repeat(factor, axis=1)
            x += step[0]
        if singles:
            texts.append((x - step[0] + width / 2, y - NAME_LINE / 2, name, NAME, "center", "center"))
        else:
            texts.append((x0 - GAP, y + height / 2, name, NAME, "right", "center"))
    return _png(sheet, texts)


def coreset_over_time(
    history: Mapping[int, np.ndarray], names: Sequence[str], path: Place, title: str = "", max_steps: int = 8
) -> None:
    """Write a PNG of the same images after several steps: a row for each image, a column for each step.

    Of more than `max_steps` steps, the first, the last and evenly spaced ones between are drawn.

    Args:
        history: {step: images (k, c, h, w) uint8 with c 1 or 3}, at least one.
        names: of the k images.

    Raises ValueError for other shapes, and OSError if `path` can't be written.
    """
    all_steps = sorted(history)
    steps = [all_steps[at] for at in np.unique(np.linspace(0, len(all_steps) - 1, max_steps).round().astype(int))]
    labels = np.arange(len(names))
    tiles = [_tiles(history[step], labels) for step in steps]
    factor = max(1, round(TILE / max(tiles[0].shape[1:3])))
    height, width = (factor * side for side in tiles[0].shape[1:3])
    fitted_names = [_fit(name, WIDEST_NAME) for name in names]
    left = max(_text_width(name, NAME) for name in fitted_names) + GAP
    heads = [f"step {steps[0]:,}", *(f"{step:,}" for step in steps[1:])]
    across = max(width, *(_text_width(head, NAME) for head in heads)) + GAP
    inner = left + len(steps) * across - GAP
    sheet_width = max(inner, _text_width(title, TITLE)) + 2 * MARGIN
    top = MARGIN + (TITLE_LINE if title else 0) + NAME_LINE
    sheet = np.full((top + len(names) * (height + GAP) - GAP + MARGIN, sheet_width, 3), 255, np.uint8)
    x0 = (sheet_width - inner) // 2 + left + (across - GAP - width) // 2
    texts: list[Text] = [(sheet_width / 2, MARGIN, title, TITLE, "center", "top")]
    for column, head in enumerate(heads):
        texts.append((x0 + column * across + width / 2, top - NAME_LINE / 2, head, NAME, "center", "center"))
    for row, name in enumerate(fitted_names):
        y = top + row * (height + GAP)
        texts.append((x0 - GAP, y + height / 2, name, NAME, "right", "center"))
        for column, images in enumerate(tiles):
            x = x0 + column * across
            sheet[y : y + height, x : x + width] = images[row].repeat(factor, axis=0).repeat(factor, axis=1)
    files.write_bytes(path, _png(sheet, texts))


def coreset_array(
    images: np.ndarray, labels: np.ndarray, max_per_class: int = 10, max_classes: int = 20, min_width: int = 256
) -> np.ndarray:
    """Tile the images without text: (H, W, 3) uint8 with W >= `min_width` pixels.

    Each image is enlarged by the same whole factor; a white line of that many pixels lies between two images.
    Raises ValueError as `coreset_grid` does.
    """
    tiles = _tiles(images, labels)
    rows = _rows(labels, max_per_class, max_classes)
    if np.bincount(labels).max() == 1:
        singles, columns = [row[0] for row in rows], _columns(len(rows))
        rows = [singles[at : at + columns] for at in range(0, len(singles), columns)]
    height, width = tiles.shape[1:3]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for line, row in enumerate(rows):
        for column, image in enumerate(row):
            y, x = line * (height + 1), column * (width + 1)
            sheet[y : y + height, x : x + width] = tiles[image]
    factor = max(1, math.ceil(min_width / sheet.shape[1]))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def _tiles(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Convert (m, c, h, w) uint8 to (m, h, w, 3) uint8."""
    if images.ndim != 4 or images.shape[1] not in PICTURED or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"images must be (m, 1 or 3, h, w) uint8 with m > 0, not {images.shape} {images.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be ({len(images)},), one for each image, not {labels.shape}")
    return np.broadcast_to(images, (len(images), 3, *images.shape[2:])).transpose(0, 2, 3, 1)


def _rows(labels: np.ndarray, max_per_class: int, max_classes: int) -> list[list[int]]:
    """Return the indices of the images to show: a list for each class, in the order of labels."""
    return [
        np.flatnonzero(labels == label)[:max_per_class].tolist() for label in np.unique(labels)[:max_classes].tolist()
    ]


def _columns(count: int) -> int:
    """Return the columns of a grid: one row up to 5 images, else wider than high, if possible full."""
    if count <= 5:
        return count
    start = math.ceil(math.sqrt(count))
    return next((columns for columns in range(start, 2 * start + 1) if count % columns == 0), start + 1)


def _note(labels: np.ndarray, rows: list[list[int]]) -> str:
    """Describe the part of the coreset that is shown; return "" if that is all."""
    counts = np.unique(labels, return_counts=True)[1]
    most = max(len(row) for row in rows)
    parts = [f"{len(rows)} of {len(counts)} classes"] if len(rows) < len(counts) else []
    parts += [f"{most} of {counts.max()} images per class"] if most < counts.max() else []
    return f"shown: {', '.join(parts)}" if parts else ""


def _png(sheet: np.ndarray, texts: list[Text]) -> bytes:
    """Encode `sheet` (H, W, 3) as a PNG with `texts` on it."""
    height, width = sheet.shape[:2]
    figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)  # not a pixel less by rounding
    canvas = FigureCanvasAgg(figure)
    figure.add_artist(_Pixels(sheet))
    for x, y, text, size, across, along in texts:
        figure.text(x / width, 1 - y / height, text, size=size, ha=across, va=along, parse_math=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


class _Pixels(Artist):
    """An image (H, W, 3) as large as the figure. figimage draws the same, but resamples it first, which is slow."""

    def __init__(self, sheet: np.ndarray):
        super().__init__()
        opaque = np.full((*sheet.shape[:2], 1), 255, np.uint8)
        self._bottom_up = np.ascontiguousarray(np.concatenate([sheet, opaque], 2)[::-1])

    def draw(self, renderer: RendererBase) -> None:
        renderer.draw_image(renderer.new_gc(), 0, 0, self._bottom_up)


@functools.cache
def _renderer() -> RendererAgg:
    """Return a renderer that measures texts."""
    return FigureCanvasAgg(Figure(figsize=(1, 1), dpi=DPI)).get_renderer()


def _text_width(text: str, size: float) -> int:
    """Measure one line at `size` points, in pixels."""
    if not text:
        return 0
    return math.ceil(_renderer().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def drawable(text: str) -> str:
    """Escape the characters that the font of the pictures lacks, such as CJK and emoji."""
    font = _font()

    def shown(char: str) -> bool:
        return char.isspace() or bool(font.get_char_index(ord(char)))

    return "".join(char if shown(char) else char.encode("unicode_escape").decode() for char in text)


@functools.cache
def _font() -> FT2Font:
    return get_font(findfont(FontProperties()))


def _fit(name: str, width: int) -> str:
    """Return the first of comma-separated names (as WordNet has them), cut to `width` pixels."""
    name = drawable(" ".join(name.split(",")[0].split()))
    if _text_width(name, NAME) <= width:
        return name
    fitting = bisect.bisect_right(range(len(name)), width, key=lambda end: _text_width(f"{name[:end]}…", NAME)) - 1
    return f"{name[: max(fitting, 0)].rstrip()}…"
