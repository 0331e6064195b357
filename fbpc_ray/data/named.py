"""Data sets that are known by name: digits, CIFAR-10 and -100, Tiny-ImageNet."""

from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np

from fbpc_ray.core import files as atomic
from fbpc_ray.core.errors import UserError
from fbpc_ray.data.raw import RawDataset, RawSplit, line
from fbpc_ray.data.walk import by_class, read_files, subfolders, walk


def digits(root: Path, download: bool) -> RawDataset:
    """Load scikit-learn's 1,797 digits, (1, 8, 8), 0..16 scaled to 0..255; every fifth is a test image."""
    del root, download  # they come with scikit-learn, whose import, with pandas and scipy, takes seconds
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("--data digits: needs scikit-learn, which is not installed; pip install scikit-learn")
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    parts = {
        name: RawSplit(images[rows], labels[rows], "row {}".format) for name, rows in (("train", ~test), ("test", test))
    }
    return RawDataset("digits", tuple(map(str, range(10))), parts)


def cifar(kind: str, root: Path, download: bool) -> RawDataset:
    """Load CIFAR10 or CIFAR100 (fine labels) from torchvision's root, (3, 32, 32)."""
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
                f"{kind.lower()} is missing or incomplete in {root}: download it with --download, or name its folder "
                "with --data-root"
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
    """Load the unpacked Tiny-ImageNet in root/tiny-imagenet-200 or root; its test split has no labels."""
    del download  # not offered: one UserError says where to get it
    base = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (base / "train").is_dir():
        raise UserError(
            f"no tiny-imagenet in {root}: unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there, "
            "or name the folder that holds tiny-imagenet-200 with --data-root"
        )
    names = base / "wnids.txt"
    wnids = (
        sorted(names.read_text("utf-8", "replace").split())
        if names.is_file()
        else [f.name for f in subfolders(base / "train")]
    )
    listing = walk(base / "train", by_class(base / "train", wnids))
    parts = {"train": read_files(base / "train", listing.files, listing.labels)}
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
    parts["validation"] = read_files(annotations.parent, files, labels)
    return RawDataset(str(base), tuple(wnids), parts)
