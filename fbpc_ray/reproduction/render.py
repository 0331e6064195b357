"""Render rows as the paper prints them: Markdown with the paper's values beside ours, and a picture."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fbpc_ray.core.config import ELSEWHERE, Config
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.evaluation import protocols
from fbpc_ray.evaluation.results import Quantity
from fbpc_ray.reporting.charts.comparison import Curve, bars, curves
from fbpc_ray.reporting.charts.scatter import scatter
from fbpc_ray.reproduction.paper import PAPER, Value
from fbpc_ray.reproduction.summaries import LATER, SHOWN, Row, Summary, difference, summary
from fbpc_ray.reproduction.tables import TABLES, Request

BASELINE = "FBPC"
"""Row whose scores are subtracted from those of the others, where a table has it and several distillations."""


def markdown(
    table: str, scale: str, request: Request, configs: list[Config], rows: list[Row], images: Sequence[str],
    notes: tuple[str, ...],
) -> str:  # fmt: skip
    """Format the table, the paper's row below each of ours.

    Args:
        configs: those of the cells.
        images: file names of the pictures.
        notes: printed last.
    """
    shape = TABLES[table]
    lines = [
        f"# {shape.title}",
        "",
        _describe_scale(scale, request, configs),
        "",
        *(f"![{table}]({image})" for image in images),
        "",
    ]
    lines += score_tables(rows, shape.quantities, PAPER.get(table, {}), BASELINE if shape.kind == "scores" else "")
    differs = any(f", minus {BASELINE}" in line for line in lines)
    return "\n".join([*lines, *_legend(rows, differs), *(f"\nNote: {note}." for note in notes), ""])


def score_tables(
    rows: list[Row], quantities: Iterable[str], paper: Mapping[tuple[str, str], Mapping[str, Value]] | None = None,
    baseline: str = "",
) -> list[str]:  # fmt: skip
    """Format a table for each quantity, the paper's row below each of ours, and the differences to `baseline`."""
    paper, lines = paper or {}, []
    names, columns = _order(row["row"] for row in rows), _order(row["column"] for row in rows)
    header = [column or "-" for column in columns]
    for quantity in quantities:
        shown, body = SHOWN[quantity], []
        if quantity in LATER and all(row[quantity] is None for row in rows):
            continue
        for name in names:
            body.append([name, *(_text(summary(_cell(rows, name, column), quantity), shown) for column in columns)])
            theirs = [paper.get((name, column), {}).get(quantity) for column in columns]
            if any(theirs):
                body.append(["*paper*", *map(_paper, theirs)])
        lines += [markdown_table([shown.label, *header], body), ""]
        differences = [
            [name, *(_difference(rows, name, baseline, column, quantity) for column in columns)]
            for name in names
            if name != baseline
        ]
        if any(cell != "-" for line in differences for cell in line[1:]):
            lines += [markdown_table([f"{shown.label}, minus {baseline}", *header], differences), ""]
    return lines


def _difference(rows: list[Row], name: str, baseline: str, column: str, quantity: str) -> str:
    """Format a difference to the baseline, its 95 % interval, and the pairs behind it."""
    one = difference(_cell(rows, name, column), _cell(rows, baseline, column), quantity)
    if one is None:
        return "-"
    mean, low, high = (f"{value:+.{SHOWN[quantity].digits}f}" for value in one[:3])
    return f"{mean} ({low} to {high}; {one.pairs} pairs)"


def cell_means(table: str, rows: list[Row]) -> dict[str, float]:
    """Return {quantity/row/column: mean over seeds, in the printed unit}."""
    keys = dict.fromkeys((row["row"], row["column"]) for row in rows)
    summaries = {
        "/".join(part for part in (quantity, name, column) if part): summary(_cell(rows, name, column), quantity)
        for name, column in keys
        for quantity in TABLES[table].quantities
    }
    return {key: one.mean for key, one in summaries.items() if one}


