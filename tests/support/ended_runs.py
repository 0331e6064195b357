"""Runs that have ended as reports read them, with scores that are made up."""

from pathlib import Path
from typing import Any

import torch

from fbpc_ray.core.config import Config
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.reporting.run_reader import EndedRun


def ended_run(
    label: str, accuracies: list[float | None], networks=("a",), result: dict[str, Any] | None = None, **changes
):
    """A run whose chains have these accuracies on each network, and an NLL of 1 - accuracy."""
    config = Config().updated(**changes)
    method = config.distillation.method
    scores = [
        ChainScore(name, network, seed, None if value is None else
                   {"accuracy": value, "nll": 1 - value, "ece": 0.1, "brier": 0.5})
        for name, values in ((method, accuracies), ("random", [0.25, 0.25]))
        for network in networks for seed, value in enumerate(values)
    ]  # fmt: skip
    images = Coreset(torch.zeros(2, 1, 2, 2), torch.arange(2), (0.5,), (0.2,), ("x", "y"), facts={"fingerprint": "f"})
    facts = {"data": "digits", "split": "test", "images_scored": 360, "steps": 9} | (result or {})
    return EndedRun(label, RunDirectory(Path(f"runs/{label}")), config, facts, scores, images, [], [], [])
