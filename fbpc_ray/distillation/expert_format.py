"""The files of one expert: an Arrow IPC file of snapshots, and its manifest.

    00000.arrow     record batch e holds the snapshot after epoch e, one column for one tensor
    00000.json      its manifest: epochs, bytes, checksum of the file, checksums of the snapshots, shapes of the tensors

Nothing is pickled. A manifest of an earlier release lacks the checksums of the snapshots: opening then reads the whole
file, once, to compare its checksum.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import ipc
from torch import Tensor

from fbpc_ray.core import cache, inputs
from fbpc_ray.core.errors import UserError

FORMAT = 1
STORED = {"float32": torch.float32, "float16": torch.float16}


class Recipe(NamedTuple):
    """All that makes a trajectory: two stores with equal recipes hold equal snapshots."""

    data: str
    fingerprint: str
    """Of the training images and labels."""
    image_shape: tuple[int, int, int]
    """(c, h, w)."""
    classes: int
    architecture: str
    width: int
    depth: int
    epochs: int
    """E: a trajectory holds E + 1 snapshots; snapshot 0 is the initialisation."""
    lr: float
    batch_size: int
    augment: str
    """"dsa" or "none"."""
    dtype: str
    """How floating tensors are stored: "float32", or "float16" (relative error 2^-11 for 6.1e-5 <= |value| < 65504)."""
    seed: int
    precision: str = "fp32"
    """Number format of the training passes: "fp32" or "bf16"."""

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON gives it back: tuples as lists. Without `precision` if it is fp32, as before it."""
        values = self._asdict()
        if self.precision == "fp32":
            del values["precision"]
        return json.loads(json.dumps(values))

    def __repr__(self) -> str:
        """Name the fields of `to_json`: keys of cached trajectories are made from this text."""
        names = [name for name in self._fields if name != "precision" or self.precision != "fp32"]
        return f"Recipe({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class Trajectory(NamedTuple):
    """An open, memory-mapped trajectory."""

    path: Path
    """The file, or its local copy."""
    identity: tuple[int, int] | None
    """(inode, bytes) of the file when it was opened."""
    reader: ipc.RecordBatchFileReader
    shapes: dict[str, list[int]]
    checksums: list[str]
    """Of the snapshots; empty where the manifest has none, and the whole file was compared."""
    checked: set[int]
    """Epochs whose snapshots were compared."""


class Sink:
    """A file for Arrow to write to, which counts and digests the bytes. Leaves closing to the file's owner."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.bytes = file, cache.digest(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Arrow calls this; the file stays open."""


def write_trajectory(sink: Sink, snapshots: Iterable[dict[str, Tensor]], recipe: Recipe, name: str) -> dict[str, Any]:
    """Write the snapshots of epochs 0..E as an Arrow file, each as it arrives; return the manifest.

    Args:
        name: the expert, for errors.

    Raises:
        UserError: a value is not finite, or doesn't fit the stored type.
        ValueError: there are not E + 1 snapshots of equal names, shapes and types.
    """
    writer, schema, shapes, checksums = None, None, {}, []
    for epoch, snapshot in enumerate(snapshots):
        if epoch > recipe.epochs:
            checksums.append("")
            break
        batch = _batch(snapshot, recipe, f"{name} diverged", epoch)
        if writer is None:
            shapes = {name: list(tensor.shape) for name, tensor in snapshot.items()}
            schema = batch.schema
            writer = ipc.new_file(pa.PythonFile(sink, mode="w"), schema)
        elif not batch.schema.equals(schema, check_metadata=True):
            raise ValueError(f"{name}: names, shapes or dtypes at epoch {epoch} are not those of epoch 0")
        writer.write_batch(batch)
        checksums.append(inputs.crc(column.values.buffers()[1] for column in batch.columns))
    if writer is None or len(checksums) != recipe.epochs + 1:
        raise ValueError(f"{name} has another number of snapshots than {recipe.epochs + 1}")
    writer.close()
    return {
        "epochs": recipe.epochs, "bytes": sink.bytes, "checksum": sink.digest.hexdigest(),
        "snapshot_checksums": checksums, "tensors": shapes,
    }  # fmt: skip


