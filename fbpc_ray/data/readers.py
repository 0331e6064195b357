"""One reader per kind of image data. A reader turns files into a `RawDataset`: whole arrays and a name for each image.

Readers check what only they can see (bytes, columns, folders, files that belong together), naming the file and row.
What holds for every source (label range, empty classes, sizes, missing splits) is in datasets.py.
"""

import os
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np

from fbpc_ray.core import files as atomic
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.data.parquet import parquet
from fbpc_ray.data.raw import SPLITS, RawDataset, RawSplit, decode, line, listed

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
NPZ_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels")),
    "validation": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def read(name: str, root: Path, download: bool) -> RawDataset:
    """The data that `name` stands for, see NAMED and AT_PATH. Raises UserError for all that is wrong with the input."""
    kind, _, path = name.partition(":")
    try:
        if name in NAMED:
            return NAMED[name](root, download)
        if kind in AT_PATH and path:
            if not (at := Path(path).expanduser()).exists():
                raise UserError(f"{at} does not exist; check the path after {kind}:")
            return AT_PATH[kind](at)
    except OSError as error:
        raise UserError(f"{name}: cannot read the data: {line(error)}") from error
    if kind in AT_PATH:
        raise UserError(f"data {name!r} lacks its path; write {kind}:PATH")
    if (at := Path(name).expanduser()).exists():
        ends = {".npz": "npz", ".parquet": "parquet"}
        kind = ends.get(at.suffix) or ("parquet" if any(at.rglob("*.parquet")) else "folder")
        raise UserError(f"data {name!r} is a path: say of what, e.g. {kind}:{name}")
    raise UserError(f"unknown data {name!r}; {closest(name, [*NAMED, *(f'{kind}:PATH' for kind in AT_PATH)])}")


# ---- named data


def digits(root: Path, download: bool) -> RawDataset:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8), 0..16 scaled to 0..255; every fifth one is for the test."""
    del root, download  # they come with scikit-learn, whose import, with pandas and scipy, takes seconds
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("digits come with scikit-learn, which is not installed: pip install scikit-learn")
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    parts = {
        name: RawSplit(images[rows], labels[rows], "row {}".format) for name, rows in (("train", ~test), ("test", test))
    }
    return RawDataset("digits", tuple(map(str, range(10))), parts)


def cifar(kind: str, root: Path, download: bool) -> RawDataset:
    """`kind` CIFAR10 or CIFAR100 (fine labels) from torchvision's root, (3, 32, 32)."""
    import torchvision.datasets

    reader: Any = getattr(torchvision.datasets, kind)

    def read(fetch: bool) -> dict[str, Any]:
        return {"train": reader(root, train=True, download=fetch), "test": reader(root, train=False)}

    failures = OSError, RuntimeError, EOFError, TarError, HTTPException
    try:
        splits = read(False)
    except failures as error:
        if not download:
            raise UserError(
                f"no whole {kind.lower()} in {root}: fetch it with --download, or name its folder with --data-root"
            ) from error
        try:
            with atomic.file_lock(root / ".download.lock"):  # two at once would write to the same files
                splits = read(True)
        except failures as error:
            raise UserError(
                f"cannot download {kind.lower()} to {root} ({line(error)}); check the connection"
            ) from error
    parts = {
        split: RawSplit(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.array(data.targets), "row {}".format)
        for split, data in splits.items()
    }
    return RawDataset(kind.lower(), tuple(splits["train"].classes), parts)


def tiny_imagenet(root: Path, download: bool) -> RawDataset:
    """Tiny-ImageNet as its zip file unpacks, in root/tiny-imagenet-200 or root itself; its test split has no labels."""
    del download  # not offered: one UserError says where to get it
    base = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (base / "train").is_dir():
        raise UserError(
            f"no tiny-imagenet in {root}: unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there, "
            "or name the folder that holds tiny-imagenet-200 with --data-root"
        )
    listed = base / "wnids.txt"
    wnids = (
        sorted(listed.read_text("utf-8", "replace").split())
        if listed.is_file()
        else [f.name for f in _subfolders(base / "train")]
    )
    parts = {"train": _class_folders(base / "train", wnids)}
    annotations = base / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing, so the validation images have no labels; unpack the zip file again")
    files, labels = [], []
    for number, text in enumerate(annotations.read_text("utf-8", "replace").splitlines(), start=1):
        file, wnid, *_ = [*text.split("\t"), ""]
        if wnid not in wnids:
            raise UserError(f"{annotations}, line {number}: class {wnid!r} is none of those in {base / 'train'}")
        files.append(base / "val" / "images" / file)
        labels.append(wnids.index(wnid))
    parts["validation"] = _files(annotations.parent, files, labels)
    return RawDataset(str(base), tuple(wnids), parts)


# ---- data at a path


