"""`fbpc export`, and `fbpc evaluate --coreset`."""

import json as json_format
import re
from pathlib import Path
from typing import Any

import numpy as np

from fbpc_ray.commands import planning
from fbpc_ray.core import files
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import to_preset
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
from fbpc_ray.execution import validation
from fbpc_ray.execution.session import Session, cpu_threads, load_data, network_specs, open_backend
from fbpc_ray.reporting.markdown import escape

LICENCES: dict[str, tuple[dict[str, str], str]] = {
    "digits": (
        {"license": "cc-by-4.0"},
        "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998), UCI Machine Learning Repository, "
        "under CC BY 4.0: name its authors; scikit-learn ships its test set",
    ),
    "cifar10": (
        {"license": "unknown"},
        "CIFAR-10, which states no licence; its author asks to be cited: A. Krizhevsky, Learning Multiple Layers of "
        "Features from Tiny Images, 2009",
    ),
    "cifar100": (
        {"license": "unknown"},
        "CIFAR-100, which states no licence; its author asks to be cited: A. Krizhevsky, Learning Multiple Layers of "
        "Features from Tiny Images, 2009",
    ),
    "tiny-imagenet": (
        {"license": "other", "license_name": "imagenet", "license_link": "https://www.image-net.org/download.php"},
        "Tiny-ImageNet (Stanford CS231n), a part of ImageNet, whose terms of access allow non-commercial research and "
        "education only",
    ),
}
"""Data set -> the licence of its images: as fields of the Hub's card, and in words."""


def export(folder: Place, kind: str, out: str) -> None:
    """Write the coreset of the run in `folder` to `out`, a new path, in format `kind`; print the path."""
    run, settings = RunDirectory(folder), read_config(folder)
    found = run.read_coreset(settings)
    data = _short(settings.data.data)
    written = coreset.metadata(run.coreset_path)
    facts = {name: written[name] for name in ("method", "step", "commit") if name in written} | {"data": data}
    try:
        result = run.read_result()
    except UserError:  # an export goes without a result
        result = None
    if result and not results.is_of_step(result, facts.get("step")):
        result = None
    default = run.folder.name if kind in coreset_formats.SINGLE else f"{run.folder.name}-{kind}"
    target = coreset_formats.named(local_folder(out, "--out") if out else home() / "exports" / default, kind)
    coreset_formats.write(coreset_formats.files(found, kind, facts, card(found, kind, settings, facts, result)), target)
    log(f"export: {target}")
    if kind == "png":
        log(
            "note: png is for the eye: it rounds to 8 bits a channel, as `fbpc evaluate --coreset` then reads it; "
            "hf, safetensors, pt and npz are exact"
        )
        if found.soft_labels is not None:
            log("note: png leaves the learned soft labels out; the other formats have them")


def _short(data: str) -> str:
    """Return the name of a data set without the folders of this machine."""
    kind, colon, path = data.partition(":")
    return f"{kind}:{Path(path).name}" if colon else data


