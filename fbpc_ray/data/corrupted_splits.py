"""Corrupted test splits: from the official CIFAR-10-C folder, or generated and cached.

    <folder>/<corruption>.npy, labels.npy                   official: five severities, each the test set in its order
    <cache>/<data>-<digest>/<corruption>-<severity>.parquet generated: columns image (raw bytes) and label

`digest` is a hash of everything that the generated images depend on: the clean test split, the seed and the recipe. So
the content of a cached file is determined by its path; a damaged file is generated again.
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
from fbpc_ray.data.raw import line

KEY = b"fbpc_ray.corrupted"
"""Key of the JSON in a cached file's schema that describes its content."""


def corrupted_test(dataset: Dataset, name: str, severity: int, *, source: Path | None, seed: int, cache: Path) -> Split:
    """Return the test split under the corruption `name`; any number of processes may call this at once.

    Args:
        source: the official folder; None generates the images with `seed`, and caches them in `cache`.
    """
    if source is not None:
        return official(source, dataset, (name,)).split(name, severity)
    check(name, severity)
    path = cached_at(cache, dataset, seed) / f"{name}-{severity}.parquet"
    description = _describe(dataset.test, name, severity, seed)
    images = _read(path, dataset.test, description)
    if images is None:
        images = corrupt(dataset.test.images, name, severity, seed)
        _write(path, Split(images, dataset.test.labels), description)
    return Split(images, dataset.test.labels)


def notes(source: Path | None, seed: int, names: Iterable[str] = tuple(CORRUPTIONS)) -> tuple[str, ...]:
    """Describe the source of the corrupted images, in lines for the log and the table."""
    if source is not None:
        return (f"corrupted images from {source}",)
    note = f"corrupted images generated with seed {seed} (recipe {RECIPE}), by CIFAR-10-C's definitions and constants"
    return (note, FROST_NOTE) if "frost" in names else (note,)


# ---- official


class Official(NamedTuple):
    """A CIFAR-10-C folder checked against a data set, its images memory-mapped."""

    arrays: dict[str, np.ndarray]
    """Corruption -> (5 n, h, w, c) uint8, read-only, severity by severity."""
    labels: np.ndarray
    """(n,) int64, of the test split."""

    def split(self, name: str, severity: int) -> Split:
        """Copy one severity into memory."""
        check(name, severity)
        count = len(self.labels)
        images = self.arrays[name][(severity - 1) * count : severity * count]
        return Split(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), self.labels)


def official(folder: Path, dataset: Dataset, names: Iterable[str] = tuple(CORRUPTIONS)) -> Official:
    """Open the files of `names`; check sizes, types and every label against the test split of `dataset`."""
    folder, names = Path(folder).expanduser(), tuple(names)
    for name in names:
        check(name, SEVERITIES[0])
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; name the one that CIFAR-10-C.tar unpacks to, or have the images generated"
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
                f"{folder / file}: expected uint8 {(count, height, width, channels)}, five severities of the "
                f"{len(clean.labels)} test images of {dataset.name}, got {array.dtype} {array.shape}; "
                "fetch the file again, or choose the data set that it was made from"
            )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise UserError(
            f"{folder / 'labels.npy'}: expected {count} integers, five times the {len(clean.labels)} test labels of "
            f"{dataset.name}, got {labels.dtype} {labels.shape}; download the file again, or choose the data set that "
            "it was made from"
        )
    wrong = np.flatnonzero(labels != np.tile(clean.labels, len(SEVERITIES)))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{folder / 'labels.npy'}, row {row}: expected label {clean.labels[row % len(clean.labels)]}, that of test "
            f"image {row % len(clean.labels)} of {dataset.name}, got {labels[row]} ({len(wrong)} of {count} differ): "
            "the test images, or their order, are not the same; use CIFAR-10 itself, or have the corruptions generated"
        )
    return Official(dict(zip(names, arrays, strict=True)), clean.labels)


def _mapped(file: Path) -> np.ndarray:
    """Map a .npy file as a read-only array, without reading or unpickling it."""
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a damaged header fails in any way
        raise UserError(f"{file}: not a readable .npy array ({line(error)}); download the file again") from error


# ---- generated


def cached_at(cache: Path, dataset: Dataset, seed: int) -> Path:
    """Return the folder of the generated images of a test split and a seed: <cache>/cifar10-6ab1...

    A data set that is a path is named by the last part of it.
    """
    digest = hashlib.blake2b(repr((RECIPE, int(seed), dataset.test.images.shape)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(dataset.test.images).data.cast("B"))
    digest.update(dataset.test.labels.astype("<i8").tobytes())
    last = re.split(r"[/\\]", dataset.name.rstrip("/\\"))[-1].split(":")[-1]
    return cache / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', last).strip('-.') or 'data'}-{digest.hexdigest()}"


def _describe(clean: Split, name: str, severity: int, seed: int) -> dict[str, Any]:
    """Describe the content of a cached file, in types that survive JSON."""
    description = {
        "recipe": RECIPE, "corruption": name, "severity": int(severity), "seed": int(seed),
        "constants": CORRUPTIONS[name].constants[severity - 1], "shape": clean.images.shape,
        "notes": notes(None, seed, (name,)),
    }  # fmt: skip
    return json.loads(json.dumps(description))


def _write(path: Path, split: Split, description: dict[str, Any]) -> None:
    rows = np.ascontiguousarray(split.images).reshape(len(split.images), -1)
    image = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows.tobytes())]
    )
    table = pa.table({"image": image, "label": pa.array(split.labels)}).replace_schema_metadata(
        {KEY: json.dumps(description)}
    )
    file = BytesIO()
    pq.write_table(
        table, file, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    try:
        atomic.write_bytes(path, file.getvalue())
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot write corrupted images ({line(error)}); free space there, or choose another folder"
        ) from error


def _read(path: Path, clean: Split, description: dict[str, Any]) -> np.ndarray | None:
    """Return the images of a cached file; None if it is missing, damaged, or not as `description` says."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as opened:
            stored = json.loads((opened.schema_arrow.metadata or {}).get(KEY, b"null"))
            kinds = {field.name: field.type for field in opened.schema_arrow}
            size = int(np.prod(clean.images.shape[1:]))
            if stored != description or kinds != {"image": pa.binary(size), "label": pa.int64()}:
                return None
            table = opened.read()
    except (pa.ArrowException, OSError, ValueError):
        return None
    if not np.array_equal(table.column("label").to_numpy(), clean.labels) or table.column("image").null_count:
        return None
    chunks = table.column("image").chunks
    rows = [np.frombuffer(c.buffers()[1], np.uint8, len(c) * size, c.offset * size) for c in chunks]
    return np.concatenate(rows).reshape(clean.images.shape)
