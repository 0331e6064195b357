"""The tasks of a reproduction, each a function of plain data that any worker can run: make a coreset, judge it."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.corrupted_splits import corrupted_test
from fbpc_ray.data.corruptions import CORRUPTIONS, SEVERITIES
from fbpc_ray.data.datasets import Dataset, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import ensemble
from fbpc_ray.evaluation.chains import (
    Chain,
    EvaluationContext,
    passes_of,
    posterior_samples,
    predictive,
    run_chain,
    values,
)
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial
from fbpc_ray.inference.metrics import scores
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes
from fbpc_ray.reproduction.cost import Cost, measure


class Making(NamedTuple):
    """One coreset to make."""

    config: Config
    folder: Path
    """Its run: checkpoints are kept there, and a half-made one goes on."""
    commit: str
    """Of the code that makes it."""


def make(dataset: Dataset, item: Making, device: str) -> str:
    """One task: distil the coreset, or say why it can't be, so that the others are made all the same."""
    try:
        _make(dataset, item, device)
    except UserError as error:
        return str(error)
    return ""


def _make(dataset: Dataset, item: Making, device: str) -> None:
    """All the coreset's architectures in this process, from the last checkpoint."""
    config, run, d = item.config, RunDirectory(item.folder), item.config.distillation
    first, labels = loop.first_state(dataset, d.ipc, d.seed, d.inner_lr)
    state = first
    if d.method != "random":
        interruption = Interruption()
        workers = Serial(device, interruption)
        specs = session.specs(config, dataset)
        stores = [session.store(config, dataset, spec) for spec in specs]
        state, rows = run.restore(labels, dataset.image_shape) or (first, [])
        run.write_config(config)
        workers.start_workers(session.crew(config.updated(threads=1), dataset, labels, specs, stores))
        state = loop.distill(
            config, run, state, rows, workers, interruption, lambda values, step: None, lambda state: None
        )
    made = Coreset(state.images, labels, dataset.mean, dataset.std, dataset.classes)
    facts = {"method": d.method, "data": dataset.name, "step": str(state.step), "commit": item.commit}
    coreset.save(made, run.coreset_path, facts)


class Judging(NamedTuple):
    """One chain to run: on which images, and what to do with its samples."""

    chain: Chain
    kind: str
    corruptions: Path | None
    """The official CIFAR-10-C folder; None generates."""
    cache: Path
    """Where generated corruptions are kept."""


class SharedContext(NamedTuple):
    """What the chains of one data set share."""

    judge: EvaluationContext
    dataset: Dataset


Finding = dict[str, Any]
"""Part of a row: its column, where a chain fills several, and its quantities."""


def judge(court: SharedContext, item: Judging, device: str) -> list[Finding]:
    """One task: a chain, and the rows that it fills. A chain that diverged fills its rows with nothing."""
    if item.kind == "scores":
        return [values(run_chain(court.judge, item.chain, device))]
    passes = passes_of(court.judge, item.chain, device)
    images = torch.tensor(item.chain.images, device=device)
    labels = torch.tensor(item.chain.labels, device=device)
    settings, augment = court.judge.settings, court.judge.augment
    samples = posterior_samples(passes, images, labels, settings, augment, item.chain.seed)
    if not ensemble.finite(samples):
        return [{}]
    if item.kind == "logits":
        return _logits(passes.network, samples, images, labels, court.dataset)
    return _corrupted(passes, samples, images, court, item)


def _logits(network: Network, samples: list, images: torch.Tensor, labels: torch.Tensor, dataset: Dataset) -> list:
    """Fig. 2b: the mean logits at the coreset's first image of 'dog', or of the last class where there is no dog."""
    shown = dataset.classes.index("dog") if "dog" in dataset.classes else len(dataset.classes) - 1
    image = images[labels == shown][:1]
    logits = ensemble.logits_of(network.predict, samples, ensemble.statistics_of(network, samples, images), image)
    means = logits[:, 0].double().mean(0).cpu()
    return [{"column": name, "logit": float(value)} for name, value in zip(dataset.classes, means, strict=True)]


def _corrupted(
    passes: Passes, samples: list, images: torch.Tensor, court: SharedContext, item: Judging
) -> list[Finding]:
    """Table 3: accuracy under each corruption, averaged over severities; degradation = 1 - it / clean accuracy."""

    def accuracy(split: Any) -> float:
        data = DeviceDataset(*tensors(split, passes.network.device), court.dataset.mean, court.dataset.std)
        return scores(predictive(passes, samples, images, data).stats).accuracy

    clean = accuracy(court.judge.split)
    found = []
    for name, corruption in CORRUPTIONS.items():
        splits = (
            corrupted_test(court.dataset, name, severity, source=item.corruptions, seed=0, cache=item.cache)
            for severity in SEVERITIES
        )
        found.append((corruption.abbreviation, float(np.mean([accuracy(split) for split in splits]))))
    found.append(("Avg.", float(np.mean([value for _, value in found]))))
    return [
        {"column": column, "accuracy": value, "degradation": 1 - value / clean if clean else None}
        for column, value in found
    ]


class Measuring(NamedTuple):
    """One cost to measure."""

    config: Config
    steps: int


def cost(shared: None, item: Measuring, device: str) -> Cost:
    """One task: a step's cost, in a process of its own."""
    return measure(item.config, device, item.steps)