def _batch(snapshot: dict[str, Tensor], recipe: Recipe, diverged: str, epoch: int) -> pa.RecordBatch:
    """Return a snapshot as one row, which shares memory with `snapshot` where it can."""
    columns, fields = [], []
    for name, tensor in snapshot.items():
        floating = tensor.is_floating_point()
        stored = tensor.detach().to("cpu", STORED[recipe.dtype] if floating else torch.int64)
        if floating and not stored.isfinite().all():
            why = f"does not fit {recipe.dtype}" if tensor.isfinite().all() else "is not finite"
            raise UserError(f"{diverged}: {name} {why} at epoch {epoch}: lower --expert-lr")
        flat = stored.contiguous().reshape(-1).numpy()
        buffers = [None, pa.py_buffer(flat)]  # pa.array(flat) is the same, and imports pandas
        values = pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), buffers)
        columns.append(pa.FixedSizeListArray.from_arrays(values, stored.numel()))
        facts = {"shape": json.dumps(list(tensor.shape)), "dtype": str(tensor.dtype).removeprefix("torch.")}
        fields.append(pa.field(name, columns[-1].type, nullable=False, metadata=facts))
    metadata = {"format": str(FORMAT), "recipe": json.dumps(recipe.to_json())}
    return pa.record_batch(columns, schema=pa.schema(fields, metadata=metadata))


def open_trajectory(path: Path, manifest: dict[str, Any], recipe: Recipe) -> Trajectory:
    """Map a trajectory. Raises OSError, ValueError, KeyError or TypeError for a file other than its manifest says."""
    with inputs.open_regular(path):
        size = path.stat().st_size
    if size != manifest["bytes"]:
        raise ValueError(f"{size} bytes, its manifest says {manifest['bytes']}")
    checksums = [str(checksum) for checksum in manifest.get("snapshot_checksums", [])]
    if checksums and len(checksums) != recipe.epochs + 1:
        raise ValueError(f"{len(checksums)} checksums in its manifest, expected {recipe.epochs + 1}")
    if not checksums:
        check_digest(path, manifest)
    reader = ipc.open_file(pa.memory_map(str(path)))
    return Trajectory(path, identity(path), reader, _check_schema(reader, manifest, recipe), checksums, set())


def check_digest(path: Path, manifest: dict[str, Any]) -> None:
    """Read a whole trajectory and compare its checksum. Raises ValueError if it differs from its manifest's."""
    with inputs.open_regular(path) as file:
        if hashlib.file_digest(file, cache.digest).hexdigest() != manifest["checksum"]:
            raise ValueError("its checksum is not the one in its manifest")


def _check_schema(reader: ipc.RecordBatchFileReader, manifest: dict[str, Any], recipe: Recipe) -> dict[str, list[int]]:
    """Return the shapes by name, after comparing the file's schema with the recipe and with its manifest."""
    facts = reader.schema.metadata or {}
    if facts.get(b"format") != str(FORMAT).encode():
        raise ValueError(f"format {facts.get(b'format')}, this version reads {FORMAT}")
    if inputs.parse_json(facts[b"recipe"]) != recipe.to_json():
        raise ValueError("it was made with another recipe than its store.json says")
    if reader.num_record_batches != recipe.epochs + 1:
        raise ValueError(f"{reader.num_record_batches} snapshots, expected {recipe.epochs + 1}")
    shapes = {}
    for field in reader.schema:
        shapes[field.name] = shape = inputs.parse_json((field.metadata or {})[b"shape"])
        kinds = pa.from_numpy_dtype(recipe.dtype), pa.int64()
        if field.type not in [pa.list_(kind, math.prod(shape)) for kind in kinds]:
            raise ValueError(f"column {field.name} is {field.type}, its shape is {shape}")
    if list(shapes.items()) != list(manifest["tensors"].items()):
        raise ValueError("its tensors are not those in its manifest")
    return shapes


def snapshot_of(trajectory: Trajectory, batch: pa.RecordBatch, epoch: int, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of `batch`, the snapshot after `epoch`, by name: fresh, float32 or int64.

    Raises ValueError if their checksum differs from the manifest's, or a value is not finite.
    """
    if batch.num_rows != 1:
        raise ValueError(f"epoch {epoch} has {batch.num_rows} rows")
    views = {}
    for (name, shape), column in zip(trajectory.shapes.items(), batch.columns, strict=True):
        values = column.values  # .flatten() and .to_numpy() would import pandas, a second in each worker
        kind = np.int64 if pa.types.is_int64(values.type) else dtype
        views[name] = np.frombuffer(values.buffers()[1], kind, math.prod(shape)).reshape(shape)
    if trajectory.checksums and epoch not in trajectory.checked:
        if trajectory.checksums[epoch] != inputs.crc(view.data for view in views.values()):
            raise ValueError(f"the checksum of epoch {epoch} is not the one in its manifest")
        trajectory.checked.add(epoch)
    tensors = {}
    for name, view in views.items():
        tensor = torch.from_numpy(view.copy())  # out of the map
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite at epoch {epoch}")
        tensors[name] = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)
    return tensors


def identity(path: Path) -> tuple[int, int] | None:
    """Return (inode, bytes) of a file, None where it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size
