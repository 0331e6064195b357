"""Data sets as uint8 arrays with train, validation and test splits: load, normalise, denormalise.

The readers (readers.py) turn files into arrays; this module checks, splits and normalises arrays of any source.
"""

import hashlib
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.errors import UserError, closest, escape_controls
from fbpc_ray.core.rng import generator
from fbpc_ray.data.parquet import Columns
from fbpc_ray.data.raw import RawDataset, RawSplit, size
from fbpc_ray.data.readers import read
from fbpc_ray.data.resize import Resizing, SeveralSizes
from fbpc_ray.data.splits import listed

KNOWN: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "tiny-imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""(mean, std) per channel that a data set is usually normalised with, by its name."""

TEST_FRACTION = 0.2
"""Share of each class that becomes the test split of a source with neither a test nor a validation split."""

FEW_LEVELS = 16
"""If no pixel reaches this level, of 255, a note warns that the scale of the images is likely wrong."""


class Split(NamedTuple):
    """Images and their labels."""

    images: np.ndarray
    """(n, c, h, w) uint8, C-contiguous."""
    labels: np.ndarray
    """(n,) int64, each in [0, d)."""


class Dataset(NamedTuple):
    """Three splits of one source, and the constants that normalise its images."""

    name: str
    """Value of --data."""
    classes: tuple[str, ...]
    """The d class names in label order."""
    mean: tuple[float, ...]
    """Per channel, of images in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of images in [0, 1]; positive."""
    train: Split
    """At least one image of each class."""
    validation: Split
    """n = 0 if `validation` is 0 and the source has no validation split."""
    test: Split
    notes: tuple[str, ...]
    """Lines for the log: assumptions about the source."""
    fingerprint: str
    """16 hex digits, a hash of the train split and the normalisation: everything that an expert is trained on."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        sizes = (f"{name} {len(getattr(self, name).labels):,}" for name in ("train", "validation", "test"))
        return f"<{escape_controls(self.name)}: {len(self.classes)} classes, images of {shape}; {', '.join(sizes)}>"


def load(
    name: str,
    *,
    root: str | Path = "data",
    download: bool = False,
    normalisation: str = "auto",
    validation: float = 0.0,
    seed: int = 0,
    label_column: str = "",
    image_column: str = "",
    image_size: int = 0,
    resize: str = "crop",
    test: float = 0.0,
) -> Dataset:
    """Read a data set into memory, decoded.

    A source without test split uses its validation split as test; a source without both, a fifth of each class of
    train. Image files get three channels, grey ones too.

    Args:
        name: digits, cifar10, cifar100, tiny-imagenet, parquet:PATH, folder:PATH or npz:PATH.
        root: folder of cifar10, cifar100 and tiny-imagenet.
        download: fetch cifar10 and cifar100 if they are missing.
        normalisation: auto (the usual constants of cifar10, cifar100 and tiny-imagenet, else computed), computed (from
            the train images that remain after the splits), or the name of a data set with usual constants.
        validation: share in [0, 1) of each class of train that becomes the validation split, drawn with `seed`;
            ignored if the source has its own.
        label_column, image_column: columns of parquet:PATH; empty: the usual ones.
        image_size: side of the square that every image is resized to; 0: as they are, all of one size.
        resize: crop (the short side is resized, the middle stays) or stretch.
        test: share in [0, 1) of each class of train that becomes the test split, drawn with `seed`, at least an image
            of each class of two or more; ignored if the source has its own. 0: by the rule above.

    Raises:
        UserError: an argument or a file is wrong; one line with the cause and the fix.
    """
    resizing = Resizing(image_size, resize)
    _check_arguments(normalisation, validation, test)
    resizing.check()
    source = read(name, Path(root), download, Columns(image_column, label_column), resizing)
    return assemble(source, name, normalisation, validation, seed, test)


def assemble(
    source: RawDataset, name: str, normalisation: str = "auto", validation: float = 0.0, seed: int = 0,
    test_share: float = 0.0,
) -> Dataset:  # fmt: skip
    """Check, split and normalise the arrays of a reader, by the rules of `load`. Raises UserError."""
    _check_arguments(normalisation, validation, test_share)
    source = _without_unlabelled(source)
    classes = _check(source)
    train, held_out, test, notes = _splits(source, len(classes), validation, test_share, seed)
    mean, std = _constants(name if normalisation == "auto" else normalisation, train.images, source.origin)
    notes += (*_absent_classes(classes, {"validation": held_out, "test": test}), *_dark(train.images, source.origin))
    return Dataset(name, classes, mean, std, train, held_out, test, notes, _fingerprint(train, mean, std))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise images (b, c, h, w) uint8 on any device: (images / 255 - mean) / std per channel, float32."""
    if images.dtype != torch.uint8:
        raise TypeError(f"normalise: expected uint8 images, got {images.dtype}")
    return standardise(images.float() / 255, mean, std)


