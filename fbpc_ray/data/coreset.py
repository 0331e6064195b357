"""A pseudocoreset as plain data: its images, their labels and what is needed to look at them.

One safetensors file holds one coreset: the tensors `images`, `labels` and, if labels were learned, `soft_labels`; and
in the metadata the format version, the normalisation and the names of the classes as JSON. Nothing is pickled.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fbpc_ray.core import files, inputs, storage, tensor_files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place

FORMAT = "1"


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

    @property
    def likelihood_labels(self) -> Tensor:
        """Labels as cross-entropy takes them: (m,) int64, or (m, d) float32 probabilities of soft labels."""
        return self.labels if self.soft_labels is None else self.soft_labels.softmax(1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w)"""
        c, h, w = self.images.shape[1:]
        return c, h, w


def balanced(labels: Tensor, ipc: int, classes: tuple[str, ...], source: torch.Generator) -> Tensor:
    """Indices (ipc * d,) of a class-balanced uniform draw without replacement: ipc of class 0, then ipc of class 1, ...

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
    """`coreset` as a file; `metadata` is kept beside it in the file's header.

    Raises ValueError for a coreset that `load` would refuse or for metadata under one of the file's own keys.
    """
    own = {
        "format": FORMAT,
        "mean": json.dumps(list(coreset.mean)),
        "std": json.dumps(list(coreset.std)),
        "classes": json.dumps(list(coreset.classes)),
    }
    metadata = {name: value for name, value in (metadata or {}).items() if name != inputs.CHECKSUM}
    taken = sorted(own.keys() & metadata.keys())
    wrong = f"metadata may not name {', '.join(taken)}" if taken else problem(coreset)
    if wrong:
        raise ValueError(f"not a coreset to save: {wrong}")
    names = ("images", "labels") if coreset.soft_labels is None else ("images", "labels", "soft_labels")
    tensors = {name: getattr(coreset, name).detach().cpu().contiguous() for name in names}
    return tensor_files.dumps(tensors, {**metadata, **own})


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
        coreset = Coreset(images, labels, *_facts(facts), soft)
        if wrong := problem(coreset):
            raise ValueError(wrong)
        return coreset


@contextmanager
def _refusing(path: Place) -> Iterator[None]:
    """Turn what fails in the block, which reads `path`, into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no coreset {path}: give the file that `fbpc distill` wrote") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else (str(error).splitlines() or ["no reason"])[0]
        raise UserError(f"{path} is not a coreset ({reason}): give the file that `fbpc distill` wrote") from error


def _facts(facts: dict[str, str]) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """(mean, std, classes) of a header. Raises ValueError, KeyError or TypeError."""
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
    mean, std, classes = (tuple(inputs.parse_json(facts[name])) for name in ("mean", "std", "classes"))
    return mean, std, classes


def problem(coreset: Coreset) -> str | None:
    """Why these things do not belong together, or None."""
    images, labels, mean, std, classes, soft_labels = coreset
    if images.dtype != torch.float32 or images.ndim != 4 or not images.numel():
        return f"images are {images.dtype} {tuple(images.shape)}, expected float32 (m, c, h, w)"
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"labels are {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},)"
    if not images.isfinite().all():
        return "some pixels are not finite"
    if wrong := _problem_of_facts(mean, std, classes, images.shape[1]):
        return wrong
    if soft_labels is not None:
        shape = len(images), len(classes)
        if soft_labels.dtype != torch.float32 or soft_labels.shape != shape or not soft_labels.isfinite().all():
            return f"soft labels are {soft_labels.dtype} {tuple(soft_labels.shape)}, expected finite float32 {shape}"
    if labels.min() < 0 or labels.max() >= len(classes):
        return f"labels from {int(labels.min())} to {int(labels.max())}, but {len(classes)} classes"
    return None


def _problem_of_facts(
    mean: tuple[float, ...], std: tuple[float, ...], classes: tuple[str, ...], channels: int
) -> str | None:
    """Why these are no normalisation of `channels` channels and no names, or None."""
    if not len(mean) == len(std) == channels:
        return f"{len(mean)} means and {len(std)} stds for {channels} channels"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in mean + std) or min(std) <= 0:
        return f"mean {mean} and std {std} are not a normalisation"
    if not all(isinstance(name, str) for name in classes):
        return "the names of the classes are not text"
    return None