def folder(path: Path) -> RawDataset:
    """Class folders of image files, in PATH/train and PATH/test (or val, valid, validation), or in PATH itself."""
    folders: dict[str, Path] = {}
    for child in _subfolders(path):
        split = SPLITS.get(child.name.lower())
        if split in folders:
            raise UserError(f"{folders[split]} and {child} are both the {split} split; keep one")
        if split:
            folders[split] = child
    folders = folders or {"train": path}
    if "train" not in folders:
        raise UserError(f"no train split in {path}: it has {listed(_subfolders(path))}; add {path / 'train'}")
    classes = [child.name for child in _subfolders(folders["train"])]
    if not classes:
        raise UserError(f"no class folders in {folders['train']}; put the images in one folder per class")
    return RawDataset(str(path), tuple(classes), {split: _class_folders(at, classes) for split, at in folders.items()})


def npz(path: Path) -> RawDataset:
    """Arrays of one NumPy file, see NPZ_KEYS; images NHWC, NCHW or NHW, integers 0..255 or floats in [0, 1]."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("one array, not an archive")
            pairs = {split: next((p for p in known if p[0] in archive), None) for split, known in NPZ_KEYS.items()}
            missing = [key for pair in pairs.values() if pair for key in pair if key not in archive]
            if not pairs["train"] or missing:
                raise UserError(
                    f"{path}: no array {', '.join(missing) or 'x_train'} (found {', '.join(archive.files) or 'none'}); "
                    "save x_train, y_train, x_test, y_test with numpy.savez"
                )
            found = {split: (pair, archive[pair[0]], archive[pair[1]]) for split, pair in pairs.items() if pair}
    except (OSError, ValueError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable npz file of plain arrays ({line(error)})") from error
    return RawDataset(str(path), None, {split: arrays(str(path), *each) for split, each in found.items()})


NAMED: dict[str, Callable[[Path, bool], RawDataset]] = {
    "digits": digits,
    "cifar10": partial(cifar, "CIFAR10"),
    "cifar100": partial(cifar, "CIFAR100"),
    "tiny-imagenet": tiny_imagenet,
}
"""Name -> reader(root, download)."""

AT_PATH: dict[str, Callable[[Path], RawDataset]] = {"parquet": parquet, "folder": folder, "npz": npz}
"""Kind, as in kind:PATH -> reader(path)."""


# ---- image files in folders


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _class_folders(path: Path, classes: list[str]) -> RawSplit:
    """path/<class>/**/<image file>, sorted by path; the label is the class's index in `classes`."""
    unknown = [child.name for child in _subfolders(path) if child.name not in classes]
    if unknown:
        raise UserError(f"{path / unknown[0]}: none of the classes ({listed(classes)}); rename or remove the folder")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            Path(base, file)
            for base, _, names in os.walk(path / name, followlinks=True)
            for file in names
            if Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith(".")
        )
        files += found
        labels += [label] * len(found)
    return _files(path, files, labels)


def _files(path: Path, files: list[Path], labels: list[int]) -> RawSplit:
    if not files:
        raise UserError(f"no image in {path}")

    def place(index: int) -> str:
        return str(files[index])

    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise UserError(f"{missing} is missing; restore it")
    images = decode((file.read_bytes() for file in files), len(files), place)
    return RawSplit(images, np.array(labels, np.int64), place)


# ---- arrays


def arrays(
    origin: str, keys: tuple[str, str], images: np.ndarray, labels: np.ndarray, channels_first: bool = False
) -> RawSplit:
    """A split from arrays that `origin` calls by the names `keys`; images as for `npz`, or known to be NCHW or NHW."""
    if images.ndim not in (3, 4):
        raise UserError(f"{origin}: {keys[0]} has shape {images.shape}; it must be NHWC, NCHW or NHW")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{origin}: {keys[1]} is {labels.dtype} {labels.shape}; it must be integers, one per image")
    if len(images) != len(labels) or not len(labels):
        raise UserError(
            f"{origin}: {keys[0]} has {len(images)} images, {keys[1]} {len(labels)} labels; they must agree"
        )
    where = f"{origin}: {keys[0]}"
    return RawSplit(
        _channels_first(_bytes(images, where), where, channels_first),
        labels.astype(np.int64),
        lambda index: f"{origin}, {keys[1]}[{index}]",
    )


def _bytes(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    floating = np.issubdtype(images.dtype, np.floating)
    top = 1 if floating else 255
    if not (floating or np.issubdtype(images.dtype, np.integer)) or not images.size:
        raise UserError(f"{where} is {images.dtype} {images.shape}; save uint8, or floats in [0, 1]")
    if not (images.min() >= 0 and images.max() <= top):  # also true for NaN
        raise UserError(f"{where} holds values outside 0..{top} ({images.dtype}); save uint8, or floats in [0, 1]")
    return np.rint(images * 255.0).astype(np.uint8) if floating else images.astype(np.uint8)


def _channels_first(images: np.ndarray, where: str, known: bool) -> np.ndarray:
    if images.ndim == 3 or known:
        return np.ascontiguousarray(images[:, None] if images.ndim == 3 else images)
    last, first = (images.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first or not images.size:
        why = "could be NHWC and NCHW" if last else "is not NHWC, NCHW (1 or 3 channels) or NHW"
        raise UserError(f"{where} of shape {images.shape} {why}; save it as NHW, or with 1 or 3 channels")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if last else images)
