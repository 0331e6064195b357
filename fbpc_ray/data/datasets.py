"""Image data as whole uint8 arrays with train, validation and test splits: load(), normalise(), denormalise().

The readers (readers.py) turn files into arrays; here is what holds for every source: checks, splits, constants.
"""

import hashlib
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.rng import generator
from fbpc_ray.data.raw import RawDataset, RawSplit, size
from fbpc_ray.data.readers import read
from fbpc_ray.data.splits import listed

KNOWN: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "tiny-imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Data name -> the (mean, std) per channel that it is usually normalised with."""

TEST_FRACTION = 0.2
"""Share of each class that becomes the test split of a source that has neither a test nor a validation split."""

FEW_LEVELS = 16
"""Images none of whose pixels reaches this level, of 255, get a note: their scale is likely to be wrong."""


class Split(NamedTuple):
    """Images and their labels."""

    images: np.ndarray
    """(n, c, h, w) uint8, C-contiguous."""
    labels: np.ndarray
    """(n,) int64, each in [0, d)."""


class Dataset(NamedTuple):
    """Three splits of one source, and what the networks see of it."""

    name: str
    """As the user wrote it."""
    classes: tuple[str, ...]
    """The d class names in label order."""
    mean: tuple[float, ...]
    """Per channel, of images in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of images in [0, 1]; positive."""
    train: Split
    """At least one image of each class."""
    validation: Split
    """n = 0 where none was asked for and the source has none."""
    test: Split
    notes: tuple[str, ...]
    """Lines for the log: what was assumed about the source."""
    fingerprint: str
    """16 hex digits of the train split and the normalisation: what a network trained on this data has seen."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w)"""
        c, h, w = self.train.images.shape[1:]
        return c, h, w


