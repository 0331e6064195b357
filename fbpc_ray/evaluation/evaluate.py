"""Score coresets on a split: SGHMC chains on every coreset and network, run as tasks."""

from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import numpy as np

from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log, progress
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.core.types import Params
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.evaluation import diagnostics
from fbpc_ray.evaluation.chains import (
    Chain,
    ChainResult,
    arrays_of,
    evaluation_context,
    flags_to_lower,
    quantities,
    run_chain,
    values,
    without_impossible_compilation,
)
from fbpc_ray.evaluation.diagnostics import Mixing, mixing
from fbpc_ray.evaluation.last_layer import RUNNERS
from fbpc_ray.evaluation.results import ChainScore, to_json
from fbpc_ray.inference.metrics import PredictiveStats
from fbpc_ray.inference.uncertainty import Uncertainty
from fbpc_ray.models.functional import Spec


class EvaluationResult(NamedTuple):
    """Scores of every chain, and what charts and models are made from. Keys are (coreset, architecture)."""

    scores: list[ChainScore]
    """By coreset, architecture and seed, in their orders."""
    quantities: tuple[str, ...]
    """Names of the values of a chain that did not diverge."""
    stats: dict[tuple[str, str], PredictiveStats]
    """The sums of all chains, for a reliability diagram; no entry where all chains diverged."""
    uncertainty: dict[tuple[str, str], tuple[Uncertainty, Uncertainty]]
    """Of in-distribution and out-of-distribution images, from the first chain; no entries without OOD images."""
    samples: dict[tuple[str, str], list[Params]]
    """Posterior samples of the first chain, for the coreset that `evaluate` was asked to keep."""

    mixing: list[Mixing]
    """By coreset and architecture; empty where samples are too few, or are no chain's."""

    def to_json(self) -> dict[str, Any]:
        """Return the keys of result.json that hold scores."""
        return {
            "coresets": to_json(self.scores, self.quantities), "mixing": diagnostics.to_json(self.mixing)
        }  # fmt: skip


def collect(chains: Sequence[Chain], results: Sequence[ChainResult], quantities: tuple[str, ...]) -> EvaluationResult:
    """Collect the results of chains, in the order of `chains`."""
    evaluation = EvaluationResult([], quantities, {}, {}, {}, [])
    traces: dict[tuple[str, str], list[np.ndarray]] = {}
    for chain, result in zip(chains, results, strict=True):
        key = chain.coreset, chain.spec.architecture
        evaluation.scores.append(ChainScore(*key, chain.seed, values(result) or None))
        if result.stats is not None:
            evaluation.stats[key] = evaluation.stats[key] + result.stats if key in evaluation.stats else result.stats
        if chain.seed == 0 and result.in_distribution is not None and result.out_of_distribution is not None:
            evaluation.uncertainty[key] = result.in_distribution, result.out_of_distribution
        if result.samples is not None:
            evaluation.samples[key] = result.samples
        if result.traces is not None:
            traces.setdefault(key, []).append(result.traces)
    evaluation.mixing.extend(one for key, of_chains in traces.items() if (one := mixing(*key, of_chains)))
    return evaluation


def check_split_name(split: str) -> None:
    """Raise UserError for other splits than test and validation."""
    if split not in ("test", "validation"):
        raise UserError(f"--split {split}: must be test or validation")


def check_split(dataset: Dataset, split: str, fix: str = "give --validation 0.1") -> None:
    """Raise UserError for a split without images; `fix` says how to get a validation split."""
    if not len(getattr(dataset, split).labels):
        raise UserError(f"the {split} split is empty: {fix if split == 'validation' else 'choose another data set'}")


def evaluate(
    coresets: dict[str, Coreset], specs: Sequence[Spec], dataset: Dataset, split: str, config: Config,
    workers: TaskRunner, log: Log, ood: Split | None = None, keep_samples_of: str = "",
) -> EvaluationResult:  # fmt: skip
    """Run SGHMC on every coreset and network and score the chains on `split` (test or validation).

    Args:
        coresets: by name.
        ood: out-of-distribution images, for the AUROC of the uncertainty.
        keep_samples_of: name of the coreset whose first chain's samples are returned.

    The log names the chains that diverged: a parameter or a prediction is not finite. Raises UserError for an empty
    split.
    """
    settings = config.evaluation
    arrays = {name: arrays_of(c) for name, c in coresets.items()}
    context = evaluation_context(
        dataset,
        split,
        settings,
        config.networks.augment,
        arrays,
        ood,
        config.workers.compiled_chains,
        config.networks.chunk_images,
    )
    check_split(dataset, split)
    chains = [
        Chain(name, spec, seed, keep_samples=name == keep_samples_of and seed == 0)
        for name in coresets
        for spec in specs
        for seed in range(settings.num_chains)
    ]
    run = RUNNERS.get(settings.inference, run_chain)
    if run is run_chain:
        context = without_impossible_compilation(context, chains, workers.device, log)
    results: dict[int, ChainResult] = {}
    with progress("evaluate", len(chains), "chain", log=log) as bar:
        for index, result in workers.map(run, context, chains):
            bar.update()
            results[index] = result
            if result.stats is None:
                chain = chains[index]
                which = f"{chain.coreset} on {chain.spec.architecture}, seed {chain.seed}"
                flags = flags_to_lower(settings, len(arrays[chain.coreset].labels))
                log(f"warning: a chain diverged ({which}): lower {flags}")
    evaluation = collect(chains, [results[index] for index in range(len(chains))], quantities(context))
    if run is not run_chain:
        return evaluation._replace(mixing=[])
    if line := diagnostics.describe(evaluation.mixing):
        log(line)
    return evaluation


def describe_evaluation(coresets: Sized, specs: Sized, split: str, settings: Evaluation) -> str:
    """Return the line that announces an evaluation: it may take longer than the distillation."""
    parts = ((len(coresets), "coreset"), (len(specs), "network"), (settings.num_chains, "seed"))
    product = " x ".join(f"{count} {noun}{'s' if count > 1 else ''}" for count, noun in parts)
    count = len(coresets) * len(specs) * settings.num_chains
    if settings.inference != "sghmc":
        steps = f"{settings.net_steps:,} training steps"
        return f"evaluating on the {split} split by {settings.inference}: {count} times ({product}), {steps} a network"
    return f"evaluating on the {split} split: {count} chains ({product}) of {settings.chain_epochs:,} epochs"
