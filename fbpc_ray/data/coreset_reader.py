"""Read coresets of any origin and fit them to a data set; coreset_files.py reads the formats.

What a file doesn't say, its normalisation or the names of its classes, is that of the data set.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fbpc_ray.core import inputs, memory, storage
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote
from fbpc_ray.data import coreset
from fbpc_ray.data.conversion import to_uint8
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.coreset_files import NOT_IN_RUN, OF_A_RUN, SUFFIXES, RawCoreset, read, read_facts
from fbpc_ray.data.datasets import Dataset, normalise, standardise
from fbpc_ray.data.labels import from_one_hot

Pixels = Literal["auto", "normalised", "unit"]
BYTE_LIKE = 50
"""Floats from 0 to this or more are pixels of 0..255: normalised ones are below 0 too."""
AS_NORMALISED = (
    "; if they are normalised, convert the file in Python: `save(load_coreset(FILE, DATA, pixels='normalised'), NEW)`"
)
"""End of a note where there is no --pixels."""


class Loaded(NamedTuple):
    """A coreset that fits the data set."""

    coreset: Coreset
    """Its mean and std are its own where its file says them, else those of the data set."""
    notes: tuple[str, ...]
    """What was assumed."""


def load(where: Place, dataset: Dataset | None, pixels: Pixels | None = None) -> Loaded:
    """Read a coreset, of this package or another, that has the classes and the image size of `dataset`.

    Without a data set the file must say its normalisation and the names of its classes, as all exports do.

    A file (.safetensors, .npz, .pt, .pth, .parquet), MTT's pair (its folder or images_X.pt), a Hugging Face folder, a
    run, or class folders of images. Images are integers in 0..255 or floats; (m, h, w, c) and (m, h, w) are understood.
    Floats of a file that doesn't say its normalisation are as `pixels` says: normalised as the data set is | unit, in
    0..1 | auto: unit where all are in 0..1; None: auto, and the user has no --pixels to choose by. Raises UserError for
    everything else; no file runs code.
    """
    try:
        if isinstance(where, Remote):
            with storage.local(_remote_file(where)) as near:
                return _fitted(read(near, dataset), dataset, str(where), pixels)
        _check_size(where)
        return _fitted(read(where, dataset), dataset, str(where), pixels)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or where}: coreset not found; {_advice(str(where))}") from None
    except Exception as error:  # a damaged file fails in any way
        raise UserError(
            f"{where} is not a coreset of plain arrays ({_line(error)}); no code in it was run: write the file again"
        ) from error


def fit(given: Coreset, dataset: Dataset, source: str) -> Loaded:
    """Check that a coreset has the classes and the image size of `dataset`. Raises UserError, which names `source`."""
    return _fitted(RawCoreset(given.images, given.labels, given._asdict(), given.soft_labels), dataset, source, None)


def _advice(where: str) -> str:
    """Return the fix for a path that does not exist."""
    kind, _, path = where.partition(":")
    return f"write its path alone, {path}" if kind and path and Path(path).exists() else "check the path"


def facts_of(where: Place) -> dict[str, str]:
    """Return `Coreset.facts` of a file or a folder.

    Empty for one that can't be read, too: `load` says what is wrong with it.
    """
    with suppress(Exception), storage.local(_remote_file(where) if isinstance(where, Remote) else where) as near:
        facts, others = read_facts(near), (*coreset.OWN_KEYS, inputs.CHECKSUM)
        return {name: text for name, text in facts.items() if isinstance(text, str) and name not in others}
    return {}


def settings_of(where: Place) -> dict[str, Any]:
    """Return the settings that a coreset was distilled with, where its file has them."""
    return coreset.parse_settings(facts_of(where))


def _remote_file(where: Remote) -> Remote:
    """Return the object that holds the coreset: `where`, or the coreset of the run there. Raises UserError."""
    if Path(where.name).suffix in SUFFIXES or where.is_file():
        return where
    if not (where / "config.json").is_file():
        raise UserError(
            f"{where}: from an object store a run or a single file can be read ({', '.join(SUFFIXES)}); check the "
            "path, or copy the folder to this machine"
        )
    if not (where / OF_A_RUN).is_file():
        raise UserError(NOT_IN_RUN.format(where / OF_A_RUN))
    return where / OF_A_RUN


def _check_size(where: Path) -> None:
    """Raise UserError for a file that does not fit into memory."""
    size = where.stat().st_size if where.is_file() else 0
    if size > (free := memory.available()):
        raise UserError(
            f"{where}: a coreset of {memory.gigabytes(size)} does not fit into memory, {memory.gigabytes(free)} are "
            "available; use a smaller coreset"
        )


def _fitted(raw: RawCoreset, dataset: Dataset | None, source: str, pixels: Pixels | None) -> Loaded:
    """Check a coreset and convert it to a `Coreset` of `dataset`, if one is given."""
    facts, notes = raw.facts or {}, list(raw.notes)
    if dataset is None and not {"mean", "std", "classes"} <= facts.keys():
        raise UserError(f"{source} doesn't say its normalisation and its classes: give its data set (--data)")
    labels, soft = _labels_of(raw, source, notes)
    mean, std, classes = (
        tuple(facts[name] if name in facts else getattr(dataset, name)) for name in ("mean", "std", "classes")
    )
    classes = tuple(map(str, classes))
    if dataset and classes != dataset.classes:
        raise UserError(f"{source} has other classes than {dataset.name}: give its data set with --data")
    images = _channels_first(raw.images, dataset.image_shape if dataset else _own_shape(raw.images, len(mean)))
    if dataset and images.shape[1:] != dataset.image_shape:
        side = f", or add --image-size {images.shape[-1]}" if images.shape[-1] == images.shape[-2] else ""
        raise UserError(
            f"{source} has images of {tuple(images.shape[1:])}, {dataset.name} of {dataset.image_shape}: "
            f"give its data set with --data{side}"
        )
    if not images.is_floating_point():
        images = normalise(torch.from_numpy(to_uint8(images.numpy(), f"{source}: images")), mean, std)
    elif dataset and "mean" not in facts:
        images = _normalised(images, dataset, source, pixels, notes)
    pseudocoreset = Coreset(images.float().contiguous(), labels.long(), mean, std, classes, soft)
    if wrong := coreset.problem(pseudocoreset):
        raise UserError(f"{source} is not a coreset ({wrong}): correct the file")
    return Loaded(pseudocoreset, tuple(notes))


def _labels_of(raw: RawCoreset, source: str, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Return class numbers (m,), and soft labels (m, d) where the file has them."""
    labels, soft = raw.labels, raw.soft_labels
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if soft is not None and soft.is_floating_point():
        soft = soft.float()
    if labels.ndim == 2 and labels.is_floating_point():
        labels = labels.float()
    if labels.ndim == 2 and (numbers := from_one_hot(labels.numpy())) is not None:
        labels = torch.from_numpy(numbers)
    if soft is None and labels.ndim == 2 and labels.is_floating_point():
        soft, note = _soft_labels(labels)
        labels = labels.argmax(1)
        notes.append(note)
    if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"{source}: labels are {labels.dtype} {tuple(labels.shape)}; they must be class numbers (m,), one-hot "
            "rows, or soft labels, floats (m, classes)"
        )
    return labels, soft


