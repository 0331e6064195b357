"""Write the card of an exported coreset: README.md, with the header of the Hugging Face Hub."""

import json
import re
import shlex
from dataclasses import asdict
from typing import Any

from fbpc_ray.core.config import Config, Data
from fbpc_ray.core.presets import to_preset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import denormalise
from fbpc_ray.evaluation import results
from fbpc_ray.reporting import image_grids
from fbpc_ray.reporting.image_grids import PICTURED
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


HUB_TAGS = ["dataset-distillation", "coreset", "bayesian-neural-networks", "fbpc-ray"]
PICTURE, CONFIG, PROVENANCE, SCORES = "images.png", "config.json", "provenance.json", "scores.json"
"""Files beside the card of a folder for the Hub."""


def card(coreset: Coreset, kind: str, settings: Config, facts: dict[str, str], result: dict[str, Any] | None) -> str:
    """Return README.md of an export: picture, scores, how to read it, what made it, and the source's licence."""
    m, c = coreset.images.shape[:2]
    lines = _hub_header(coreset, facts) if kind == "hf" else []
    lines += [f"# {escape(_title(facts, m, coreset))}", ""]
    if kind == "hf" and c in PICTURED:
        lines += [f"![the images, by class]({PICTURE})", ""]
    lines += [
        *_summary(facts, coreset), "",
        *_scores(result),
        *_command(settings, facts),
        "## How to read it", "", READING[kind], "",
        "Pixels are normalised: those in 0..1 are `pixels * std + mean`, a channel each, and test images must be",
        "normalised by the same numbers.", "",
        f"* mean: {list(coreset.mean)}", f"* std: {list(coreset.std)}",
        f"* classes, from label 0: {', '.join(map(escape, coreset.classes))}",
        *SOFT_LABELS[: coreset.soft_labels is not None], "",
        *_origin(settings, facts, result),
        "## Licence of the source", "", f"The images are derived from {_licence(facts)[1]}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _summary(facts: dict[str, str], coreset: Coreset) -> list[str]:
    """Describe the images in a sentence."""
    size, data = " x ".join(map(str, coreset.image_shape)), escape(facts["data"])
    images = f"images ({size}) of {len(coreset.classes)} classes"
    if facts.get("method") == "random":
        return [f"{len(coreset.labels)} real {images}, drawn at random from the training images of {data}."]
    return [
        f"{len(coreset.labels)} synthetic {images} that stand for all training images",
        f"of {data}: a Bayesian pseudocoreset, on which networks are sampled, or trained, as on",
        "everything.",
    ]


def companions(
    coreset: Coreset, settings: Config, facts: dict[str, str], result: dict[str, Any] | None
) -> dict[str, bytes]:
    """Return the files beside the card for the Hub: picture, settings, provenance, and scores where there are any."""
    contents: dict[str, Any] = {CONFIG: _settings(settings, facts), PROVENANCE: dict(facts)}
    if result:
        contents[PROVENANCE] |= {name: result[name] for name in ("versions", "device", "threads") if name in result}
        names = "split", "images_scored", "inference", "protocol", "chain_settings", "eval_seeds", "coresets", "mixing"
        contents[SCORES] = {name: result[name] for name in names if name in result}
    outputs = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in contents.items()}
    if coreset.images.shape[1] in PICTURED:
        pixels = denormalise(coreset.images, coreset.mean, coreset.std).numpy()
        outputs[PICTURE] = image_grids.coreset_png(pixels, coreset.labels.numpy(), coreset.classes)
    return outputs


def _hub_header(coreset: Coreset, facts: dict[str, str]) -> list[str]:
    """Return the YAML header that the Hub reads, each value as JSON."""
    m, c, h, w = coreset.images.shape
    names = {str(label): name for label, name in enumerate(coreset.classes)}
    head = {
        **_licence(facts)[0], "task_categories": ["image-classification"], "size_categories": [_size(m)],
        "pretty_name": _title(facts, m, coreset), "tags": HUB_TAGS,
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        "dataset_info": {
            "features": [
                *([{"name": "image", "dtype": "image"}] if c in PICTURED else []),
                {"name": "pixels", "dtype": {"array3_d": {"shape": [c, h, w], "dtype": "float32"}}},
                {"name": "label", "dtype": {"class_label": {"names": names}}},
                *([{"name": "soft_label", "sequence": "float32"}] if coreset.soft_labels is not None else []),
            ],
        },
    }  # fmt: skip
    front = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    return ["---", *front, "---", ""]


