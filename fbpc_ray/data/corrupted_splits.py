"""Corrupted test splits from files: the official CIFAR-10-C folder, or a cache of what corruptions.py generates.

    <folder>/<corruption>.npy, labels.npy                   official: five severities, each the test set in its order
    <cache>/<data>-<digest>/<corruption>-<severity>.parquet generated: columns image (raw bytes) and label

`digest` is of all that the generated images depend on: the clean test split, the seed and the recipe. So a cached
file has one right content; one that is damaged is made again and replaced, and nothing is lost.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core import files as atomic
from fbpc_ray.core.errors import UserError
from fbpc_ray.data.corruptions import CORRUPTIONS, FROST_NOTE, RECIPE, SEVERITIES, check, corrupt
from fbpc_ray.data.datasets import Dataset, Split

KEY = b"fbpc_ray.corrupted"
"""Of the JSON in a cached file's schema: what the file holds."""


def corrupted_test(dataset: Dataset, name: str, severity: int, *, source: Path | None, seed: int, cache: Path) -> Split:
    """The test split under the corruption `name`: official images from the folder `source`, or where that is None,
    generated with `seed` and kept in `cache`. Any number of processes may ask at once."""
    if source is not None:
        return official(source, dataset, (name,)).split(name, severity)
    check(name, severity)
    path = cached_at(cache, dataset, seed) / f"{name}-{severity}.parquet"
    about = _about(dataset.test, name, severity, seed)
    images = _read(path, dataset.test, about)
    if images is None:
        images = corrupt(dataset.test.images, name, severity, seed)
        _write(path, Split(images, dataset.test.labels), about)
    return Split(images, dataset.test.labels)


def notes(source: Path | None, seed: int, names: Iterable[str] = tuple(CORRUPTIONS)) -> tuple[str, ...]:
    """Lines for the log and the table: where the corrupted images come from."""
    if source is not None:
        return (f"corrupted images from {source}",)
    made = f"corrupted images generated with seed {seed} (recipe {RECIPE}), by CIFAR-10-C's definitions and constants"
    return (made, FROST_NOTE) if "frost" in names else (made,)


# ---- official


class Official(NamedTuple):
    """A CIFAR-10-C folder that fits a data set, its images memory-mapped."""

    arrays: dict[str, np.ndarray]
    """Corruption -> (5 n, h, w, c) uint8, read-only, severity by severity."""
    labels: np.ndarray
    """(n,) int64, of the test split."""

    def split(self, name: str, severity: int) -> Split:
        """One severity, copied into memory."""
        check(name, severity)
        count = len(self.labels)
        images = self.arrays[name][(severity - 1) * count : severity * count]
        return Split(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), self.labels)


def official(folder: Path, dataset: Dataset, names: Iterable[str] = tuple(CORRUPTIONS)) -> Official:
    """Open `names` and check them against the test split of `dataset`: size, type, and the label of every image."""
    folder, names = Path(folder).expanduser(), tuple(names)
    for name in names:
        check(name, SEVERITIES[0])
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; name the one that CIFAR-10-C.tar unpacks to, or have them generated"
        )
    files = [f"{name}.npy" for name in (*names, "labels")]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; name the folder that CIFAR-10-C.tar unpacks to, or unpack it again"
        )
    *arrays, labels = (_mapped(folder / file) for file in files)
    clean = dataset.test
    count, (channels, height, width) = len(SEVERITIES) * len(clean.labels), dataset.image_shape
    for file, array in zip(files, arrays, strict=False):
        if array.dtype != np.uint8 or array.shape != (count, height, width, channels):
            raise UserError(
                f"{folder / file} holds {array.dtype} {array.shape}, not uint8 {(count, height, width, channels)}, "
                f"five severities of the {len(clean.labels)} test images of {dataset.name}; "
                "fetch the file again, or choose the data it was made from"
            )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise UserError(
            f"{folder / 'labels.npy'} holds {labels.dtype} {labels.shape}, not {count} integers, five times the "
            f"{len(clean.labels)} test labels of {dataset.name}; fetch the file again, or choose the data it belongs to"
        )
    wrong = np.flatnonzero(labels != np.tile(clean.labels, len(SEVERITIES)))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{folder / 'labels.npy'}, row {row}: label {labels[row]}, where test image {row % len(clean.labels)} of "
            f"{dataset.name} has {clean.labels[row % len(clean.labels)]} ({len(wrong)} of {count} differ): the "
            "test images are others or in another order; use --data cifar10, or have the corruptions generated"
        )
    return Official(dict(zip(names, arrays, strict=True)), clean.labels)


def _mapped(file: Path) -> np.ndarray:
    """A .npy file as a read-only array, nothing of it read yet; this never unpickles."""
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a damaged header fails in any way
        raise UserError(f"{file}: not a readable .npy array ({_line(error)}); fetch the file again") from error


# ---- generated


def cached_at(cache: Path, dataset: Dataset, seed: int) -> Path:
    """Where the generated images of this test split and seed are kept, e.g. corruptions/cifar10-6ab1...; of a path
    the last part names the data."""
    digest = hashlib.blake2b(repr((RECIPE, int(seed), dataset.test.images.shape)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(dataset.test.images).data.cast("B"))
    digest.update(dataset.test.labels.astype("<i8").tobytes())
    last = re.split(r"[/\\]", dataset.name.rstrip("/\\"))[-1].split(":")[-1]
    return cache / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', last).strip('-.') or 'data'}-{digest.hexdigest()}"


def _about(clean: Split, name: str, severity: int, seed: int) -> dict[str, Any]:
    """What a cached file says of itself, as JSON gives it back."""
    about = {
        "recipe": RECIPE, "corruption": name, "severity": int(severity), "seed": int(seed),
        "constants": CORRUPTIONS[name].constants[severity - 1], "shape": clean.images.shape,
        "notes": notes(None, seed, (name,)),
    }  # fmt: skip
    return json.loads(json.dumps(about))


def _write(path: Path, split: Split, about: dict[str, Any]) -> None:
    rows = np.ascontiguousarray(split.images).reshape(len(split.images), -1)
    image = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows.tobytes())]
    )
    table = pa.table({"image": image, "label": pa.array(split.labels)}).replace_schema_metadata(
        {KEY: json.dumps(about)}
    )
    file = BytesIO()
    pq.write_table(
        table, file, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    try:
        atomic.write_bytes(path, file.getvalue())
    except OSError as error:
        raise UserError(
            f"cannot keep corrupted images in {path.parent} ({_line(error)}); free space there, or choose another place"
        ) from error


def _read(path: Path, clean: Split, about: dict[str, Any]) -> np.ndarray | None:
    """The images of a cached file; None where there is none, or it is not what `about` says to the last bit."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as opened:
            found = json.loads((opened.schema_arrow.metadata or {}).get(KEY, b"null"))
            kinds = {field.name: field.type for field in opened.schema_arrow}
            size = int(np.prod(clean.images.shape[1:]))
            if found != about or kinds != {"image": pa.binary(size), "label": pa.int64()}:
                return None
            table = opened.read()
    except (pa.ArrowException, OSError, ValueError):
        return None
    if not np.array_equal(table.column("label").to_numpy(), clean.labels) or table.column("image").null_count:
        return None
    chunks = table.column("image").chunks
    rows = [np.frombuffer(c.buffers()[1], np.uint8, len(c) * size, c.offset * size) for c in chunks]
    return np.concatenate(rows).reshape(clean.images.shape)


def _line(error: Exception) -> str:
    """An error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
