"""Read image data by name: the register of readers. A reader turns files into a `RawDataset`.

Readers check what only they can see (bytes, columns, folders, files that belong together), naming the file and row.
What holds for every source (label range, empty classes, sizes, missing splits) is in datasets.py.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.data.folder import folder
from fbpc_ray.data.named import cifar, digits, tiny_imagenet
from fbpc_ray.data.npz import npz
from fbpc_ray.data.parquet import USUAL_COLUMNS, Columns, parquet
from fbpc_ray.data.raw import RawDataset, line
from fbpc_ray.data.resize import UNCHANGED, Resizing, resized_dataset
from fbpc_ray.data.shards import has_parquet

NAMED: dict[str, Callable[[Path, bool], RawDataset]] = {
    "digits": digits,
    "cifar10": partial(cifar, "CIFAR10"),
    "cifar100": partial(cifar, "CIFAR100"),
    "tiny-imagenet": tiny_imagenet,
}
"""Name -> reader(root, download)."""

AT_PATH: dict[str, Callable[[Path, Columns, Resizing], RawDataset]] = {
    "parquet": parquet,
    "folder": lambda path, columns, resizing: folder(path, resizing),
    "npz": lambda path, columns, resizing: npz(path),
}
"""Kind, as in kind:PATH -> reader(path, columns, resizing); images of one size may stay as they are."""

SUFFIXES = {".npz": "npz", ".parquet": "parquet", ".pq": "parquet"}
"""End of a file's name (lower case) -> its kind."""


def read(
    name: str, root: Path, download: bool, columns: Columns = USUAL_COLUMNS, resizing: Resizing = UNCHANGED
) -> RawDataset:
    """Read the data called `name`, see NAMED and AT_PATH. Raises UserError for all that is wrong with the input."""
    return resized_dataset(_read(name, root, download, columns, resizing), resizing)


def _read(name: str, root: Path, download: bool, columns: Columns, resizing: Resizing) -> RawDataset:
    kind, _, path = name.partition(":")
    if kind != "parquet" and any(columns):
        raise UserError(f"--label-column, --image-column: {name!r} has no columns; give them with parquet:PATH alone")
    try:
        if name in NAMED:
            return NAMED[name](root, download)
        if kind in AT_PATH and path:
            if "://" in path:
                raise UserError(f"{name}: data is read from this machine alone; copy the files, and give {kind}:PATH")
            if not (at := Path(path).expanduser()).exists():
                raise UserError(f"{at} does not exist; check the path after {kind}:")
            if not (at.is_dir() or at.is_file()):
                raise UserError(f"{at} is neither a folder nor a regular file; check the path after {kind}:")
            return AT_PATH[kind](at, columns, resizing)
    except (OSError, RuntimeError, ValueError) as error:  # of the last two: ~nobody, a NUL in a path
        raise UserError(f"{name!r}: cannot read the data: {line(error)}") from error
    if kind in AT_PATH:
        raise UserError(f"data {name!r} lacks its path; write {kind}:PATH")
    raise UserError(_unknown(name))


def _unknown(name: str) -> str:
    """Return what is wrong with a name that is neither a data set nor kind:PATH."""
    kinds = [f"{kind}:PATH" for kind in AT_PATH]
    if name.strip() and (at := Path(name).expanduser()).exists():
        kind = SUFFIXES.get(at.suffix.lower()) if at.is_file() else "parquet" if has_parquet(at) else "folder"
        if kind is None:
            return f"data {name!r} is a file of a kind that is not read; give {', '.join(kinds)}"
        return f"data {name!r} is a path: write its kind before it, e.g. {kind}:{name}"
    kind, colon, path = name.partition(":")
    if colon and kind.strip().lower() in AT_PATH:
        return f"unknown data {name!r}; write {kind.strip().lower()}:{path.strip()}"
    return f"unknown data {name!r}; {closest(name, [*NAMED, *kinds])}"
