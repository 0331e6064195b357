"""The calibration of SGHMC on the paper's Random rows: settings, and their distance from the paper.

`jobs/calibrate_sghmc.py` runs the chains.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.reproduction.paper import TABLE1


class Paper(NamedTuple):
    """A Random cell of Table 1: means of accuracy in [0, 1] and of NLL."""

    accuracy: float
    nll: float


PAPER = {
    ipc: Paper(scores["accuracy"][0] / 100, scores["nll"][0])
    for ipc in (1, 10, 50)
    for scores in [TABLE1["Random", f"ipc {ipc}"]]
}
"""ipc -> CIFAR-10, ConvNet."""

ACCURACY_TOLERANCE = 0.015
NLL_TOLERANCE = 0.15

DEFINITIONS = ("nll", "batch_nll")
"""What the paper's NLL may be."""

KNOBS = {
    "d": "chain_d", "eta": "chain_eta", "prior": "chain_weight_decay", "init": "chain_init", "dsa": "chain_augment",
    "noise": "chain_noise", "friction": "chain_friction",
}  # fmt: skip
"""Knob of --grid -> setting of a chain."""

_ZERO = {"init": "own", "eta": "auto"}
"""Knob -> how --grid writes 0: the network's own initialisation; the default for m images."""

Setting = dict[str, str]
"""Knob -> value as --grid has it."""


def settings_of(grid: Sequence[str], search: str) -> list[Setting]:
    """Return the settings of a search, the base first.

    Args:
        grid: words KNOB=VALUE,VALUE.
        search: product, or one-at-a-time.

    Raises UserError for an unknown knob or value.
    """
    base = {knob: _text(knob, getattr(Evaluation(), name)) for knob, name in KNOBS.items()}
    values = {knob: [text] for knob, text in base.items()}
    for word in grid:
        knob, _, texts = word.partition("=")
        if knob not in KNOBS:
            raise UserError(f"--grid {word}: {closest(knob, list(KNOBS))}")
        values[knob] = list(dict.fromkeys(_canonical(knob, text) for text in texts.split(",")))
    if search == "product":
        return [dict(zip(values, texts, strict=True)) for texts in product(*values.values())]
    base = {knob: texts[0] for knob, texts in values.items()}
    return [base, *({**base, knob: text} for knob, texts in values.items() for text in texts[1:])]


def value_of(knob: str, text: str, m: int) -> float | bool | str:
    """Return the value of a knob for a coreset of m images. Raises UserError."""
    if knob == "noise" and text in ("consistent", "gradient", "literal"):
        return text
    if knob == "dsa" and text in ("on", "off"):
        return text == "on"
    if _ZERO.get(knob) == text:
        return 0.0
    if knob not in ("noise", "dsa"):
        try:
            scale = m if text.endswith("m") and knob in ("d", "eta", "prior") else 1
            value = scale * float(text.removesuffix("m") if scale == m else text)
        except ValueError:
            value = math.nan
        if 0 <= value < math.inf and (value > 0 or knob != "eta") and (value < 1 or knob != "friction"):
            return value
    expected = _EXPECTED.get(knob, "a number of 0 or more, with or without m")
    raise UserError(f"--grid {knob}={text}: expected {expected}")


_EXPECTED = {
    "noise": "consistent, gradient or literal", "dsa": "on or off", "init": "own or a standard deviation",
    "eta": "auto or a number above 0, with or without m", "friction": "from 0 to below 1",
}  # fmt: skip


def _canonical(knob: str, text: str) -> str:
    """Write equal values alike: 1e-2 as 0.01. Raises UserError."""
    scaled = text.endswith("m") and knob in ("d", "eta", "prior")
    return _text(knob, value_of(knob, text.removesuffix("m") if scaled else text, 1)) + ("m" if scaled else "")


def _text(knob: str, value: Any) -> str:
    """Invert `value_of`."""
    if knob == "dsa":
        return "on" if value else "off"
    if knob in _ZERO and not value:
        return _ZERO[knob]
    return value if isinstance(value, str) else f"{value:g}"


def name_of(setting: Setting) -> str:
    """Write a setting as --grid would have it, without knobs that have their default."""
    default = Evaluation()
    words = [f"{k}={v}" for k, v in setting.items() if v != _text(k, getattr(default, KNOBS[k]))]
    return " ".join(words) or "default"


def distance(cells: dict[int, list[dict[str, Any]]], definition: str) -> float:
    """Return the root mean square of the differences from the paper, in tolerances; infinite where a chain diverged.

    Args:
        cells: {ipc: rows of one setting}.
        definition: of the NLL.
    """
    terms = []
    for ipc, rows in cells.items():
        if any(row[definition] is None for row in rows):
            return math.inf
        terms.append((statistics.fmean(row["accuracy"] for row in rows) - PAPER[ipc].accuracy) / ACCURACY_TOLERANCE)
        terms.append((statistics.fmean(row[definition] for row in rows) - PAPER[ipc].nll) / NLL_TOLERANCE)
    return math.sqrt(statistics.fmean(term**2 for term in terms))


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Format the settings as a Markdown table, nearest to the paper first among those with rows at as many ipc."""
    cells: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["ipc"]):
        if row["ipc"] in PAPER:
            name = name_of({knob: row[knob] for knob in KNOBS})
            cells.setdefault(name, {}).setdefault(row["ipc"], []).append(row)
    ipcs = sorted({ipc for of_setting in cells.values() for ipc in of_setting})
    distances = {
        name: [distance(of_setting, definition) for definition in DEFINITIONS] for name, of_setting in cells.items()
    }
    header = ["setting", "distance", "distance by batch NLL"]
    for ipc in ipcs:
        p = PAPER[ipc]
        header += [
            f"ipc {ipc}: n", f"accuracy % (paper {100 * p.accuracy:.2f})", f"NLL (paper {p.nll:.2f})",
            "batch NLL", "sample NLL", "ECE",
        ]  # fmt: skip
    lines = []
    for name in sorted(cells, key=lambda name: (-len(cells[name]), min(distances[name]))):
        line = [name, *(f"{value:.2f}" for value in distances[name])]
        for ipc in ipcs:
            group = cells[name].get(ipc, [])
            finite = [row for row in group if row["nll"] is not None]
            line += [f"{len(finite)} of {len(group)}" if len(finite) < len(group) else str(len(group))]
            line += [_mean([100 * row["accuracy"] for row in finite], 1)]
            line += [_mean([row[key] for row in finite], 2) for key in (*DEFINITIONS, "mean_sample_nll")]
            line += [_mean([row["ece"] for row in finite], 3)]
        lines.append(line)
    return "\n" + markdown_table(header, lines)


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
