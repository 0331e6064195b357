"""Choose temperature and prior of chains on the validation split, never on test images (--tune-chain)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.evaluation.evaluate import evaluate
from fbpc_ray.evaluation.results import mean_scores
from fbpc_ray.models.functional import Spec

TEMPERATURES = (0.0, 1e-4, 1e-3, 1e-2)
"""Values of --chain-d that are tried."""
PRIORS = (0.05, 0.5, 3.0)
"""Values of --chain-weight-decay that are tried."""


class Candidate(NamedTuple):
    """Chain settings and their scores on the validation split."""

    chain_d: float
    chain_weight_decay: float
    scores: dict[str, float]
    """Means over networks and chains; empty where a chain diverged."""


def candidates(settings: Evaluation) -> Iterator[Evaluation]:
    """Yield one-chain settings for every temperature and prior."""
    for d, decay in product(TEMPERATURES, PRIORS):
        yield replace(settings, chain_d=d, chain_weight_decay=decay, num_chains=1)


def best_of(results: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the lowest NLL. Raises UserError where all diverged."""
    finite = [candidate for candidate in results if candidate.scores]
    if not finite:
        raise UserError("--tune-chain: all chains diverged; lower --chain-eta", code=1)
    return min(finite, key=lambda candidate: candidate.scores["nll"])


def tune_chain(
    coresets: dict[str, Coreset], specs: Sequence[Spec], dataset: Dataset, config: Config, workers: TaskRunner, log: Log
) -> tuple[Config, list[Candidate]]:
    """Return `config` with the settings of the lowest NLL on the validation split, and all candidates.

    Args:
        coresets: those that choose, by name.

    Raises UserError without a validation split, and where all chains diverged.
    """
    if not len(dataset.validation.labels):
        raise UserError("--tune-chain: the run has no validation split; distil with --validation 0.1")
    results = []
    for settings in candidates(config.evaluation):
        one = replace(config, evaluation=settings)
        scored = evaluate(coresets, specs, dataset, "validation", one, workers, lambda line: None)
        results.append(Candidate(settings.chain_d, settings.chain_weight_decay, mean_scores(scored.scores)))
    best = best_of(results)
    log(
        f"--tune-chain: --chain-d {best.chain_d:g} --chain-weight-decay {best.chain_weight_decay:g} has the lowest "
        f"validation NLL of {len(results)} settings, {best.scores['nll']:.3f}"
    )
    return config.updated(chain_d=best.chain_d, chain_weight_decay=best.chain_weight_decay), results


def to_json(config: Config, results: Sequence[Candidate]) -> dict[str, Any]:
    """Return what result.json says of the choice."""
    e = config.evaluation
    return {
        "chain_d": e.chain_d, "chain_weight_decay": e.chain_weight_decay,
        "candidates": [candidate._asdict() for candidate in results],
    }  # fmt: skip