def standardise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise pixels (b, c, h, w) float32 in 0..1 on any device: (pixels - mean) / std per channel."""
    return (pixels - _per_channel(mean, pixels)) / _per_channel(std, pixels)


def denormalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Undo `normalise` exactly: images (b, c, h, w) float -> uint8, rounded and clamped, without gradient."""
    return (to_unit(images.detach().float(), mean, std) * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_unit(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Undo `standardise`: images (b, c, h, w) float32 -> pixels, which for real images are in 0..1."""
    return images * _per_channel(std, images) + _per_channel(mean, images)


def tensors(split: Split, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return images (n, c, h, w) uint8 and labels (n,) int64 on `device`.

    On the CPU they share memory with the split: never write to them. Read-only arrays, such as those in Ray's object
    store, are neither copied nor warned about, as `torch.from_numpy` would.
    """
    return torch.from_dlpack(split.images).to(device), torch.from_dlpack(split.labels).to(device)


def _check_arguments(normalisation: str, validation: float, test: float) -> None:
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise UserError(f"{name} must be a share of the train split, 0 <= {name} < 1, got {share}")
    if normalisation not in ("auto", "computed", *KNOWN):
        raise UserError(
            f"unknown normalisation {normalisation!r}; {closest(normalisation, ['auto', 'computed', *KNOWN])}"
        )


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    """Return `values` as a (c, 1, 1) float32 tensor on the device of `images`."""
    if len(values) != images.shape[-3]:
        raise UserError(f"got {len(values)} normalisation constants for images of {images.shape[-3]} channels")
    return torch.tensor(values, dtype=torch.float32).to(images.device, non_blocking=True)[:, None, None]


def _without_unlabelled(source: RawDataset) -> RawDataset:
    """Leave out test and validation splits whose labels are all -1, with a note."""
    unlabelled = [split for split, part in source.parts.items() if split != "train" and (part.labels == -1).all()]
    notes = tuple(f"left out the {split} split of {source.origin}: all of its labels are -1" for split in unlabelled)
    parts = {split: part for split, part in source.parts.items() if split not in unlabelled}
    return source._replace(parts=parts, notes=(*source.notes, *notes))


def _check(source: RawDataset) -> tuple[str, ...]:
    """Check that all splits agree with the classes and with train; return the class names."""
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
            "add some, or remove the class: its folder, or its label, so that the labels have no gap"
        )
    return classes


def _check_class_name(name: str, origin: str) -> None:
    """Refuse broken UTF-8, and control characters other than tabs and line ends."""
    if any(unicodedata.category(char) == "Cs" for char in name):
        raise UserError(f"{_printable(origin)}: the class name {name!a} is not UTF-8; rename the class")
    if any(unicodedata.category(char) == "Cc" and char not in "\t\n\r" for char in name):
        raise UserError(f"{_printable(origin)}: the class name {name!a} holds control characters; rename the class")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _absent_classes(classes: tuple[str, ...], splits: dict[str, Split]) -> tuple[str, ...]:
    """Return notes on classes without an image in a split."""
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
    """Return a note if the images use only the lowest levels."""
    top = int(images.max())
    if top >= FEW_LEVELS:
        return ()
    return (
        f"the train images of {origin} use the levels 0..{top} of 0..255; if they were divided by 255 twice, or hold "
        "more than 8 bits, scale them again",
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
        kind, fix = SeveralSizes, "size: resize them, such as by --image-size 32"
        if part.images.shape[1] != train.images.shape[1]:
            kind, fix = UserError, "number of channels: convert them"
        raise kind(
            f"{part.place(0)}: the {split} image is {size(part.images)}, the train images ({train.place(0)}) are "
            f"{size(train.images)}; all images must have one {fix}"
        )


def _splits(
    source: RawDataset, classes: int, share: float, test_share: float, seed: int
) -> tuple[Split, Split, Split, tuple[str, ...]]:
    """Return (train, validation, test, notes) by the rules of `load`."""
    splits = {name: Split(part.images, part.labels) for name, part in source.parts.items()}
    train, held_out, test = splits["train"], splits.get("validation"), splits.get("test")
    notes = [*source.notes, *(note for part in source.parts.values() for note in part.notes)]
    if test is not None and test_share:
        notes.append(f"{source.origin} has a test split of its own: test={test_share} is ignored")
    if test is None and held_out is not None and not test_share:
        test, held_out = held_out, None
        notes.append(f"no test split in {source.origin}: its validation split serves as test")
    if test is None:
        fraction = test_share or TEST_FRACTION
        train, test = _hold_out(train, classes, fraction, generator(seed, "test"), source.origin, least=1)
        notes.append(
            f"no test split in {source.origin}: {len(test.labels)} of {len(test.labels) + len(train.labels)} images, "
            f"{100 * fraction:g}% of each class drawn with seed {seed}, serve as test"
        )
    if held_out is not None and share:
        notes.append(f"{source.origin} has a validation split of its own: validation={share} is ignored")
    elif held_out is None and share:
        train, held_out = _hold_out(train, classes, share, generator(seed, "validation"), source.origin)
    return train, held_out or Split(train.images[:0], train.labels[:0]), test, tuple(notes)


def _hold_out(
    split: Split, classes: int, share: float, source: torch.Generator, origin: str, least: int = 0
) -> tuple[Split, Split]:
    """Hold out `share` of each class, rounded, at least `least`, but never its last image; return (rest, held out)."""
    order = torch.randperm(len(split.labels), generator=source).numpy()
    held_out = np.zeros(len(order), bool)
    for label in range(classes):
        members = order[split.labels[order] == label]
        held_out[members[: min(max(least, round(share * len(members))), len(members) - 1)]] = True
    if not held_out.any():
        if np.bincount(split.labels).max() == 1:
            raise UserError(f"{origin}: each class has one image, so none can be held out; add images")
        raise UserError(
            f"{origin}: {share:g} of each train class is less than one image; give a larger share, or add images"
        )
    rest = ~held_out
    return Split(split.images[rest], split.labels[rest]), Split(split.images[held_out], split.labels[held_out])


def _constants(known: str, images: np.ndarray, origin: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) per channel: those of the data set `known`, else computed exactly."""
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
            "or check how the images were read"
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
