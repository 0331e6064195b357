"""Tasks of a reproduction that any worker can run: distil a coreset, run a chain, measure a cost."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import set_part
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import coreset
from fbpc_ray.data.corrupted_splits import corrupted_test
from fbpc_ray.data.corruptions import CORRUPTIONS, PAIRS, SEVERITIES
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.distillation.loop import Checkpointer, Step, follow
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation.chains import (
    Chain,
    CoresetArrays,
    EvaluationContext,
    fitting_share,
    image_passes,
    on_device,
)
from fbpc_ray.evaluation.last_layer import PREDICTORS
from fbpc_ray.evaluation.scoring import Logits, score
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.session import open_session
from fbpc_ray.inference.metrics import scores
from fbpc_ray.reproduction.cost import Cost, CpuClock, measure
from fbpc_ray.reproduction.extras import Extras, score_chain


class CoresetTask(NamedTuple):
    """A coreset to distil."""

    config: Config
    folder: Path
    """Run directory: an interrupted distillation resumes from its checkpoint."""
    commit: str
    """Commit of this code."""


def make_coreset(dataset: Dataset, task: CoresetTask, device: str) -> str:
    """Distil a coreset in this process, from its last checkpoint; return why it failed, or ""."""
    try:
        _make_coreset(dataset, task, device)
    except UserError as error:
        return str(error)
    return ""


def _make_coreset(dataset: Dataset, task: CoresetTask, device: str) -> None:
    config, run, clock = task.config, RunDirectory(task.folder), CpuClock(task.folder / "cpu-seconds.txt")
    session = open_session(config.updated(threads=1), print, dataset)
    state, rows = session.start(run)
    if session.num_steps:
        interruption = Interruption()
        run.write_config(config)
        steps = session.steps(state, Serial(device, interruption))

        def report(step: Step) -> None:
            set_part(step.state.step, session.num_steps)
            if step.state.step % config.distillation.checkpoint_every == 0:
                clock.save()

        try:
            checkpointer = Checkpointer(run, state, rows, config.distillation, fingerprint=dataset.fingerprint)
            state = follow(steps, checkpointer, [report], interruption)
        finally:
            clock.save()
    facts = {
        "method": config.distillation.method, "data": dataset.name, "step": str(state.step), "commit": task.commit,
        "cpu_seconds": str(clock.seconds()),
    }  # fmt: skip
    coreset.save(session.coreset(state), run.coreset_path, facts)


class RowTask(NamedTuple):
    """A chain to run, and the kind of rows to make of its samples."""

    chain: Chain
    kind: str
    corruptions: Path | None
    """Official CIFAR-10-C folder; None generates the images."""
    cache: Path
    """Folder of generated corruptions."""


class SharedContext(NamedTuple):
    """Data that the chains of one data set share."""

    context: EvaluationContext
    dataset: Dataset
    extras: Extras = Extras()


Finding = dict[str, Any]
"""Part of a row: its quantities, none of a chain that diverged, and its column if a chain fills several."""
CORRUPTED = (*(corruption.abbreviation for corruption in CORRUPTIONS.values()), "Avg.")
"""Columns of Table 3."""


def run_row_task(shared: SharedContext, item: RowTask, device: str) -> list[Finding]:
    """Run a chain and return its rows; those of a chain that diverged are empty."""
    if item.kind in ("scores", "grid"):
        return [score_chain(shared.context, item.chain, shared.extras, device)]
    predictor = PREDICTORS[shared.context.settings.inference](shared.context, item.chain, device)
    if predictor is None:
        columns = shared.dataset.classes if item.kind == "logits" else CORRUPTED
        return [{"column": column} for column in columns]
    if item.kind == "logits":
        return _logits(predictor.logits, shared.context.coresets[item.chain.coreset], shared.dataset.classes, device)
    return _corrupted(predictor.logits, shared, item, device)


def _logits(logits: Logits, arrays: CoresetArrays, classes: tuple[str, ...], device: str) -> list[Finding]:
    """Return mean logits at the coreset's first image of 'dog', or of the last class (Fig. 2b)."""
    label = classes.index("dog") if "dog" in classes else len(classes) - 1
    image = torch.tensor(arrays.images[arrays.labels == label][:1], device=device)
    means = logits(image)[:, 0].double().mean(0).cpu()
    if not means.isfinite().all():
        return [{"column": name} for name in classes]
    return [{"column": name, "logit": float(value)} for name, value in zip(classes, means, strict=True)]


def _corrupted(logits: Logits, shared: SharedContext, item: RowTask, device: str) -> list[Finding]:
    """Return the accuracy under each corruption, averaged over severities (Table 3).

    Degradation is 1 - accuracy / clean accuracy.
    """
    context, values = shared.context, list[float]()
    fitting = fitting_share(*image_passes(context, item.chain), context)
    for number, split in enumerate(_clean_and_corrupted(shared, item), 1):
        scored = score(logits, on_device(split, context, device))
        values.append(scores(scored.stats).accuracy if scored.finite else math.nan)
        set_part(fitting + (1 - fitting) * number / (1 + len(PAIRS)), 1)
    clean, means = values[0], np.reshape(values[1:], (len(CORRUPTIONS), len(SEVERITIES))).mean(1).tolist()
    accuracies = (*means, float(np.mean(means)))
    if math.isnan(clean) or math.isnan(accuracies[-1]):
        return [{"column": column} for column in CORRUPTED]
    return [
        {"column": column, "accuracy": value, "degradation": 1 - value / clean if clean else None}
        for column, value in zip(CORRUPTED, accuracies, strict=True)
    ]


def _clean_and_corrupted(shared: SharedContext, item: RowTask) -> Iterator[Split]:
    """Yield the test split, then its images under each corruption and severity."""
    yield shared.context.split
    for name, severity in PAIRS:
        yield corrupted_test(shared.dataset, name, severity, source=item.corruptions, seed=0, cache=item.cache)


class CostTask(NamedTuple):
    """A cost to measure."""

    config: Config
    steps: int


def run_cost_task(shared: None, item: CostTask, device: str) -> Cost:
    """Measure the cost of a step in a separate process."""
    return measure(item.config, device, item.steps)