def _size(m: int) -> str:
    """Return the Hub's category of m examples."""
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K"}
    return next((name for bound, name in bounds.items() if m < bound), "100K<n<1M")


def _licence(facts: dict[str, str]) -> tuple[dict[str, str], str]:
    unknown = {"license": "unknown"}, "images whose licence the run did not record: ask for it before you share these"
    return LICENCES.get(facts["data"], unknown)


def _settings(settings: Config, facts: dict[str, str]) -> dict[str, Any]:
    """Return the settings that make the result, without folders of this machine."""
    used = json.loads(to_preset(settings))
    return {name: value for name, value in used.items() if name != "experts"} | {"data": facts["data"]}


def _scores(result: dict[str, Any] | None) -> list[str]:
    if not result:
        return []
    inference = INFERENCES.get(result.get("inference", "sghmc"), _text_of(result, "inference"))
    protocol = f" (protocol {_text_of(result, 'protocol')})" if "protocol" in result else ""
    return [
        "## Scores", "", "```", _unfenced(results.table(results.from_json(result["coresets"]))), "```", "",
        f"Of {inference}{protocol}, mean and standard deviation over seeds, on "
        f"{_text_of(result, 'images_scored')} {_text_of(result, 'split')} images.", "",
    ]  # fmt: skip


SPLITTING = ("label_column", "image_column", "normalisation", "validation", "test", "data_seed")
"""Settings of the data that an evaluation needs, and does not take from the export."""


def _command(settings: Config, facts: dict[str, str]) -> list[str]:
    """Return the command that scores the images on the same splits; networks and chains are those of the export."""
    used, usual = asdict(settings.data), asdict(Data())
    words = ["fbpc", "evaluate", "--coreset", "PATH", "--data", " ".join(facts["data"].split())]
    for name in SPLITTING:
        if used[name] != usual[name]:
            words += [f"--{name.replace('_', '-')}", " ".join(str(used[name]).split())]
    command = _unfenced(shlex.join(words))
    return ["fbpc-ray scores these images, and as many random real ones, by", "", "```sh", command, "```", ""]


def _origin(settings: Config, facts: dict[str, str], result: dict[str, Any] | None) -> list[str]:
    """Return the section on method, commit, data, machine and settings."""
    lines = [
        "## What made it", "",
        f"* method {_code(facts, 'method')}, step {escape(facts.get('step', 'unknown'))}, by fbpc-ray, commit "
        f"{_code(facts, 'commit')}",
    ]  # fmt: skip
    if "fingerprint" in facts:
        lines.append(f"* from training images of fingerprint {_code(facts, 'fingerprint')}")
    if result:
        versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        lines.append(f"* on {_text_of(result, 'device')}; {escape(versions)}")
    block = _unfenced(json.dumps(_settings(settings, facts), indent=2))
    return [*lines, "", "Settings:", "", "```json", block, "```", ""]


def _text_of(result: dict[str, Any], name: str) -> str:
    return escape(str(result.get(name, "unknown")))


def _code(facts: dict[str, str], name: str) -> str:
    """Return a fact as a span of code, whatever its characters."""
    return f"`{' '.join(facts.get(name, 'unknown').replace('`', ' ').split())}`"


def _unfenced(text: str) -> str:
    """Return `text` without the marks that would end a block of code."""
    return re.sub("`{3,}", "` `", text)


def _title(facts: dict[str, str], m: int, coreset: Coreset) -> str:
    name, ipc = facts["data"].rpartition(":")[2], m / len(coreset.classes)
    method = facts.get("method", "fbpc-ray")
    origin = "drawn at random" if method == "random" else f"by {method}"
    return f"{name}, {ipc:g} image{'' if ipc == 1 else 's'} per class, {origin}"


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
    "png": "One folder per class, LABEL-NAME, one file per image, rounded to 8 bits: for the eye, and for\n"
    "`torchvision.datasets.ImageFolder`.",
    "npz": "", "safetensors": "",  # they have no card
}  # fmt: skip
