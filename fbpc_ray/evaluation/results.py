"""Scores of chains, as result.json, as a table and as metrics."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fbpc_ray.core.config import RENAMED, Config
from fbpc_ray.core.provenance import Provenance
from fbpc_ray.core.tables import text_table
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.evaluation import protocols
from fbpc_ray.inference.metrics import Scores


class ChainScore(NamedTuple):
    """Scores of one SGHMC chain."""

    coreset: str
    architecture: str
    seed: int
    values: dict[str, float] | None
    """{quantity: finite value}; None where the chain diverged."""

    def value(self, quantity: str) -> float | None:
        """Return the value of `quantity`, None where the chain has none."""
        return None if self.values is None else self.values.get(quantity)


class Quantity(NamedTuple):
    """How a quantity is printed."""

    label: str
    scale: float
    """From the stored unit to the printed one."""
    digits: int
    """Decimals of a mean."""


MAIN_QUANTITIES = {
    "accuracy": Quantity("accuracy %", 100.0, 1),
    "nll": Quantity("NLL", 1.0, 3),
    "ece": Quantity("ECE", 1.0, 3),
    "brier": Quantity("Brier", 1.0, 3),
}
"""What every evaluation has."""

OOD_QUANTITIES = {
    "ood_auroc_entropy": Quantity("OOD entropy", 1.0, 3),
    "ood_auroc_mutual_information": Quantity("OOD mutual information", 1.0, 3),
}
"""AUROC of telling out-of-distribution images by an uncertainty; only evaluations with --ood have them."""

QUANTITIES = MAIN_QUANTITIES | OOD_QUANTITIES

STORED_QUANTITIES = (*Scores._fields, "batch_nll", "mean_sample_nll")
"""Keys of result.json's scores, without those of --ood."""

NestedScores = Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]]
"""{coreset: {architecture: {quantity: [one value per seed, None where a chain diverged]}}}, as in result.json."""


def to_json(scores: Sequence[ChainScore], quantities: Sequence[str] = ()) -> dict[str, Any]:
    """Nest scores as result.json holds them.

    Args:
        scores: of seeds 0, 1, ..., the same for every coreset and architecture.
        quantities: keys to write; by default those that any chain has, or STORED_QUANTITIES where all diverged.
    """
    names = quantities or unique(name for score in scores for name in score.values or ()) or STORED_QUANTITIES
    seeds = 1 + max((score.seed for score in scores), default=-1)
    nested: dict[str, Any] = {}
    for score in scores:
        by_quantity = nested.setdefault(score.coreset, {}).setdefault(
            score.architecture, {name: [None] * seeds for name in names}
        )
        for name in names:
            by_quantity[name][score.seed] = score.value(name)
    return nested


def from_json(nested: NestedScores) -> list[ChainScore]:
    """Read the `coresets` of a result.json, in its order; values that are not finite count as missing.

    Raises ValueError, TypeError or AttributeError for another form.
    """
    scores = []
    for coreset, by_architecture in nested.items():
        for architecture, by_quantity in by_architecture.items():
            counts = {len(values) for values in by_quantity.values()}
            if len(counts) != 1 or 0 in counts:
                raise ValueError(f"{coreset} on {architecture}: not one value for each seed")
            columns = {RENAMED.get(name, name): list(map(finite, values)) for name, values in by_quantity.items()}
            for seed in range(counts.pop()):
                values = {name: value for name, column in columns.items() if (value := column[seed]) is not None}
                scores.append(ChainScore(str(coreset), str(architecture), seed, values or None))
    return scores