def load(
    name: str,
    *,
    root: str | Path = "data",
    download: bool = False,
    normalisation: str = "auto",
    validation: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Read the data set `name` into memory, decoded.

    `name` is digits, cifar10, cifar100, tiny-imagenet (the last three from `root`; `download` fetches the CIFAR ones),
    parquet:PATH, folder:PATH or npz:PATH. Image files become three channels, grey ones too.

    `normalisation` is auto (the usual constants of cifar10, cifar100 and tiny-imagenet, else computed), computed (from
    the train images that remain), or the name of those constants. `validation`, in [0, 1), is the share of each class
    of train that becomes the validation split, drawn with `seed`; a source's own validation split goes before it.
    A source without test split gives its validation split as test; one without both, a fifth of each class of train.

    Raises UserError, one line with the cause and the fix, for everything that is wrong with the arguments or files.
    """
    _check_how(normalisation, validation)
    return assembled(read(name, Path(root), download), name, normalisation, validation, seed)


def assembled(
    source: RawDataset, name: str, normalisation: str = "auto", validation: float = 0.0, seed: int = 0
) -> Dataset:
    """Check and split what a reader found, by the rules of `load`, as a data set called `name`. Raises UserError."""
    _check_how(normalisation, validation)
    source = _without_unlabelled(source)
    classes = _check(source)
    train, held, test, notes = _splits(source, len(classes), validation, seed)
    mean, std = _constants(name if normalisation == "auto" else normalisation, train.images, source.origin)
    notes += (*_absent_classes(classes, {"validation": held, "test": test}), *_dark(train.images, source.origin))
    return Dataset(name, classes, mean, std, train, held, test, notes, _fingerprint(train, mean, std))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """images (b, c, h, w) uint8 on any device -> float32, (images / 255 - mean) / std per channel."""
    if images.dtype != torch.uint8:
        raise TypeError(f"normalise takes uint8 images, not {images.dtype}")
    return standardise(images.float() / 255, mean, std)


def standardise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """pixels (b, c, h, w) float32 in 0..1 on any device -> (pixels - mean) / std per channel."""
    return (pixels - _per_channel(mean, pixels)) / _per_channel(std, pixels)


def denormalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """images (b, c, h, w) float, normalised -> uint8, rounded and clamped. No gradient. Undoes `normalise` exactly."""
    pixels = images.detach().float() * _per_channel(std, images) + _per_channel(mean, images)
    return (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)


def tensors(split: Split, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Images (n, c, h, w) uint8 and labels (n,) int64 on `device`. On the CPU they share memory: never write to them.

    Takes read-only arrays (Ray's object store) without a copy and without from_numpy's warning.
    """
    return torch.from_dlpack(split.images).to(device), torch.from_dlpack(split.labels).to(device)


def _check_how(normalisation: str, validation: float) -> None:
    if not 0 <= validation < 1:
        raise UserError(f"validation {validation} is no share of the train split; give 0 <= validation < 1")
    if normalisation not in ("auto", "computed", *KNOWN):
        raise UserError(
            f"unknown normalisation {normalisation!r}; {closest(normalisation, ['auto', 'computed', *KNOWN])}"
        )


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    """(c, 1, 1) float32 on the device of `images`."""
    if len(values) != images.shape[-3]:
        raise UserError(
            f"{len(values)} normalisation constants for images of {images.shape[-3]} channels; they must agree"
        )
    return torch.tensor(values, dtype=torch.float32).to(images.device, non_blocking=True)[:, None, None]


def _without_unlabelled(source: RawDataset) -> RawDataset:
    """Leave out test and validation splits without labels (all of them -1), with a note."""
    unlabelled = [split for split, part in source.parts.items() if split != "train" and (part.labels == -1).all()]
    notes = tuple(f"left out the {split} split of {source.origin}: all of its labels are -1" for split in unlabelled)
    parts = {split: part for split, part in source.parts.items() if split not in unlabelled}
    return source._replace(parts=parts, notes=(*source.notes, *notes))


def _check(source: RawDataset) -> tuple[str, ...]:
    """Return the class names, once the parts agree with them and with each other."""
    train = source.parts["train"]
    classes = source.classes
    if classes is None:
        top = int(train.labels.argmax())
        if train.labels[top] >= len(train.labels):
            raise UserError(
                f"{train.place(top)}: label {train.labels[top]} with only {len(train.labels)} train images; "
                "labels must run from 0 without gaps"
            )
        classes = tuple(str(label) for label in range(int(train.labels[top]) + 1))
    for name in classes:
        _check_class_name(name, source.origin)
    for split, part in source.parts.items():
        _check_part(split, part, train, classes)
    if len(classes) < 2:
        raise UserError(f"{source.origin} has {len(classes)} class; a classifier needs at least 2")
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) == 0)
    if source.classes is None and empty.tolist() == [0]:
        raise UserError(f"{source.origin}: labels run from 1 to {len(classes) - 1}; they must start at 0: subtract 1")
    if len(empty):
        raise UserError(
            f"class {classes[empty[0]]!r} (label {empty[0]}) of {source.origin} has no train image; "
            "add some, or leave the class out and number the labels without gaps"
        )
    return classes


def _check_class_name(name: str, origin: str) -> None:
    """Refuse names that no file of ours can hold: broken UTF-8, and control characters but tabs and line ends."""
    if any(unicodedata.category(char) == "Cs" for char in name):
        raise UserError(f"{_printable(origin)}: the class name {name!a} is not UTF-8; rename the class")
    if any(unicodedata.category(char) == "Cc" and char not in "\t\n\r" for char in name):
        raise UserError(f"{_printable(origin)}: the class name {name!a} holds control characters; rename the class")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _absent_classes(classes: tuple[str, ...], splits: dict[str, Split]) -> tuple[str, ...]:
    """Notes on the classes that a split has no image of."""
    notes = []
    for split, part in splits.items():
        counts = np.bincount(part.labels, minlength=len(classes))
        names = [repr(name) for name, count in zip(classes, counts, strict=True) if not count]
        if names and len(part.labels):
            notes.append(
                f"no {split} image of class {listed(names)}: results are of the other classes alone; add some images"
            )
    return tuple(notes)


