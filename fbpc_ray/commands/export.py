"""`fbpc export`, and `fbpc evaluate --coreset`."""

from pathlib import Path

import numpy as np

from fbpc_ray.commands import planning
from fbpc_ray.core import files
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log, resume_hint
from fbpc_ray.core.provenance import capture, home
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import Place, local_folder, place
from fbpc_ray.data import coreset, coreset_formats, coreset_reader
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import results
from fbpc_ray.evaluation.evaluate import describe_evaluation
from fbpc_ray.evaluation.evaluate import evaluate as evaluate_coresets
from fbpc_ray.execution import memory_budget, validation
from fbpc_ray.execution.session import Session, cpu_threads, load_data, network_specs, open_backend
from fbpc_ray.reporting import dataset_card


def export(folder: Place, kind: str, out: str) -> None:
    """Write the coreset of the run in `folder` to `out`, a new path, in format `kind`; print the path."""
    run, settings = RunDirectory(folder), read_config(folder)
    pseudocoreset = run.read_coreset(settings)
    data = _short(settings.data.data)
    metadata = coreset.metadata(run.coreset_path)
    names = "method", "step", "commit", "fingerprint"
    facts = {name: metadata[name] for name in names if name in metadata} | {"data": data}
    try:
        result = run.read_result()
    except UserError:  # an export goes without a result
        result = None
    if result and not results.is_of_step(result, facts.get("step")):
        result = None
    default = run.folder.name if kind in coreset_formats.SINGLE else f"{run.folder.name}-{kind}"
    target = coreset_formats.with_kind_suffix(local_folder(out, "--out") if out else home() / "exports" / default, kind)
    card = dataset_card.card(pseudocoreset, kind, settings, facts, result)
    outputs = coreset_formats.files(pseudocoreset, kind, facts, card)
    if kind == "hf":
        outputs |= dataset_card.companions(pseudocoreset, settings, facts, result)
    coreset_formats.write(outputs, target)
    log(f"export: {target}")
    if kind == "png":
        log(
            "note: png is for the eye: it rounds to 8 bits a channel, as `fbpc evaluate --coreset` then reads it; "
            "hf, safetensors, pt and npz are exact"
        )
        if pseudocoreset.soft_labels is not None:
            log("note: png leaves the learned soft labels out; the other formats have them")


def _short(data: str) -> str:
    """Return the name of a data set without the folders of this machine."""
    kind, colon, path = data.partition(":")
    return f"{kind}:{Path(path).name}" if colon else data


def evaluate(
    source: str, settings: Config, split: str, pixels: coreset_reader.Pixels, *, dry_run: bool, json: str
) -> None:
    """Score the coreset at `source`, and as many random real images, by SGHMC on the networks of `settings`."""
    if split not in ("test", "validation"):
        raise UserError(f"--split {split}: must be test or validation")
    settings = validation.canonical(settings)
    validation.check(settings)
    dataset = load_data(settings.updated(download=False) if dry_run else settings, log)
    pseudocoreset, notes = coreset_reader.load(place(source), dataset, pixels)
    for note in notes:
        log(f"note: {note}")
    dataset = dataset._replace(mean=pseudocoreset.mean, std=pseudocoreset.std)
    specs = network_specs(settings, dataset)
    counts = set(pseudocoreset.labels.bincount(minlength=len(dataset.classes)).tolist())
    ipc = counts.pop() if len(counts) == 1 else None
    settings = memory_budget.with_chunks(
        settings, specs, images=len(dataset.train.labels), coreset=len(pseudocoreset.labels), distils=False
    )
    candidates = _random(dataset, ipc, settings.distillation.seed) | {"given": pseudocoreset}
    if dry_run:
        planning.describe(Session(settings.updated(ipc=ipc or 1), dataset, specs, []), parts=("chains",))
        return
    with open_backend(settings, Interruption(), log) as workers, resume_hint("nothing was written"):
        provenance = capture(workers.describe())
        log(describe_evaluation(candidates, specs, split, settings.evaluation))
        scored = evaluate_coresets(candidates, specs, dataset, split, settings, workers, log)
    result = results.result_of(settings, dataset, [], scored.to_json(), split, provenance, cpu_threads(settings))
    of_a_run = ("method", "steps", "seed", "seconds_per_step", "map_endings")
    result = {name: value for name, value in result.items() if name not in of_a_run}
    files.write_output(json, result | {"ipc": ipc, "images": len(pseudocoreset.labels), "coreset": source})
    log(f"\n{results.table(scored.scores)}")


def _random(dataset: Dataset, ipc: int | None, seed: int) -> dict[str, Coreset]:
    """Draw as many real images as a run of this seed starts from; log why and return none for unequal class sizes."""
    if ipc is None or np.bincount(dataset.train.labels).min() < ipc:
        log("note: no random images beside it: its classes have different numbers of images, or more than there are")
        return {}
    first, labels = initial_state(dataset, ipc, seed)
    return {"random": Coreset(first.images, labels, dataset.mean, dataset.std, dataset.classes)}