def picture(table: str, scale: str, rows: list[Row], path: Path) -> bool:
    """Draw the table's first quantity as bars, the paper's values as marks; or accuracy against ECE.

    `scale`, here and in the other pictures, is that of `scale_of`.
    Return False, and draw nothing, where accuracy against ECE has no point: all chains diverged.
    """
    if TABLES[table].figure == "scatter":
        if panels := _points(rows, ("accuracy",), "ece"):
            scatter(panels, SHOWN["accuracy"].label, SHOWN["ece"].label, _title(table, scale), path)
        return bool(panels)
    quantity = TABLES[table].quantities[0]
    shown, paper = SHOWN[quantity], PAPER.get(table, {})
    names, columns = _order(row["row"] for row in rows), _order(row["column"] for row in rows)
    summaries = {(name, c): summary(_cell(rows, name, c), quantity) for name in names for c in columns}
    bars(
        names,
        columns,
        {key: (one.mean, one.evaluation or 0.0) for key, one in summaries.items() if one},
        {key: values[quantity][0] for key, values in paper.items() if quantity in values and key in summaries},
        shown.label,
        _title(table, scale),
        path,
    )
    return True


def _points(rows: list[Row], across: Sequence[str], up: str) -> dict[str, dict[tuple[str, str], tuple[float, float]]]:
    """Return {ipc: {(coreset, inference): (x, y)}} of a grid, whose columns are "ipc N, inference".

    x is the sum of the means of the quantities `across`, y the mean of `up`; cells without one of them are left out.
    """
    panels: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for name, column in dict.fromkeys((row["row"], row["column"]) for row in rows):
        cell = _cell(rows, name, column)
        means = [one.mean for quantity in (*across, up) if (one := summary(cell, quantity))]
        if len(means) > len(across):
            ipc, _, inference = column.partition(", ")
            panels.setdefault(ipc, {})[name, inference] = sum(means[:-1]), means[-1]
    return panels


def picture_of_seconds(table: str, scale: str, rows: list[Row], path: Path) -> bool:
    """Draw NLL against the CPU seconds to make and to judge. Return False, and draw nothing, where rows have none."""
    if panels := _points(rows, ("make_seconds", "judge_seconds"), "nll"):
        label = "CPU seconds to make, without experts, and to judge"
        scatter(panels, label, SHOWN["nll"].label, _title(table, scale), path, log_x=True)
    return bool(panels)


def scale_of(name: str, request: Request) -> str:
    """Return the scale of a reproduction as a picture's title names it, without a line break; "" for the paper's."""
    if name != "paper":
        return f"{name}\u00a0scale"
    return "paper's\u00a0scale,\u00a0overridden" if _overridden(request) else ""


def _overridden(request: Request) -> bool:
    """Return whether an override changes the cells, not only the machine that makes them."""
    return bool(request.overrides.keys() - ELSEWHERE)


def _title(table: str, scale: str) -> str:
    return TABLES[table].title + (f" ({scale})" if scale else "")


BY_IPC = re.compile(r"(?:(.*) )?ipc (\d+)")
"""Name of a row or a column of one ipc."""


def over_ipc(table: str, scale: str, rows: list[Row], path: Path) -> bool:
    """Draw scores or costs against images per class. Return False, and draw nothing, for one ipc."""
    shape, paper, panels = TABLES[table], PAPER.get(table, {}), []
    if shape.kind not in ("scores", "cost"):
        return False
    for quantity in shape.quantities:
        lines: dict[str, list[tuple[int, Summary, float | None]]] = {}
        for name, column in dict.fromkeys((row["row"], row["column"]) for row in rows):
            sized, other = (column, name) if BY_IPC.fullmatch(column) else (name, column)
            match, one = BY_IPC.fullmatch(sized), summary(_cell(rows, name, column), quantity)
            if match and one:
                theirs = paper.get((name, column), {}).get(quantity)
                label = f"{other}, {match[1]}" if match[1] else other
                lines.setdefault(label, []).append((int(match[2]), one, theirs[0] if theirs else None))
        drawn = [_curve(label, sorted(points)) for label, points in lines.items() if len(points) > 1]
        if drawn:
            panels.append((SHOWN[quantity].label, drawn))
    if panels:
        curves(panels, "images per class", path, _title(table, scale))
    return bool(panels)


