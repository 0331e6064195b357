"""Expert trajectories on disk: one folder for one (data set, architecture, recipe), one Arrow file for one trajectory.

    store.json      the recipe, written before anything else
    00000.arrow     Arrow IPC file: record batch e holds the snapshot after epoch e, one column for one tensor
    00000.json      its manifest, written last: a trajectory without one does not exist

A crash at any moment leaves a file that nobody lists, never half an expert. Nothing here is pickled. In an object store
a trajectory is written beside the local copies (cache.py), sent when it is whole, and read from its copy.
"""

import hashlib
import json
import math
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import torch
from pyarrow import ipc
from torch import Tensor

from fbpc_ray.core import cache, files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote

FORMAT = 1
MAX_OPEN = 128  # memory maps, each a file descriptor, that one store keeps
STORED = {"float32": torch.float32, "float16": torch.float16}
Found = TypeVar("Found")


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


class _Trajectory(NamedTuple):
    """An open, memory-mapped trajectory."""

    path: Path
    """The file, or its local copy."""
    identity: tuple[int, int] | None
    """(inode, bytes) of the file when it was opened."""
    reader: ipc.RecordBatchFileReader
    shapes: dict[str, list[int]]


class ExpertStore:
    """The trajectories of one recipe in one folder or prefix. Opening creates nothing; reading is safe from several
    threads, and writing from several processes.

    Raises UserError where the folder holds trajectories of another recipe.
    """

    def __init__(self, folder: Place, recipe: Recipe, beside: Place | None = None):
        """`beside`: where to go if another recipe is quicker to take `folder`."""
        if recipe.dtype not in STORED:
            raise ValueError(f"recipe.dtype is {recipe.dtype!r}, known: {', '.join(STORED)}")
        self.__setstate__((folder, recipe))
        self._beside = beside
        self._claimed()

    def __getstate__(self) -> tuple[Place, Recipe]:
        return self.folder, self.recipe

    def __setstate__(self, state: tuple[Place, Recipe]) -> None:
        self.folder, self.recipe = state
        self._beside: Place | None = None
        self._open: dict[int, _Trajectory] = {}
        self._checksums: dict[int, str] = {}
        self._lock = threading.Lock()

    def claim(self) -> None:
        """Make the folder this recipe's, as is done before anything is trained for it. Raises UserError where it is
        another's."""
        if _recipe_in(self.folder) is None:
            text = json.dumps({"format": FORMAT, "recipe": _plain(self.recipe)})
            files.write_first(self.folder / "store.json", text)
        if self._beside is not None and _recipe_in(self.folder) != _plain(self.recipe):
            self.folder, self._beside = self._beside, None
            self.claim()
        self._claimed()

    def missing(self, count: int) -> list[int]:
        """The indices below `count` that have no whole trajectory."""
        if isinstance(self.folder, Remote):  # one request for all of them; an object that is there is whole
            names = {each.name for each in self.folder.iterdir()}
            return [n for n in range(count) if not {self._arrow(n).name, self._manifest(n).name} <= names]
        return [index for index in range(count) if not self.is_complete(index)]

    def is_complete(self, index: int) -> bool:
        """Is there a manifest, and a file of the size it states?"""
        arrow, manifest = self._arrow(index), self._manifest(index)
        if isinstance(arrow, Remote):
            return manifest.exists() and arrow.exists()
        try:
            return json.loads(manifest.read_text())["bytes"] == arrow.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def write(self, index: int, snapshots: Iterable[dict[str, Tensor]]) -> None:
        """Store the snapshots of epochs 0..E as trajectory `index`, each written as it arrives.

        The tensors may alias live ones: a snapshot is on its way to disk before the next one is asked for. Floating
        tensors are stored as `recipe.dtype`, all others as int64. An earlier trajectory `index` stays until the new one
        is whole. Raises UserError for non-finite values, ValueError unless there are E + 1 snapshots of equal names and
        shapes, OSError for a full disk; then nothing of the new trajectory is left. One that another process wrote in
        the meantime stays: it is the same, and may be read already.
        """
        if index < 0:
            raise ValueError(f"the index of a trajectory is {index}, must be at least 0")
        self.claim()
        arrow, manifest = self._arrow(index), self._manifest(index)
        if isinstance(arrow, Remote):
            self._send(index, snapshots, arrow)
            return
        folder, before = arrow.parent, self.is_complete(index)
        files.remove_stale_temp_files(folder, f".{arrow.name}.*.tmp")
        temporary = folder / f".{arrow.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            with files.locked_temp_file(temporary) as file:
                sink = _Sink(file)
                shapes = self._stream(index, snapshots, sink)
                file.flush()
                os.fsync(file.fileno())
                self._claimed()  # whoever created the folder in the meantime may have had another recipe
                if not before and self.is_complete(index):
                    temporary.unlink()
                    return
                manifest.unlink(missing_ok=True)
                temporary.replace(arrow)  # in the block: later it might be swept
            try:
                self._list(index, sink, shapes)
            except BaseException:
                if not manifest.exists():
                    arrow.unlink(missing_ok=True)
                raise
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _send(self, index: int, snapshots: Iterable[dict[str, Tensor]], arrow: Remote) -> None:
        """`write` into an object store."""
        with cache.scratch() as file:
            sink = _Sink(file)
            shapes = self._stream(index, snapshots, sink)
            file.flush()
            self._claimed()
            if not self.is_complete(index):
                arrow.upload(Path(file.name))
                self._list(index, sink, shapes)
            cache.keep(file, sink.digest.hexdigest())

    def _list(self, index: int, sink: "_Sink", shapes: dict[str, list[int]]) -> None:
        """Write the manifest of a trajectory: now it exists."""
        facts = {"epochs": self.recipe.epochs, "bytes": sink.bytes, "checksum": sink.digest.hexdigest()}
        files.write_text(self._manifest(index), json.dumps({**facts, "tensors": shapes}))

    def checksum(self, index: int) -> str:
        """Of the file of trajectory `index`, as its manifest states it. Raises UserError where there is none."""
        if index not in self._checksums:
            try:
                self._checksums[index] = str(json.loads(self._manifest(index).read_text())["checksum"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                self._damaged(index, error)
        return self._checksums[index]

    def read(self, index: int, epoch: int) -> dict[str, Tensor]:
        """The tensors of one snapshot by name: fresh, writable, on the CPU, float32 or int64, in their own shapes.

        Only this snapshot is read from disk, and nothing returned pins the file. The checksum is not tested: `verify`.
        Raises UserError for a trajectory or an epoch that is not there, and for a damaged file.
        """
        if not 0 <= epoch <= self.recipe.epochs:
            raise UserError(
                f"epoch {epoch} is not in the experts of {self.folder}: they hold epochs 0 to {self.recipe.epochs}, "
                "ask for one of these or make longer experts"
            )
        tensors = {}
        try:
            with self._lock:  # Arrow's reader is not for two threads at once; this builds views and reads no values
                trajectory = self._opened(index)
                batch = trajectory.reader.get_batch(epoch)
            if batch.num_rows != 1:
                raise ValueError(f"epoch {epoch} has {batch.num_rows} rows")
            for (name, shape), column in zip(trajectory.shapes.items(), batch.columns, strict=True):
                values = column.values  # .flatten() and .to_numpy() would import pandas, a second in each worker
                kind = np.int64 if pa.types.is_int64(values.type) else self.recipe.dtype
                view = np.frombuffer(values.buffers()[1], kind, math.prod(shape))
                tensor = torch.from_numpy(view.copy())  # out of the map
                tensors[name] = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64).reshape(shape)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException) as error:
            self._damaged(index, error)
        return tensors

    def verify(self, index: int) -> None:
        """Read all of trajectory `index` and compare it with its checksum. Raises UserError where they differ."""
        try:
            with self._lock:
                self._opened(index)
            self._with_file(index, _check_digest)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            self._damaged(index, error)

    def _arrow(self, index: int) -> Place:
        return self.folder / f"{index:05d}.arrow"

    def _manifest(self, index: int) -> Place:
        return self.folder / f"{index:05d}.json"

    def _damaged(self, index: int, error: Exception) -> NoReturn:
        """Raise what a reader of trajectory `index` is told: it isn't there, or it is not what was written."""
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self.folder} has no whole expert {index}: make it with `fbpc experts`") from error
        if isinstance(error, OSError) and error.errno:  # the system's word; Arrow's own have no number
            raise UserError(
                f"{self._arrow(index)} cannot be read ({error.strerror}): fix that and run again"
            ) from error
        reason = f"it has no {error}" if isinstance(error, KeyError) else (str(error).splitlines() or ["no reason"])[0]
        raise UserError(f"{self._arrow(index)} is damaged ({reason}): delete it and run again") from error

    def _claimed(self) -> bool:
        """Is the folder this recipe's already? UserError where it is another's."""
        recipe = _recipe_in(self.folder)
        if recipe is None:
            return False
        wanted = _plain(self.recipe)
        names = [name for name in {**wanted, **recipe} if recipe.get(name) != wanted.get(name)]
        if names:
            made = ", ".join(f"{name} {recipe.get(name)}" for name in names)
            wants = ", ".join(f"{name} {wanted.get(name)}" for name in names)
            raise UserError(
                f"experts in {self.folder} were made with {made}, this run wants {wants}: give another --experts folder"
            )
        return True

    def _stream(self, index: int, snapshots: Iterable[dict[str, Tensor]], sink: "_Sink") -> dict[str, list[int]]:
        """Write the whole Arrow file into `sink`; the shapes of its tensors by name."""
        writer, schema, shapes, epochs = None, None, {}, 0
        for epoch, snapshot in enumerate(snapshots):
            epochs = epoch + 1
            if epochs > self.recipe.epochs + 1:
                break
            batch = self._batch(index, epoch, snapshot)
            if writer is None:
                shapes = {name: list(tensor.shape) for name, tensor in snapshot.items()}
                schema = batch.schema
                writer = ipc.new_file(pa.PythonFile(sink, mode="w"), schema)
            elif not batch.schema.equals(schema, check_metadata=True):
                raise ValueError(
                    f"trajectory {index}: names, shapes or dtypes at epoch {epoch} are not those of epoch 0"
                )
            writer.write_batch(batch)
        if writer is None or epochs != self.recipe.epochs + 1:
            raise ValueError(f"trajectory {index} has another number of snapshots than {self.recipe.epochs + 1}")
        writer.close()
        return shapes

    def _batch(self, index: int, epoch: int, snapshot: dict[str, Tensor]) -> pa.RecordBatch:
        """One snapshot as one row. Shares memory with `snapshot` where it can."""
        columns, fields = [], []
        for name, tensor in snapshot.items():
            floating = tensor.is_floating_point()
            stored = tensor.detach().to("cpu", STORED[self.recipe.dtype] if floating else torch.int64)
            if floating and not stored.isfinite().all():
                why = f"does not fit {self.recipe.dtype}" if tensor.isfinite().all() else "is not finite"
                raise UserError(
                    f"expert {index} of {self.folder} diverged: {name} {why} at epoch {epoch}: lower --expert-lr"
                )
            flat = stored.contiguous().reshape(-1).numpy()
            buffers = [None, pa.py_buffer(flat)]  # pa.array(flat) is the same, and imports pandas
            values = pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), buffers)
            columns.append(pa.FixedSizeListArray.from_arrays(values, stored.numel()))
            facts = {"shape": json.dumps(list(tensor.shape)), "dtype": str(tensor.dtype).removeprefix("torch.")}
            fields.append(pa.field(name, columns[-1].type, nullable=False, metadata=facts))
        metadata = {"format": str(FORMAT), "recipe": json.dumps(_plain(self.recipe))}
        return pa.record_batch(columns, schema=pa.schema(fields, metadata=metadata))

    def _opened(self, index: int) -> _Trajectory:
        """Trajectory `index`, from the cache where the file is still the same one. The caller holds the lock."""
        kept = self._open.pop(index, None)
        if kept is None or kept.identity != _identity(kept.path):
            if isinstance(self.folder, Remote):  # let go of what was pushed out of the cache, for the disk's sake
                self._open = {n: each for n, each in self._open.items() if each.identity == _identity(each.path)}
            kept = self._with_file(index, self._mapped)
        self._open[index] = kept  # last: the one used longest ago is first
        if len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]
        return kept

    def _with_file(self, index: int, use: Callable[[Path, dict[str, Any]], Found]) -> Found:
        """What `use` makes of the file of trajectory `index`, or of its local copy, and of its manifest. A copy that
        `use` can't read is fetched once more: it was tested as it came, so it was damaged here."""
        arrow, manifest = self._arrow(index), json.loads(self._manifest(index).read_text())
        if isinstance(arrow, Path):
            return use(arrow, manifest)
        for last in (False, True):
            with cache.copy(arrow, manifest["bytes"], manifest["checksum"]) as path:
                try:
                    return use(path, manifest)
                except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
                    if last:
                        raise
                    path.unlink(missing_ok=True)
        raise AssertionError("not reached")

    def _mapped(self, path: Path, manifest: dict[str, Any]) -> _Trajectory:
        size = path.stat().st_size
        if size != manifest["bytes"]:
            raise ValueError(f"{size} bytes, its manifest says {manifest['bytes']}")
        reader = ipc.open_file(pa.memory_map(str(path)))
        return _Trajectory(path, _identity(path), reader, self._checked(reader, manifest))

    def _checked(self, reader: ipc.RecordBatchFileReader, manifest: dict[str, Any]) -> dict[str, list[int]]:
        """The shapes by name, after comparing the file's schema with the recipe and with its manifest."""
        facts = reader.schema.metadata or {}
        if facts.get(b"format") != str(FORMAT).encode():
            raise ValueError(f"format {facts.get(b'format')}, this version reads {FORMAT}")
        if json.loads(facts[b"recipe"]) != _plain(self.recipe):
            raise ValueError("it was made with another recipe than its store.json says")
        if reader.num_record_batches != self.recipe.epochs + 1:
            raise ValueError(f"{reader.num_record_batches} snapshots, expected {self.recipe.epochs + 1}")
        shapes = {}
        for field in reader.schema:
            shapes[field.name] = shape = json.loads((field.metadata or {})[b"shape"])
            kinds = pa.from_numpy_dtype(self.recipe.dtype), pa.int64()
            if field.type not in [pa.list_(kind, math.prod(shape)) for kind in kinds]:
                raise ValueError(f"column {field.name} is {field.type}, its shape is {shape}")
        if list(shapes.items()) != list(manifest["tensors"].items()):
            raise ValueError("its tensors are not those in its manifest")
        return shapes


