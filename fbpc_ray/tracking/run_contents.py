"""What an MLflow run holds: tags, params, names of metrics, description. Pure: nothing is sent."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fbpc_ray.core.config import ELSEWHERE, Config
from fbpc_ray.core.presets import start_of
from fbpc_ray.core.provenance import Provenance
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.loop import Row
from fbpc_ray.evaluation import diagnostics, protocols, results
from fbpc_ray.evaluation.calibration import Calibrated
from fbpc_ray.evaluation.diagnostics import Mixing
from fbpc_ray.evaluation.results import ChainScore


def run_tags(config: Config, data: str) -> dict[str, str]:
    """Return the tags that tell runs apart and group them; `data` is the name of the data set."""
    d = config.distillation
    architectures = " ".join(config.networks.architectures)
    return {"method": d.method, "data": data, "ipc": str(d.ipc), "architectures": architectures}


ALWAYS_LOGGED = (
    "method", "data", "ipc", "architectures", "width", "steps", "alpha", "start_epoch", "start_rule", "seed",
)  # fmt: skip


def run_params(config: Config) -> dict[str, Any]:
    """Return MLflow's params: the preset, and the settings that differ from it, a method's own among them.

    Not all settings: MLflow writes the params above every image of its slider, and sixty would leave no room for it.
    The artifact `config.json` has the others.
    """
    preset, start = start_of(config)
    defaults = start.flat()
    return {"preset": preset or "none"} | {
        name: " ".join(value) if isinstance(value, tuple) else value
        for name, value in config.flat().items()
        if name in ALWAYS_LOGGED or (value != defaults[name] and name not in ELSEWHERE)
    }


def provenance_tags(provenance: Provenance) -> dict[str, str]:
    """Return the tags for code, device and versions."""
    versions = {f"version.{name}": version for name, version in provenance.versions.items()}
    return {"commit": provenance.commit, "device": provenance.device, **versions}


def description_tag(
    config: Config, data: str, scores: Sequence[ChainScore], calibrated: Calibrated | None = None
) -> dict[str, str]:
    """Return the tag that MLflow shows as a run's description: method and data, and the tables of scores; and the tag
    of the protocol."""
    d, protocol = config.distillation, protocols.name_of(config.evaluation)
    spread = "mean +- standard deviation over chains" + (f", protocol {protocol}" if protocol else "")
    text = f"{d.method} on {data}, {d.ipc} per class; {spread}:\n\n{results.table(scores, markdown_table)}"
    if calibrated:
        text += f"\n\nprotocol calibrated ({calibrated.flags}, chosen on the validation split):\n\n"
        text += results.table(calibrated.result.scores, markdown_table)
    names = [name for name in (protocol, protocols.CALIBRATED if calibrated else "") if name]
    return {"mlflow.note.content": text, **({"protocol": "; ".join(names)} if names else {})}


LEADING = ("accuracy", "nll", "ece")
"""Scores that a run shows first."""
PENDING = {f"test/{name}": math.nan for name in LEADING}
"""Test scores of step 0. MLflow's page that compares runs opens with the metric that was logged first."""


def step_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a step's metrics under MLflow's names: `loss`, and the internals under `debug/`."""
    return {name if name == "loss" else f"debug/{name}": value for name, value in metrics.items()}


def validation_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Return the means over architectures of the validation columns in a step's rows, as val/nll and so on.

    Empty where an architecture has none: the step was not validated, or all chains of one diverged.
    """
    columns = {
        row["architecture"]: {
            name: value for name, value in row.items() if name.startswith("val_") and value is not None
        }
        for row in rows
    }
    return {
        name.replace("_", "/", 1): statistics.fmean(values[name] for values in columns.values())
        for name in next(iter(columns.values()), {})
        if all(name in values for values in columns.values())
    }


def metrics_of_rows(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Return all metrics that the rows of metrics.parquet hold, by step, under MLflow's names."""
    metrics = {}
    for step, group in itertools.groupby(rows, lambda row: row["step"]):
        same = list(group)
        quantities = step_metrics(loop.metrics_of_rows(same)) if step else {}
        metrics[step] = quantities | validation_metrics(same)
    return metrics


def score_metrics(
    scores: Sequence[ChainScore], mixing: Sequence[Mixing], method: str, split: str = "test"
) -> dict[str, float]:
    """Return scores under MLflow's names: the coreset's means over networks and chains as test/accuracy, test/nll and
    test/ece (val/... of the validation split), and all means over chains under `debug/`.
    """
    means = results.mean_scores(results.select(scores, method))
    prefix = "test" if split == "test" else "val"
    leading = {f"{prefix}/{name}": means[name] for name in LEADING if name in means}
    others = results.metrics(scores, split) | diagnostics.metrics(mixing, prefix)
    return {**leading, **{f"debug/{name}": value for name, value in others.items()}}


def calibrated_metrics(scores: Sequence[ChainScore], method: str, split: str) -> dict[str, float]:
    """Return the coreset's means under the protocol `calibrated`, as test/calibrated_accuracy and so on."""
    means, prefix = results.mean_scores(results.select(scores, method)), "test" if split == "test" else "val"
    return {f"{prefix}/{protocols.CALIBRATED}_{name}": means[name] for name in LEADING if name in means}
