"""The protocol `calibrated`: temperature and prior of the lowest NLL on the validation split.

Test images never choose them. Their scores are reported beside those of the protocol `paper`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log, progress
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.evaluation import diagnostics
from fbpc_ray.evaluation.chains import flags_to_lower
from fbpc_ray.evaluation.evaluate import EvaluationResult, evaluate
from fbpc_ray.evaluation.protocols import CALIBRATED
from fbpc_ray.evaluation.results import ChainScore, mean_scores, table
from fbpc_ray.models.functional import Spec

TEMPERATURES = (0.0, 1e-4, 1e-3, 1e-2)
"""Values of --chain-d that are tried, beside that of the run."""
PRIORS = (0.05, 0.5, 3.0)
"""Values of --chain-weight-decay that are tried, beside that of the run."""


class Candidate(NamedTuple):
    """Chain settings and their scores on the validation split."""

    chain_d: float
    chain_weight_decay: float
    scores: dict[str, float]
    """Means over networks and chains; empty where a chain diverged."""


class Calibrated(NamedTuple):
    """An evaluation under the protocol `calibrated`."""

    evaluation: Evaluation
    """The settings that were chosen."""
    candidates: list[Candidate]
    result: EvaluationResult

    @property
    def flags(self) -> str:
        """The chosen settings, as flags."""
        return f"--chain-d {self.evaluation.chain_d:g} --chain-weight-decay {self.evaluation.chain_weight_decay:g}"

    def to_json(self) -> dict[str, Any]:
        """Return the key `calibrated` of result.json."""
        return {
            "protocol": CALIBRATED, "chain_d": self.evaluation.chain_d,
            "chain_weight_decay": self.evaluation.chain_weight_decay,
            "candidates": [candidate._asdict() for candidate in self.candidates], **self.result.to_json(),
        }  # fmt: skip


def check(protocol: str, settings: Evaluation, dataset: Dataset, fix: str) -> None:
    """Raise UserError, ending in `fix`, if chains cannot be calibrated."""
    if protocol != CALIBRATED:
        return
    if settings.inference != "sghmc":
        raise UserError(
            f"--protocol calibrated: --inference {settings.inference} has no chains; add --inference sghmc, or leave "
            "out --protocol"
        )
    if not len(dataset.validation.labels):
        raise UserError(f"--protocol calibrated: there is no validation split; {fix}")


def candidates(settings: Evaluation) -> Iterator[Evaluation]:
    """Yield one-chain settings for every temperature and prior, those of `settings` among them."""
    temperatures = sorted({*TEMPERATURES, settings.chain_d})
    for d, decay in product(temperatures, sorted({*PRIORS, settings.chain_weight_decay})):
        yield replace(settings, chain_d=d, chain_weight_decay=decay, num_chains=1)


def best_of(results: Sequence[Candidate], settings: Evaluation, coresets: dict[str, Coreset]) -> Candidate:
    """Return the candidate with the lowest NLL. Raises UserError where all diverged."""
    finite = [candidate for candidate in results if candidate.scores]
    if not finite:
        flags = flags_to_lower(settings, max(len(each.labels) for each in coresets.values()))
        raise UserError(f"--protocol calibrated: all chains diverged; lower {flags}", code=1)
    return min(finite, key=lambda candidate: candidate.scores["nll"])


def choose(
    coresets: dict[str, Coreset], specs: Sequence[Spec], dataset: Dataset, config: Config, workers: TaskRunner, log: Log
) -> tuple[Config, list[Candidate]]:
    """Return `config` with the settings of the lowest NLL on the validation split, and all candidates.

    Args:
        coresets: those that choose, by name.

    Raises UserError where all chains diverged.
    """
    settings, results = [*candidates(config.evaluation)], []
    log(f"calibrating on {len(dataset.validation.labels):,} validation images: {len(settings)} settings of the chains")

    def log_setting(line: str) -> None:
        if not line.startswith(diagnostics.NOT_MIXED):  # of one short chain
            log(f"setting {len(results) + 1}/{len(settings)}: {line}")

    with progress("calibrate", len(settings), "setting", log=log) as bar:
        for one in settings:
            changed = replace(config, evaluation=one)
            scored = evaluate(coresets, specs, dataset, "validation", changed, workers, log_setting)
            results.append(Candidate(one.chain_d, one.chain_weight_decay, mean_scores(scored.scores)))
            bar.update()
    best = best_of(results, config.evaluation, coresets)
    log(
        f"calibrated: --chain-d {best.chain_d:g} --chain-weight-decay {best.chain_weight_decay:g} has the lowest "
        f"validation NLL of {len(results)} settings, {best.scores['nll']:.3f}"
    )
    return config.updated(chain_d=best.chain_d, chain_weight_decay=best.chain_weight_decay), results


def calibrated(
    coresets: dict[str, Coreset], specs: Sequence[Spec], dataset: Dataset, split: str, config: Config,
    workers: TaskRunner, log: Log,
) -> Calibrated:  # fmt: skip
    """Choose temperature and prior for the coresets that are not random, and score all with them on `split`.

    Raises UserError where all chains diverged.
    """
    chosen = {name: each for name, each in coresets.items() if name != "random"} or coresets
    config, results = choose(chosen, specs, dataset, config, workers, log)
    if split == "validation":
        log("note: the calibrated scores are of the images that chose the settings")
    return Calibrated(config.evaluation, results, evaluate(coresets, specs, dataset, split, config, workers, log))


def tables(protocol: str, scores: Sequence[ChainScore], calibrated: Calibrated | None = None) -> str:
    """Return the table of scores below the name of its protocol, and that of the calibrated chains if there is one."""
    parts = [f"protocol {protocol}:\n{table(scores)}" if protocol else table(scores)]
    if calibrated:
        title = f"protocol {CALIBRATED} ({calibrated.flags}, chosen on the validation split):"
        parts.append(f"{title}\n{table(calibrated.result.scores)}")
    return "\n" + "\n\n".join(parts)