def _curve(label: str, points: list[tuple[int, Summary, float | None]]) -> Curve:
    ours = [(float(ipc), one.mean, one.evaluation or 0.0) for ipc, one, _ in points]
    return Curve(label, ours, [(float(ipc), theirs) for ipc, _, theirs in points if theirs is not None])


def _cell(rows: list[Row], name: str, column: str) -> list[Row]:
    return [row for row in rows if row["row"] == name and row["column"] == column]


def _order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _text(one: Summary | None, shown: Quantity) -> str:
    if one is None:
        return "-"
    spreads = "".join(f" ± {s:.{shown.digits}f}" for s in (one.evaluation, one.distillation) if s is not None)
    diverged = f" ({one.diverged} diverged)" if one.diverged else ""
    return f"{one.mean:,.{shown.digits}f}{spreads if shown.digits else ''}{diverged}"


def _paper(value: Value | None) -> str:
    if value is None:
        return ""
    mean, spread = value
    return f"*{mean}" + (f" ± {spread}" if spread is not None else "") + "*"


def _describe_scale(scale: str, request: Request, configs: list[Config]) -> str:
    """Describe the scale of the reproduction in one paragraph."""
    settings = [config.flat() for config in configs]

    def values_of(flag: str) -> str:
        values = sorted({flat[flag] for flat in settings if flag != "steps" or flat["method"] != "random"})
        return " or ".join(map(str, values)) or "-"

    names = sorted({name for config in configs if (name := protocols.name_of(config.evaluation))})
    protocol = f" (protocol {' or '.join(names)})" if names else ""
    data = " or ".join(sorted({flat["data"].rstrip("/").split("/")[-1] for flat in settings}))
    experts = f"{values_of('expert_count')} expert{'s' * (values_of('expert_count') != '1')}"
    size = (
        f"width {values_of('width')}, {experts} of {values_of('expert_epochs')} epochs, "
        f"{values_of('steps')} steps, "
        f"real batches of {values_of('real_batch_size')}, chains of {values_of('chain_epochs')} epochs{protocol}; "
        f"data {data}"
    )
    changed = ", ".join(f"{name}={value}" for name, value in request.overrides.items())
    size += f"; every cell with {changed}" if changed else ""
    kind = "**At small scale, not the paper's**"
    if scale == "paper":
        kind = "**At the paper's scale, but for overrides**" if _overridden(request) else "At the paper's scale"
    return f"{kind}: {size}."


def _describe_spread(distillations: int, evaluations: int) -> str:
    """Say what the values are means of, and what ± is, by the numbers of seeds."""
    if distillations == 1 and evaluations == 1:
        return "One seed of the distillation, one of the evaluation."
    if distillations == 1:
        return f"Mean over {evaluations} seeds of the evaluation of one distillation; ± is their standard deviation."
    if evaluations == 1:
        return f"Mean over {distillations} distillations, each evaluated once; ± is their standard deviation."
    return (
        f"Mean over {distillations} seeds of the distillation x {evaluations} of the evaluation; the first ± is the "
        "standard deviation over seeds of the evaluation, the second over those of the distillation."
    )


def _legend(rows: list[Row], differs: bool) -> list[str]:
    """Say what the numbers are, and what made them; `differs`: there are tables of differences."""
    if not rows:
        return []
    paired = "Differences are paired by the seed of the distillation, with their 95 % interval (Student's t). "
    distillations, evaluations = ({row[name] for row in rows} for name in ("distill_seed", "eval_seed"))
    return [
        f"{_describe_spread(len(distillations), len(evaluations))} {paired if differs else ''}"
        "*Italics* are the paper's values.",
        "",
        "Commit " + ", ".join(_order(row["commit"] for row in rows))
        + "".join(f"; coresets made at {commit}" for commit in _order(row["coreset_commit"] for row in rows) if commit)
        + "; " + ", ".join(_order(row["device"] for row in rows))
        + "; " + ", ".join(f"{k} {v}" for k, v in json.loads(rows[-1]["versions"]).items()) + ".",
    ]  # fmt: skip