class _Sink:
    """A file for Arrow to write to that counts and digests what passes. Leaves closing to the file's owner."""

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


def found(root: Place, recipe: Recipe) -> ExpertStore:
    """The store of `recipe` below `root`: in `folder`; where that holds another recipe (other training images, another
    learning rate), beside it, under a digest of the recipe. Raises UserError for a store.json that can't be read."""
    home, wanted = folder(root, recipe), _plain(recipe)
    beside = folder(root, recipe, f"-{hashlib.blake2b(json.dumps(wanted).encode(), digest_size=4).hexdigest()}")
    if _recipe_in(home) not in (None, wanted):
        return ExpertStore(beside, recipe)
    return ExpertStore(home, recipe, beside)


def _recipe_in(folder: Place) -> dict[str, Any] | None:
    """The recipe whose experts are in `folder`, None where nobody's are. Raises UserError."""
    path = folder / "store.json"
    try:
        store = json.loads(path.read_text())
        version, recipe = store["format"], dict(store["recipe"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): give another --experts folder") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}: give another --experts folder")
    return recipe


def folder(root: Place, recipe: Recipe, end: str = "") -> Place:
    """Where the experts of `recipe` live, e.g. experts/cifar10/convnet-in-w128-d3; of a path its last part counts.

    Those without DSA (Table 10) live beside those with it, as convnet-in-w128-d3-none.
    """
    parts = [re.split(r"[/\\]", part.rstrip("/\\"))[-1] for part in recipe.data.split(":", 1)]
    name = f"{recipe.architecture}-w{recipe.width}-d{recipe.depth}"
    return root / slug("-".join(parts)) / slug((name if recipe.augment == "dsa" else f"{name}-{recipe.augment}") + end)


def slug(text: str) -> str:
    """`text` as a file name: letters, digits, dots, dashes and underscores, no dot or dash at its ends."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "data"


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(recipe._asdict()))


def _identity(path: Path) -> tuple[int, int] | None:
    """(inode, bytes) of a file, None where it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size


def _check_digest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, cache.digest).hexdigest() != manifest["checksum"]:
            raise ValueError("its checksum is not the one in its manifest")