def card(found: Coreset, kind: str, settings: Config, facts: dict[str, str], result: dict[str, Any] | None) -> str:
    """Return README.md of an export: contents, how to read it, settings, scores, and the source's licence."""
    m, c, h, w = found.images.shape
    licence, source = LICENCES.get(
        facts["data"], ({"license": "unknown"}, "Unknown: the licence of the images that it was made from")
    )
    names = {str(label): name for label, name in enumerate(found.classes)}
    head = {
        **licence, "task_categories": ["image-classification"], "pretty_name": _title(facts, m, found),
        "tags": ["dataset-distillation", "pseudocoreset"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        "dataset_info": {
            "features": [
                *([{"name": "image", "dtype": "image"}] if c in (1, 3) else []),
                {"name": "pixels", "dtype": {"array3_d": {"shape": [c, h, w], "dtype": "float32"}}},
                {"name": "label", "dtype": {"class_label": {"names": names}}},
                *([{"name": "soft_label", "sequence": "float32"}] if found.soft_labels is not None else []),
            ],
        },
    }  # fmt: skip
    front = [f"{key}: {json_format.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    used = json_format.loads(to_preset(settings))
    used = {name: value for name, value in used.items() if name != "experts"} | {"data": facts["data"]}
    lines = ["---", *front, "---", ""] if kind == "hf" else []
    lines += [
        f"# {escape(_title(facts, m, found))}", "",
        f"{m} synthetic images ({c} x {h} x {w}) of {len(found.classes)} classes that stand for all training images of",
        f"{escape(facts['data'])}: a Bayesian pseudocoreset, on which networks are sampled, or trained, as on",
        "everything.", "",
        "## How to read it", "", READING[kind], "",
        "Pixels are normalised: those in 0..1 are `pixels * std + mean`, a channel each, and test images must be",
        "normalised by the same numbers.", "",
        f"* mean: {list(found.mean)}", f"* std: {list(found.std)}",
        f"* classes, from label 0: {', '.join(map(escape, found.classes))}",
        *SOFT_LABELS[: found.soft_labels is not None], "",
        "## What made it", "",
        f"* method {_code(facts, 'method')}, step {escape(facts.get('step', 'unknown'))}, by fbpc-ray, commit "
        f"{_code(facts, 'commit')}",
    ]  # fmt: skip
    if result:
        versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        table = results.table(results.from_json(result["coresets"]))

        def of(name: str) -> str:
            return escape(str(result.get(name, "unknown")))

        lines += [
            f"* on {of('device')}; {escape(versions)}", "", "```", _unfenced(table), "```", "",
            f"Of {INFERENCES.get(result.get('inference', 'sghmc'), of('inference'))}, mean and standard deviation over "
            f"seeds, on {of('images_scored')} images of {of('split')}.",
        ]  # fmt: skip
    lines += ["", "Settings:", "", "```json", _unfenced(json_format.dumps(used, indent=2)), "```", ""]
    lines += ["## Licence of the source", "", f"{source}. The images are derived from it.", ""]
    return "\n".join(lines)


def _code(facts: dict[str, str], name: str) -> str:
    """Return a fact as a span of code, whatever its characters."""
    return f"`{' '.join(facts.get(name, 'unknown').replace('`', ' ').split())}`"


def _unfenced(text: str) -> str:
    """Return `text` without the marks that would end a block of code."""
    return re.sub("`{3,}", "` `", text)


def _title(facts: dict[str, str], m: int, found: Coreset) -> str:
    name, ipc = facts["data"].rpartition(":")[2], m / len(found.classes)
    return f"{name}, {ipc:g} image{'' if ipc == 1 else 's'} a class, by {facts.get('method', 'fbpc-ray')}"


INFERENCES = {
    "sghmc": "SGHMC",
    "last-layer": "a closed-form last layer on a network trained by squared loss",
    "mse": "the softmax of a network trained by squared loss",
    "ensemble": "an ensemble of networks trained by squared loss",
}
SOFT_LABELS = [
    "* labels were learned: the soft labels are logits, (m, classes) float32, in the column `soft_label`, the file "
    "`soft_labels_best.pt` or the array `soft_labels`; train on their softmax, or on them as regression targets"
]

READING = {
    "hf": """```python
from datasets import load_dataset

coreset = load_dataset("PATH", split="train").with_format("torch")[:]
images, labels = coreset["pixels"], coreset["label"]  # (m, c, h, w) float32, normalised; (m,) int64
```

`image` is the same in 8 bits, to look at; `pixels` are what was learned.""",
    "pt": """```python
images = torch.load("images_best.pt", weights_only=True)  # (m, c, h, w) float32, normalised
labels = torch.load("labels_best.pt", weights_only=True)  # (m,) int64
```""",
    "png": "One folder a class, LABEL-NAME, one file an image, rounded to 8 bits: for the eye, and for\n"
    "`torchvision.datasets.ImageFolder`.",
    "npz": "", "safetensors": "",  # they have no card
}  # fmt: skip


def evaluate(
    source: str, settings: Config, split: str, pixels: coreset_reader.Pixels, *, dry_run: bool, json: str
) -> None:
    """SGHMC on the coreset at `source` and on as many random real images, on the networks of `settings`."""
    if split not in ("test", "validation"):
        raise UserError(f"--split {split}: choose test or validation")
    settings = validation.canonical(settings)
    validation.check(settings)
    dataset = load_data(settings.updated(download=False) if dry_run else settings, log)
    given, notes = coreset_reader.load(place(source), dataset, pixels)
    for note in notes:
        log(f"note: {note}")
    dataset = dataset._replace(mean=given.mean, std=given.std)
    specs = network_specs(settings, dataset)
    counts = set(given.labels.bincount(minlength=len(dataset.classes)).tolist())
    ipc = counts.pop() if len(counts) == 1 else None
    candidates = _random(dataset, ipc, settings.distillation.seed) | {"given": given}
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
    files.write_output(json, result | {"ipc": ipc, "images": len(given.labels), "coreset": source})
    log(f"\n{results.table(scored.scores)}")


def _random(dataset: Dataset, ipc: int | None, seed: int) -> dict[str, Coreset]:
    """As many real images, drawn as a run of this seed begins; none, said, where the classes are not of one size."""
    if ipc is None or np.bincount(dataset.train.labels).min() < ipc:
        log("note: no random images beside it: its classes have different numbers of images, or more than there are")
        return {}
    first, labels = initial_state(dataset, ipc, seed)
    return {"random": Coreset(first.images, labels, dataset.mean, dataset.std, dataset.classes)}
