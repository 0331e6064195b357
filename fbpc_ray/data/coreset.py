"""A pseudocoreset as plain data: images, labels, and the constants to display them.

One safetensors file holds one coreset: the tensors `images`, `labels` and, if labels were learned, `soft_labels`; and
in the metadata the format version, the normalisation and the names of the classes as JSON. Nothing is pickled.
"""

import base64
import html
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fbpc_ray.core import drawing, files, inputs, storage, tensor_files
from fbpc_ray.core.errors import UserError, escape_controls, reason_of
from fbpc_ray.core.storage import Place

if TYPE_CHECKING:
    from PIL import Image

FORMAT = "1"
OWN_KEYS = ("format", "mean", "std", "classes")
"""Keys of the header that say how to read the tensors."""
SHOWN = 100
"""Characters of a line of `repr`."""


class Coreset(NamedTuple):
    """m labelled images."""

    images: Tensor
    """(m, c, h, w) float32, normalised."""
    labels: Tensor
    """(m,) int64: the class of each image; of learned soft labels, the class that it began as."""
    mean: tuple[float, ...]
    """(c,): pixels in 0..1 are images * std + mean."""
    std: tuple[float, ...]
    """(c,)."""
    classes: tuple[str, ...]
    """Label -> its name."""
    soft_labels: Tensor | None = None
    """(m, d) float32 logits, where labels were learned: softmax gives p(class | image)."""
    facts: Mapping[str, str] = {}
    """Metadata of its file: `method`, `data`, `step`, and `settings` (JSON) of the networks and chains, ..."""

    def __repr__(self) -> str:
        return "\n".join(_describe(self))

    def _repr_html_(self) -> str:
        """Return the picture and the description, as notebooks show them."""
        lines = "<br>".join(html.escape(line) for line in _describe(self))
        try:
            png = drawing.draw_png(self)
        except (NotImplementedError, UserError):  # not by fbpc_ray.api, or of 2 channels
            return f"<p>{lines}</p>"
        picture = base64.b64encode(png).decode()
        return (
            f'<figure style="margin:0"><img style="max-width:100%" alt="the images, by class" '
            f'src="data:image/png;base64,{picture}"><figcaption>{lines}</figcaption></figure>'
        )

    def plot(self, title: str = "", max_per_class: int = 10, max_classes: int = 20) -> "Image.Image":
        """Draw the images by class, with the names of the classes. Raises UserError for other than 1 or 3 channels."""
        return drawing.draw(self, title=title, max_per_class=max_per_class, max_classes=max_classes)

    @property
    def likelihood_labels(self) -> Tensor:
        """Return the targets of cross-entropy: (m,) int64, or (m, d) float32 probabilities of soft labels."""
        return self.labels if self.soft_labels is None else self.soft_labels.softmax(1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w)"""
        c, h, w = self.images.shape[1:]
        return c, h, w


def _describe(coreset: Coreset) -> list[str]:
    """Return at most three lines: size, names of the classes, origin."""
    images, facts = coreset.images, coreset.facts
    shape = " x ".join(map(str, images.shape[1:]))
    labels = "learned soft labels" if coreset.soft_labels is not None else "hard labels"
    lines = [
        f"Coreset of {len(images)} images of {shape}, {len(coreset.classes)} classes, {labels}",
        f"classes: {', '.join(coreset.classes)}",
    ]
    settings = settings_of(coreset)
    if facts.get("method") == "random":
        lines.append(f"real images, drawn at random{', from ' + facts['data'] if 'data' in facts else ''}")
        settings, facts = {}, {}
    origin = [
        f"{label} {facts[name]}" for label, name in (("by", "method"), ("from", "data"), ("step", "step"))
        if name in facts
    ]  # fmt: skip
    if isinstance(names := settings.get("architectures"), list):
        origin.append(f"on {' '.join(map(str, names))}")
    if "width" in settings:
        origin.append(f"width {settings['width']}")
    if origin:
        lines.append(f"distilled {', '.join(origin)}")
    return [line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…" for line in map(escape_controls, lines)]


def settings_of(coreset: Coreset) -> dict[str, Any]:
    """Return the settings that the coreset was distilled with, as far as its metadata has them."""
    return parse_settings(coreset.facts)


def parse_settings(facts: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in the metadata of a coreset; none where it has none, or they are damaged."""
    try:
        settings = inputs.parse_json(facts.get("settings", "{}"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def balanced(labels: Tensor, ipc: int, classes: tuple[str, ...], source: torch.Generator) -> Tensor:
    """Draw ipc images of each class uniformly, without replacement; return their indices (ipc * d,), class by class.

    labels: (n,) int64. With the same `source` a smaller ipc draws a subset of a larger one's.
    Raises UserError where a class has fewer than ipc images.
    """
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, expected int64 (n,)")
    if ipc < 1:
        raise UserError(f"--ipc: must be 1 or more, got {ipc}")
    members = [(labels == label).nonzero().flatten() for label in range(len(classes))]
    sizes = [len(indices) for indices in members]
    if min(sizes) < ipc:
        smallest = sizes.index(min(sizes))
        raise UserError(
            f"class {classes[smallest]!r} has {sizes[smallest]} images, ipc is {ipc}: lower --ipc, or give more data"
        )
    return torch.cat([indices[torch.randperm(len(indices), generator=source)[:ipc]] for indices in members])


def save(coreset: Coreset, path: Place, metadata: dict[str, str] | None = None) -> None:
    """Write `coreset` to `path`, whole or not at all; otherwise as `dumps`."""
    files.write_bytes(path, dumps(coreset, metadata))


def dumps(coreset: Coreset, metadata: dict[str, str] | None = None) -> bytes:
    """Serialise `coreset` as safetensors, with its facts and `metadata` in the header.

    Raises ValueError for a coreset that `load` would refuse or for metadata under one of the file's own keys.
    """
    header = {
        "format": FORMAT,
        "mean": json.dumps(list(coreset.mean)),
        "std": json.dumps(list(coreset.std)),
        "classes": json.dumps(list(coreset.classes)),
    }
    metadata = {**coreset.facts, **(metadata or {})}
    metadata.pop(inputs.CHECKSUM, None)
    clashes = sorted(header.keys() & metadata.keys())
    wrong = f"metadata may not name {', '.join(clashes)}" if clashes else problem(coreset)
    if wrong:
        raise ValueError(f"not a coreset to save: {wrong}")
    names = ("images", "labels") if coreset.soft_labels is None else ("images", "labels", "soft_labels")
    tensors = {name: getattr(coreset, name).detach().cpu().contiguous() for name in names}
    return tensor_files.dumps(tensors, {**metadata, **header})


def metadata(path: Place) -> dict[str, str]:
    """Read the metadata in the header of the coreset at `path`, without its tensors and its checksum.

    Raises UserError where `load` would, but for the values of the tensors.
    """
    with _refusing(path), storage.local(path) as near, tensor_files.open_unchecked(near) as file:
        facts = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in ("images", "labels")}
        (m, channels, *_), labels = slices["images"].get_shape(), slices["labels"].get_shape()
        types = slices["images"].get_dtype(), slices["labels"].get_dtype()
        if types != ("F32", "I64") or len(slices["images"].get_shape()) != 4 or labels != [m]:
            raise ValueError(f"images and labels are {types}, {m} and {labels}, expected F32 (m, c, h, w) and I64 (m,)")
        mean, std, classes = _facts(facts)
        if wrong := _problem_of_facts(mean, std, classes, channels):
            raise ValueError(wrong)
        return facts


def load(path: Place) -> Coreset:
    """Read the coreset that `save` wrote to `path`, to the bit, on the CPU. Raises UserError for any other file."""
    with _refusing(path):
        with storage.local(path) as near, tensor_files.open_checked(near) as file:
            facts = file.metadata() or {}
            images, labels = (file.get_tensor(name).clone() for name in ("images", "labels"))  # clone: out of the map
            soft = file.get_tensor("soft_labels").clone() if "soft_labels" in file.keys() else None  # noqa: SIM118
        other_facts = {name: value for name, value in facts.items() if name not in (*OWN_KEYS, inputs.CHECKSUM)}
        coreset = Coreset(images, labels, *_facts(facts), soft, other_facts)
        if wrong := problem(coreset):
            raise ValueError(wrong)
        return coreset


@contextmanager
def _refusing(path: Place) -> Iterator[None]:
    """Turn any error of the block, which reads `path`, into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: coreset not found; give the file that `fbpc distill` wrote") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a coreset ({reason_of(error)}): give the file that `fbpc distill` wrote"
        ) from error


def _facts(facts: dict[str, str]) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Return (mean, std, classes) of a header. Raises ValueError, KeyError or TypeError."""
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
    mean, std, classes = (tuple(inputs.parse_json(facts[name])) for name in ("mean", "std", "classes"))
    return mean, std, classes


def problem(coreset: Coreset) -> str | None:
    """Return why the parts of a coreset do not fit together, or None."""
    images, labels, mean, std, classes, soft_labels, _ = coreset
    if images.dtype != torch.float32 or images.ndim != 4 or not images.numel():
        return f"images are {images.dtype} {tuple(images.shape)}, expected float32 (m, c, h, w)"
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"labels are {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},)"
    if wrong := _problem_of_facts(mean, std, classes, images.shape[1]):
        return wrong
    if not images.isfinite().all():
        return "some pixels are not finite"
    if soft_labels is not None:
        shape = len(images), len(classes)
        if soft_labels.dtype != torch.float32 or soft_labels.shape != shape or not soft_labels.isfinite().all():
            return f"soft labels are {soft_labels.dtype} {tuple(soft_labels.shape)}, expected finite float32 {shape}"
    if labels.min() < 0 or labels.max() >= len(classes):
        return f"labels from {labels.min()} to {labels.max()}, but {len(classes)} classes, numbered from 0"
    return None


def _problem_of_facts(
    mean: tuple[float, ...], std: tuple[float, ...], classes: tuple[str, ...], channels: int
) -> str | None:
    """Return why the normalisation does not fit `channels` channels, or the classes are not names; or None."""
    if not len(mean) == len(std) == channels:
        return f"{len(mean)} means and {len(std)} stds for {channels} channels"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in mean + std) or min(std) <= 0:
        return f"mean {mean} and std {std} are not a normalisation"
    if not all(isinstance(name, str) for name in classes):
        return "the names of the classes are not text"
    return None
