"""`fbpc evaluate --coreset PATH`: SGHMC, or trained networks, on a coreset of any origin."""

from collections.abc import Set
from typing import Any, NamedTuple

import numpy as np

from fbpc_ray.commands import planning, summary
from fbpc_ray.core import files
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log, resume_hint
from fbpc_ray.core.provenance import capture
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import place
from fbpc_ray.data import coreset_reader
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import calibration, protocols, results
from fbpc_ray.evaluation.evaluate import check_split, check_split_name, describe_evaluation
from fbpc_ray.evaluation.evaluate import evaluate as evaluate_coresets
from fbpc_ray.execution import memory_budget, memory_estimate, validation
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.coreset_settings import evaluation_settings
from fbpc_ray.execution.session import Session, load_data, network_specs
from fbpc_ray.execution.worker_group import cpu_threads


class Options(NamedTuple):
    """What `fbpc evaluate --coreset` takes beside the configuration."""

    split: str
    """test | validation."""
    pixels: coreset_reader.Pixels
    protocol: str
    """paper | calibrated."""
    random: bool = True
    """Whether to evaluate random images, too."""


def stored_settings(source: str, given: Set[str]) -> dict[str, Any]:
    """Return the settings that the file of the coreset at `source` has of its distillation, without those in `given`.

    Raises UserError for a value of another type, and where the networks have import paths and none is given.
    """
    stored = coreset_reader.settings_of(place(source))
    try:
        settings = evaluation_settings(stored, "architectures" in given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    taken = {name: value for name, value in settings.items() if name not in given}
    if taken:
        words = (protocols.flag_of(name, value) for name, value in taken.items())
        log(f"as the coreset was distilled: {' '.join(words)}")
    return taken


def evaluate(source: str, config: Config, options: Options, *, dry_run: bool, json: str) -> None:
    """Evaluate the coreset at `source` and, if asked, as many random real images, on the networks of `config`."""
    check_split_name(options.split)
    config = validation.validate(config)
    session, ipc = _open(source, config.updated(download=False) if dry_run else config, options)
    config = session.config
    if dry_run:
        planning.describe(session, parts=("chains",))
        return
    dataset, specs, candidates, split = session.dataset, session.specs, session.coresets, options.split
    with open_backend(config, Interruption(), log) as workers, resume_hint("nothing was written"):
        provenance = capture(workers.describe())
        log(describe_evaluation(candidates, specs, split, config.evaluation))
        scored = evaluate_coresets(candidates, specs, dataset, split, config, workers, log)
        calibrated = None
        if options.protocol == protocols.CALIBRATED:
            calibrated = calibration.calibrated(candidates, specs, dataset, split, config, workers, log)
    result = results.result_of(config, dataset, [], scored.to_json(), split, provenance, cpu_threads(config))
    of_a_run = ("method", "steps", "seed", "seconds_per_step", "map_endings")
    result = {name: value for name, value in result.items() if name not in of_a_run}
    result |= {"calibrated": calibrated.to_json()} if calibrated else {}
    images = len(candidates["given"].labels)
    files.write_output(json, result | {"ipc": ipc, "images": images, "coreset": source})
    log(calibration.tables(protocols.of_result(result), scored.scores, calibrated))
    counts = len(dataset.classes), result["images_scored"]
    if text := summary.describe(scored.scores, *counts, split, advice=False):
        log(f"\n{text}")


def _open(source: str, config: Config, options: Options) -> tuple[Session, int | None]:
    """Read the coreset and the data set.

    Returns:
        A session without experts, of the coreset and, if asked, random real images; images per class, None where
        classes differ in it.

    Raises UserError for data or a coreset that can't be read, and chains that cannot fit into memory.
    """
    dataset = load_data(config, log)
    check_split(dataset, options.split)
    calibration.check(options.protocol, config.evaluation, dataset, "give --validation 0.1")
    given, notes = coreset_reader.load(place(source), dataset, options.pixels)
    for note in notes:
        log(f"note: {note}")
    dataset = dataset._replace(mean=given.mean, std=given.std)
    specs, m = network_specs(config, dataset), len(given.labels)
    images = len(dataset.train.labels)
    config = memory_budget.with_chunks(config, specs, images=images, coreset=m, distils=False)
    chains = (1 + options.random) * len(specs) * config.evaluation.num_chains
    memory_estimate.check(config, specs, ["evaluation"], coreset=m, chains=chains, source=source)
    counts = set(given.labels.bincount(minlength=len(dataset.classes)).tolist())
    ipc = counts.pop() if len(counts) == 1 else None
    random = _random(dataset, ipc, config.distillation.seed) if options.random else {}
    candidates = random | {"given": given}
    config = config.updated(ipc=ipc or -(-m // len(dataset.classes)))
    return Session(config, dataset, specs, [], coresets=candidates), ipc


def _random(dataset: Dataset, ipc: int | None, seed: int) -> dict[str, Coreset]:
    """Draw as many real images as a run of this seed starts from; log why and return none for unequal class sizes."""
    if ipc is None or np.bincount(dataset.train.labels).min() < ipc:
        log("note: no random images beside it: its classes have different numbers of images, or more than there are")
        return {}
    first, labels = initial_state(dataset, ipc, seed)
    return {"random": Coreset(first.images, labels, dataset.mean, dataset.std, dataset.classes)}