def _dark(images: np.ndarray, origin: str) -> tuple[str, ...]:
    top = int(images.max())
    if top >= FEW_LEVELS:
        return ()
    return (
        f"the train images of {origin} use the levels 0..{top} of 0..255; if they were divided by 255 twice, or hold "
        "more than 8 bits, scale them anew",
    )


def _check_part(split: str, part: RawSplit, train: RawSplit, classes: tuple[str, ...]) -> None:
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(classes)))
    if len(wrong):
        label, fits = part.labels[wrong[0]], f"the {len(classes)} classes have labels 0..{len(classes) - 1}"
        raise UserError(
            f"{part.place(int(wrong[0]))}: label {label} in the {split} split is "
            f"{'negative; labels start at 0' if label < 0 else f'out of range; {fits}'}; correct or remove the row"
        )
    if part.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{part.place(0)}: the {split} image is {size(part.images)}, the train images ({train.place(0)}) are "
            f"{size(train.images)}; all images must have one size"
        )


def _splits(source: RawDataset, classes: int, share: float, seed: int) -> tuple[Split, Split, Split, tuple[str, ...]]:
    """(train, validation, test, notes) by the rules in `load`."""
    found = {name: Split(part.images, part.labels) for name, part in source.parts.items()}
    train, held, test = found["train"], found.get("validation"), found.get("test")
    notes = [*source.notes, *(note for part in source.parts.values() for note in part.notes)]
    if test is None and held is not None:
        test, held = held, None
        notes.append(f"no test split in {source.origin}: its validation split serves as test")
    if test is None:
        train, test = _hold_out(train, classes, TEST_FRACTION, generator(seed, "test"), source.origin)
        notes.append(
            f"no test split in {source.origin}: {len(test.labels)} of {len(test.labels) + len(train.labels)} images, "
            f"{TEST_FRACTION:.0%} of each class drawn with seed {seed}, serve as test"
        )
    if held is not None and share:
        notes.append(f"{source.origin} has a validation split of its own: validation={share} is ignored")
    elif held is None and share:
        train, held = _hold_out(train, classes, share, generator(seed, "validation"), source.origin)
    return train, held or Split(train.images[:0], train.labels[:0]), test, tuple(notes)


def _hold_out(split: Split, classes: int, share: float, source: torch.Generator, origin: str) -> tuple[Split, Split]:
    """(what remains, what is held out): `share` of each class, rounded, but never its last image. Keeps the order."""
    order = torch.randperm(len(split.labels), generator=source).numpy()
    held = np.zeros(len(order), bool)
    for label in range(classes):
        members = order[split.labels[order] == label]
        held[members[: min(round(share * len(members)), len(members) - 1)]] = True
    if not held.any():
        raise UserError(f"{origin}: {share:g} of each class of train is no image; ask for a larger share or add images")
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])


def _constants(known: str, images: np.ndarray, origin: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel: those of the name `known`, else computed, exactly, by counting the 256 levels."""
    channels = images.shape[1]
    if known in KNOWN:
        if len(KNOWN[known][0]) != channels:
            raise UserError(
                f"normalisation {known} has {len(KNOWN[known][0])} channels, the images of {origin} have {channels}; "
                "use normalisation computed"
            )
        return KNOWN[known]
    counts = np.zeros((channels, 256))
    for start in range(0, len(images), 1024):
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + 1024, channel].ravel(), minlength=256)
    constant = np.flatnonzero((counts > 0).sum(1) < 2)
    if len(constant):
        raise UserError(
            f"channel {constant[0]} of the train images of {origin} is constant, so its std is 0; remove the channel, "
            "or look whether the images were read as you mean them"
        )
    shares, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
    return tuple(mean.tolist()), tuple(std.tolist())


def _fingerprint(train: Split, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    digest = hashlib.blake2b(repr((train.images.shape, mean, std)).encode(), digest_size=8)
    digest.update(train.images.data.cast("B"))
    digest.update(train.labels.astype("<i8").tobytes())
    return digest.hexdigest()
