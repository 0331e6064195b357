"""Mean and spread of a table's cells over seeds, and differences between rows, paired by seed."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from scipy.special import stdtrit

from fbpc_ray.evaluation.results import Quantity

Row = dict[str, Any]


LATER = {"ood_auroc_entropy", "corruption_accuracy", "make_seconds", "judge_seconds"}
"""Quantities that rows of earlier versions, or rows without --ood, don't have."""

SHOWN = {
    "accuracy": Quantity("accuracy %", 100, 1),
    "nll": Quantity("NLL", 1, 2),
    "ece": Quantity("ECE", 1, 3),
    "brier": Quantity("Brier", 1, 3),
    "degradation": Quantity("degradation %", 100, 1),
    "peak_gb": Quantity("peak GB", 1, 3),
    "seconds": Quantity("seconds", 1, 2),
    "parameters": Quantity("parameters", 1, 0),
    "logit": Quantity("logit", 1, 2),
    "ood_auroc_entropy": Quantity("OOD AUROC", 1, 3),
    "corruption_accuracy": Quantity("accuracy % on corrupted images", 100, 1),
    "make_seconds": Quantity("CPU seconds to make, without experts", 1, 0),
    "judge_seconds": Quantity("CPU seconds to judge", 1, 1),
}


class Summary(NamedTuple):
    """Mean and spread of one quantity over the seeds of a cell, in the printed unit."""

    mean: float
    evaluation: float | None
    """Standard deviation over seeds of the evaluation, pooled over seeds of the distillation; None for one seed."""
    distillation: float | None
    """Standard deviation of the means of the seeds of the distillation; None for one seed."""
    values: int
    diverged: int


def summary(rows: Iterable[Row], quantity: str) -> Summary | None:
    """Summarise `quantity` over the seeds of a cell; return None if no seed has a value."""
    rows = list(rows)
    diverged = sum(row[quantity] is None and (quantity not in LATER or row["accuracy"] is None) for row in rows)
    groups = list(_by_distillation(rows, quantity).values())
    if not groups:
        return None
    free = sum(len(group) - 1 for group in groups)
    within = sum(statistics.variance(group) * (len(group) - 1) for group in groups if len(group) > 1)
    return Summary(
        statistics.mean(value for group in groups for value in group),
        (within / free) ** 0.5 if free else None,
        statistics.stdev(statistics.mean(group) for group in groups) if len(groups) > 1 else None,
        sum(map(len, groups)),
        diverged,
    )


class Difference(NamedTuple):
    """Mean difference of two cells over pairs of distillations, with its 95 % interval, in the printed unit."""

    mean: float
    low: float
    high: float
    pairs: int


def difference(ours: Iterable[Row], theirs: Iterable[Row], quantity: str) -> Difference | None:
    """Subtract the means of `theirs` from those of `ours`, paired by the seed of the distillation.

    The interval is Student's t; pairing leaves out what both owe to the seed: the first images and the draws. Return
    None for fewer than two pairs.
    """
    means, others = _by_distillation(ours, quantity), _by_distillation(theirs, quantity)
    values = [statistics.mean(means[seed]) - statistics.mean(others[seed]) for seed in means if seed in others]
    if len(values) < 2:
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    reach = float(stdtrit(len(values) - 1, 0.975)) * error
    return Difference(mean, mean - reach, mean + reach, len(values))


def _by_distillation(rows: Iterable[Row], quantity: str) -> dict[int, list[float]]:
    """Return {seed of the distillation: values in the printed unit}."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row[quantity] is not None:
            values.setdefault(row["distill_seed"], []).append(SHOWN[quantity].scale * row[quantity])
    return values