def _normalised(images: Tensor, dataset: Dataset, source: str, pixels: Pixels | None, notes: list[str]) -> Tensor:
    """Normalise floats of a file without normalisation as `pixels` says, with a note."""
    low, high = float(images.min()), float(images.max())
    inside = low >= 0 and high <= 1
    if pixels == "unit" and not inside:
        raise UserError(f"{source} has pixels outside 0..1: --pixels unit does not fit; try normalised")
    if pixels in ("auto", None) and low >= 0 and BYTE_LIKE <= high <= 255:
        fix = ", or give --pixels normalised" if pixels else ""
        raise UserError(f"{source}: images are floats from {low:g} to {high:g}; save uint8, or divide them by 255{fix}")
    mean, std = dataset.mean, dataset.std
    if unit := pixels == "unit" or (pixels != "normalised" and inside):
        images = standardise(images.float(), mean, std)
    way = "0..1" if unit else f"normalised with mean {[*mean]} and std {[*std]}"
    notes.append(f"pixels taken as {way}{' (--pixels)' if pixels else AS_NORMALISED if unit else ''}")
    return images


def _soft_labels(values: Tensor) -> tuple[Tensor, str]:
    """Return labels (m, d) of others as centred logits, and what was assumed of them."""
    if bool((values >= 0).all()) and bool((values.sum(1) - 1).abs().max() < 1e-3):
        logits, note = values.clamp(min=1e-6).log(), "probabilities (each row sums to 1)"
    else:
        logits, note = values, "logits (not every row sums to 1)"
    return logits - logits.mean(1, keepdim=True), f"soft labels taken as {note}"


def _own_shape(images: Tensor, channels: int) -> tuple[int, int, int]:
    """Return (c, h, w) of images of `channels` channels that are (m, c, h, w), (m, h, w, c) or (m, h, w)."""
    h, w = images.shape[-2:]
    if images.ndim == 4 and images.shape[1] != channels == w:
        h, w = images.shape[1:3]
    return channels, h, w


def _channels_first(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Convert (m, h, w), (m, h, w, c) and grey images of three channels to (m, c, h, w) of `shape`."""
    c, h, w = shape
    if images.ndim == 3:
        images = images[:, None]
    if images.shape[1:] == (h, w, c) != shape:
        images = images.permute(0, 3, 1, 2)
    if images.shape[1:] == (3, h, w) and c == 1 and bool((images == images[:, :1]).all()):
        images = images[:, :1]
    if images.shape[1:] == (1, h, w) and c == 3:
        images = images.expand(-1, 3, -1, -1)
    return images


def _line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return text.split(". ")[0][:120].rstrip(".")
