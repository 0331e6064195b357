"""What the benchmarks write: the JSON file of all of them, tables and pictures of jobs/benchmark.py."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbpc_ray.core import files
from fbpc_ray.core.provenance import Provenance
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.reporting.charts import comparison

PHASES = {"seconds_x": "x side", "seconds_map": "MAP", "seconds_u": "u side", "seconds_gradient": "Eq. 17"}


def write_report(settings: Mapping[str, Any], report: Mapping[str, Any], provenance: Provenance) -> Path:
    """Write `report` with its settings and provenance to the file of --json, without paths; return the file."""
    path = Path(settings["json"]).absolute()
    data = re.sub(r":.*", ":PATH", settings["data"])
    content = {**report, "settings": {**settings, "data": data, "json": path.name}, **provenance._asdict()}
    files.write_text(path, json.dumps(content, indent=2) + "\n")
    return path


def with_range(summary: Mapping[str, Any]) -> str:
    """Format the median of a ratio and its range over the repeats."""
    return f"{summary['median']:.2f} ({min(summary['all']):.2f} to {max(summary['all']):.2f})"


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds per step by images per class and number of networks, beside `path`, if cases differ in them."""
    by_ipc, by_networks = defaultdict[str, list](list), defaultdict[str, list](list)
    for case in cases:
        by_ipc[f"{' + '.join(case['networks'])}, width {case['width']}"].append((case["ipc"], case))
        by_networks[f"width {case['width']}, ipc {case['ipc']}"].append((len(case["networks"]), case))
    for groups, across, suffix in (
        (by_ipc, "images per class", ".ipc.png"),
        (by_networks, "networks", ".networks.png"),
    ):
        panels = [(name, _curves(group)) for name, group in groups.items() if len({x for x, _ in group}) > 1]
        if panels:
            comparison.curves(panels, across, path.with_suffix(suffix), "seconds per step")


def _curves(cases: list[tuple[int, dict[str, Any]]]) -> list[comparison.Curve]:
    """Return a curve for each way, of the medians of the cases in order of x."""
    ways = dict.fromkeys(way for _, case in cases for way in case["seconds"])
    ordered = sorted(cases, key=lambda pair: pair[0])
    return [
        comparison.Curve(way, [(x, c["seconds"][way]["median"], 0.0) for x, c in ordered if way in c["seconds"]])
        for way in ways
    ]


def table(cases: list[dict[str, Any]]) -> str:
    """Format Markdown tables, a row for each case: medians, and the range of each ratio."""
    ways = list(dict.fromkeys(way for case in cases for way in case["seconds"]))
    ratios = list(dict.fromkeys(name for case in cases for name in case["ratios"]))
    seconds, others = [], []
    for case in cases:
        medians = [_figure(case["seconds"].get(way, {}).get("median")) for way in ways]
        phases = map(_figure, case["phases"].values())
        seconds.append([name_of(case), f"{case['map_steps']:.0f}", *medians, *phases])
        spreads = [with_range(case["ratios"][name]) if name in case["ratios"] else "" for name in ratios]
        memory, first = case.get("peak_gb", {}), case.get("first_run", {})
        training = case.get("training", {}).get("ratio", {}).get("median")
        rest = (memory.get("ours"), memory.get("bpc-fkl"), training, first.get("reference / ours"))
        others.append([name_of(case), *spreads, *map(_figure, rest)])
    last = ["GB, ours", "GB, bpc-fkl", "training: ours / bare loop", "first run: reference / ours"]
    return "\n".join([
        "Seconds per step", "", markdown_table(["", "MAP steps", *ways, *PHASES.values()], seconds), "",
        "Ratios, peak memory of a step (GB), first run", "", markdown_table(["", *ratios, *last], others), "",
    ])  # fmt: skip


def name_of(case: dict[str, Any]) -> str:
    return f"{' + '.join(case['networks'])}, width {case['width']}, ipc {case['ipc']}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def line(case: dict[str, Any]) -> str:
    """Format a case for the terminal."""
    seconds = ", ".join(f"{way} {values['median']:.3g}" for way, values in case["seconds"].items())
    ratios = ", ".join(f"{name} {values['median']:.2f}" for name, values in case["ratios"].items())
    phases = ", ".join(f"{name} {value:.3g}" for name, value in case["phases"].items())
    lines = [f"{name_of(case)}, {case['map_steps']:.0f} MAP steps", f"seconds per step: {seconds}"]
    lines += [f"ratios: {ratios}", f"of ours, seconds: {phases}"]
    if "peak_gb" in case:
        lines.append("peak GB: " + ", ".join(f"{way} {value:.3g}" for way, value in case["peak_gb"].items()))
    if training := case.get("training"):
        lines.append(f"a batch of training, ours / bare loop: {training['ratio']['median']:.2f}")
    if first := case.get("first_run"):
        how = "compiled" if first["compiled"] else "eager"
        lines.append(f"first {first['steps']} steps ({how}), reference / ours: {first['reference / ours']:.2f}")
    return "\n  ".join(lines)