def finite(value: Any) -> float | None:
    """Return a finite number, None for null and for a number that is not finite. Raises ValueError or TypeError."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


def unique(names: Iterable[str]) -> list[str]:
    """Return `names` without repetitions, in order."""
    return list(dict.fromkeys(names))


def select(
    scores: Sequence[ChainScore], coreset: str | None = None, architecture: str | None = None
) -> list[ChainScore]:
    """Return the scores of a coreset, of an architecture, or of both."""
    return [
        score
        for score in scores
        if coreset in (None, score.coreset) and architecture in (None, score.architecture)
    ]  # fmt: skip


def values_of(scores: Sequence[ChainScore], quantity: str) -> list[float]:
    """Return the values of the chains that have the quantity."""
    return [value for score in scores if (value := score.value(quantity)) is not None]


def mean_scores(scores: Sequence[ChainScore]) -> dict[str, float]:
    """Return the means over chains of the main quantities; empty where a chain diverged, which leaves no mean."""
    if any(score.value(name) is None for score in scores for name in MAIN_QUANTITIES):
        return {}
    return {name: statistics.fmean(values_of(scores, name)) for name in MAIN_QUANTITIES}


def table(scores: Sequence[ChainScore], format_table: Callable[[list[str], list[list[str]]], str] = text_table) -> str:
    """Format mean +- standard deviation over seeds as a table, with the AUROC of OOD data where there is one.

    One seed has no deviation.
    """
    names = [*MAIN_QUANTITIES, *(name for name in OOD_QUANTITIES if values_of(scores, name))]
    rows = []
    for architecture in unique(score.architecture for score in scores):
        for coreset in unique(score.coreset for score in scores):
            if chains := select(scores, coreset, architecture):
                rows.append([architecture, coreset, *(_cell(values_of(chains, name), name) for name in names)])
    return format_table(["architecture", "coreset", *(QUANTITIES[name].label for name in names)], rows)


def _cell(values: Sequence[float], name: str) -> str:
    if not values:
        return "diverged"
    scaled, digits = [QUANTITIES[name].scale * value for value in values], QUANTITIES[name].digits
    spread = f" +- {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{spread}"


def metrics(scores: Sequence[ChainScore], split: str = "test") -> dict[str, float]:
    """Return the means over seeds as flat metrics: test/quantity/coreset/architecture, val/... for `validation`."""
    prefix = "test" if split == "test" else "val"
    return {
        f"{prefix}/{quantity}/{coreset}/{architecture}": statistics.mean(values)
        for coreset, architecture in dict.fromkeys((score.coreset, score.architecture) for score in scores)
        for chains in [select(scores, coreset, architecture)]
        for quantity in unique(name for score in chains for name in score.values or ())
        if (values := values_of(chains, quantity))
    }


def result_of(
    config: Config,
    dataset: Dataset,
    rows: list[dict[str, Any]],
    scores: Mapping[str, Any],
    split: str,
    provenance: Provenance,
    threads: int,
) -> dict[str, Any]:
    """Assemble result.json: what was done, by which code and machine, and every score.

    Args:
        rows: of metrics.parquet.
        scores: of `EvaluationResult.to_json`.
        threads: CPU threads of a gradient.
    """
    d = config.distillation
    protocol = protocols.name_of(config.evaluation)
    chains = {"protocol": protocol, "chain_settings": protocols.chain_settings(config.evaluation)} if protocol else {}
    durations = {row["step"]: row["seconds_step"] for row in rows if row["step"]}  # step 0 is a validation alone
    return {
        "method": d.method, "data": dataset.name, "ipc": d.ipc, "architectures": list(config.networks.architectures),
        "steps": max(durations, default=0), "seed": d.seed, "width": config.networks.width,
        "seconds_per_step": statistics.median(durations.values()) if durations else None,
        "map_endings": map_endings(rows),
        "split": split, "inference": config.evaluation.inference, **chains,
        "images_scored": len(getattr(dataset, split).labels),
        "eval_seeds": list(range(config.evaluation.num_chains)),
        **scores,
        **provenance._asdict(), "threads": threads,
    }  # fmt: skip


def is_of_step(result: dict[str, Any], step: str | None) -> bool:
    """Tell whether `result` belongs to the coreset of `step`, as the coreset's file has it (None: it has no step).

    A run that was resumed with more steps may have a newer coreset, not yet evaluated.
    """
    return step in (None, str(result["steps"]))


def map_endings(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count the statuses of the MAP solves; empty for methods that have no solves."""
    return dict(sorted(Counter(row["map_ending"] for row in rows if row.get("map_ending")).items()))
