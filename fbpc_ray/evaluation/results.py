"""What a run found, as result.json and as a table."""

import statistics
from collections import Counter
from typing import Any

from fbpc_ray.core.config import Config
from fbpc_ray.core.provenance import Provenance
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.execution.session import threads

Evaluated = dict[str, dict[str, dict[str, list[float | None]]]]
"""{coreset: {architecture: {accuracy | nll | ece | brier | ...: one value a seed, None where the chain diverged}}}."""


AUROC = {"ood_auroc_entropy": "OOD entropy", "ood_auroc_mutual_information": "OOD mutual information"}


def result_of(
    config: Config,
    dataset: Dataset,
    rows: list[dict[str, Any]],
    evaluation: Evaluated,
    split: str,
    provenance: Provenance,
) -> dict[str, Any]:
    """result.json: what was done, by what, and every value."""
    d = config.distillation
    durations = {row["step"]: row["seconds_step"] for row in rows}
    endings = map_endings(rows)
    return {
        "method": d.method, "data": dataset.name, "ipc": d.ipc, "architectures": list(config.networks.architectures),
        "steps": max(durations, default=0), "seed": d.seed, "width": config.networks.width,
        "seconds_per_step": statistics.median(durations.values()) if durations else None,
        "map_endings": endings,
        "split": split, "images_scored": len(getattr(dataset, split).labels),
        "eval_seeds": list(range(config.evaluation.num_chains)), "coresets": evaluation,
        **provenance._asdict(), "threads": threads(config),
    }  # fmt: skip


def judged(result: dict[str, Any], step: str | None) -> bool:
    """Whether `result` is of the coreset of `step`, as its file has it; a run that went on with more steps may have a
    newer one, not yet judged. A coreset that doesn't say its step is taken for the result's."""
    return step in (None, str(result["steps"]))


def map_endings(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many MAP solves ended how; empty for methods that have none."""
    return dict(sorted(Counter(row["map_ending"] for row in rows if "map_ending" in row).items()))


def table(evaluation: Evaluated) -> str:
    """The scores as text, mean +- standard deviation over seeds; the AUROC of out-of-distribution data where it is."""

    def show(values: list[float | None], scale: float) -> str:
        finite = [scale * value for value in values if value is not None]
        if not finite:
            return "diverged"
        spread = statistics.stdev(finite) if len(finite) > 1 else 0.0
        return f"{statistics.mean(finite):.{1 if scale == 100 else 3}f} +- {spread:.{1 if scale == 100 else 3}f}"

    first = next(iter(next(iter(evaluation.values())).values()))
    extra = {label: name for name, label in AUROC.items() if name in first}
    lines = [["architecture", "coreset", "accuracy %", "NLL", "ECE", "Brier", *extra]]
    for architecture in next(iter(evaluation.values())):
        for coreset, by_architecture in evaluation.items():
            s = by_architecture[architecture]
            shown = ("nll", "ece", "brier", *extra.values())
            cells = [show(s["accuracy"], 100), *(show(s[quantity], 1) for quantity in shown)]
            lines.append([architecture, coreset, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def means(by_architecture: dict[str, dict[str, list[float | None]]]) -> dict[str, float]:
    """The scores of one coreset, mean over networks and chains, by quantity; none where a chain diverged: it has no
    mean."""
    every = list(by_architecture.values())
    values = {name: [value for its in every for value in its[name]] for name in ("accuracy", "nll", "ece", "brier")}
    if any(value is None for each in values.values() for value in each):
        return {}
    return {name: statistics.fmean(value for value in each if value is not None) for name, each in values.items()}


def metrics(evaluation: Evaluated, split: str = "test") -> dict[str, float]:
    """The scores as flat metrics, mean over seeds: test/quantity/coreset/architecture, or val/... for the split
    `validation`."""
    return {
        f"{'test' if split == 'test' else 'val'}/{quantity}/{coreset}/{architecture}": statistics.mean(finite)
        for coreset, by_architecture in evaluation.items()
        for architecture, by_quantity in by_architecture.items()
        for quantity, values in by_quantity.items()
        if (finite := [value for value in values if value is not None])
    }
