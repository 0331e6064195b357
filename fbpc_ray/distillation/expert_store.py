"""Expert trajectories on disk: a folder for each (data set, architecture, recipe), a file for each.

    store.json      the recipe, written before anything else
    00000.arrow     the snapshots of one trajectory (expert_format.py)
    00000.json      its manifest, written last: a trajectory without one does not exist

A crash at any moment leaves a file that nobody lists, never half an expert. In an object store a trajectory is written
beside the local copies (cache.py), sent when it is complete, and read from its copy.
"""

import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
from torch import Tensor

from fbpc_ray.core import cache, files, inputs
from fbpc_ray.core.errors import UserError, reason_of
from fbpc_ray.core.storage import Place, Remote
from fbpc_ray.distillation import expert_format
from fbpc_ray.distillation.expert_format import FORMAT, STORED, Recipe, Sink, Trajectory

MAX_OPEN = 128  # memory maps, each a file descriptor, that one store keeps
Result = TypeVar("Result")
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, pa.ArrowException)
"""What reading a damaged trajectory or manifest raises."""


class ExpertStore:
    """The trajectories of one recipe in one folder or prefix. Opening creates nothing; reading is safe from several
    threads, and writing from several processes.

    Raises UserError where the folder holds trajectories of another recipe.
    """

    def __init__(self, folder: Place, recipe: Recipe, beside: Place | None = None):
        """`beside`: the folder to use if another process claims `folder` for another recipe first."""
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
        self._open: dict[int, Trajectory] = {}
        self._checksums: dict[int, str] = {}
        self._lock = threading.Lock()

    def claim(self) -> None:
        """Write the recipe into the folder before training. Raises UserError if the folder has another recipe."""
        if _recipe_in(self.folder) is None:
            text = json.dumps({"format": FORMAT, "recipe": self.recipe.to_json()})
            files.write_first(self.folder / "store.json", text)
        if self._beside is not None and _recipe_in(self.folder) != self.recipe.to_json():
            self.folder, self._beside = self._beside, None
            self.claim()
        self._claimed()

    def missing(self, count: int) -> list[int]:
        """Return the indices below `count` that have no complete trajectory."""
        if isinstance(self.folder, Remote):  # one request for all of them; an object is complete
            names = {path.name for path in self.folder.iterdir()}
            return [n for n in range(count) if not {self._arrow(n).name, self._manifest(n).name} <= names]
        return [index for index in range(count) if not self.is_complete(index)]

    def is_complete(self, index: int) -> bool:
        """Return whether a trajectory has a manifest, and a file of the size that it states."""
        arrow, manifest = self._arrow(index), self._manifest(index)
        if isinstance(arrow, Remote):
            return manifest.exists() and arrow.exists()
        try:
            return inputs.read_json(manifest)["bytes"] == arrow.stat().st_size
        except (UserError, *DAMAGE):
            return False

    def write(self, index: int, snapshots: Iterable[dict[str, Tensor]]) -> None:
        """Store the snapshots of epochs 0..E as trajectory `index`, each as it arrives.

        The tensors may alias live ones: a snapshot is on its way to disk before the next one is drawn. Floating tensors
        are stored as `recipe.dtype`, all others as int64. An earlier trajectory `index` stays until the new one is
        complete; one that another process wrote in the meantime stays too: it is the same, and may be in use.

        Raises:
            UserError: a value is not finite.
            ValueError: there are not E + 1 snapshots of equal names and shapes.
            OSError: the disk is full; nothing of the new trajectory is left.
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
                sink = Sink(file)
                listed = self._write_to(sink, index, snapshots)
                file.flush()
                os.fsync(file.fileno())
                self._claimed()  # whoever created the folder in the meantime may have had another recipe
                if not before and self.is_complete(index):
                    temporary.unlink()
                    return
                manifest.unlink(missing_ok=True)
                temporary.replace(arrow)  # in the block: later it might be swept
            try:
                self._list(index, listed)
            except BaseException:
                if not manifest.exists():
                    arrow.unlink(missing_ok=True)
                raise
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _send(self, index: int, snapshots: Iterable[dict[str, Tensor]], arrow: Remote) -> None:
        """Write trajectory `index` into an object store."""
        with cache.scratch() as file:
            sink = Sink(file)
            listed = self._write_to(sink, index, snapshots)
            file.flush()
            self._claimed()
            if not self.is_complete(index):
                arrow.upload(Path(file.name))
                self._list(index, listed)
            cache.keep(file, sink.digest.hexdigest())

    def _write_to(self, sink: Sink, index: int, snapshots: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
        """Write the Arrow file of trajectory `index`; return its manifest."""
        return expert_format.write_trajectory(sink, snapshots, self.recipe, f"expert {index} of {self.folder}")

    def _list(self, index: int, manifest: dict[str, Any]) -> None:
        """Write the manifest of a trajectory, which makes it complete."""
        files.write_text(self._manifest(index), json.dumps(manifest))

    def checksum(self, index: int) -> str:
        """Return the checksum of trajectory `index` from its manifest. Raises UserError if the manifest is missing."""
        if index not in self._checksums:
            try:
                self._checksums[index] = str(inputs.read_json(self._manifest(index))["checksum"])
            except DAMAGE as error:
                self._damaged(index, error)
        return self._checksums[index]

    def read(self, index: int, epoch: int) -> dict[str, Tensor]:
        """Read the tensors of one snapshot by name: fresh, writable, on the CPU, float32 or int64, in their own shapes.

        Only this snapshot is read from disk and compared with its checksum; nothing returned pins the file. Raises
        UserError for a missing trajectory or epoch, and for a damaged file.
        """
        if not 0 <= epoch <= self.recipe.epochs:
            raise UserError(
                f"epoch {epoch} is not in the experts of {self.folder}, which have epochs 0 to {self.recipe.epochs}: "
                "choose one of these, or train longer experts"
            )
        try:
            try:
                return self._snapshot(index, epoch)
            except (ValueError, pa.ArrowException):
                if not isinstance(self.folder, Remote):
                    raise
                self._drop_copy(index)  # a copy is checked on arrival: it was damaged on this disk
                return self._snapshot(index, epoch)
        except DAMAGE as error:
            self._damaged(index, error)

    def _snapshot(self, index: int, epoch: int) -> dict[str, Tensor]:
        with self._lock:  # Arrow's reader is not for two threads at once; this builds views and reads no values
            trajectory = self._opened(index)
            batch = trajectory.reader.get_batch(epoch)
        return expert_format.snapshot_of(trajectory, batch, epoch, self.recipe.dtype)

    def _drop_copy(self, index: int) -> None:
        """Delete the local copy of trajectory `index`."""
        with self._lock:
            trajectory = self._open.pop(index, None)
        if trajectory is not None:
            trajectory.path.unlink(missing_ok=True)

    def verify(self, index: int) -> None:
        """Read all of trajectory `index` and compare it with its checksum. Raises UserError if they differ."""
        try:
            with self._lock:
                self._opened(index)
            self._with_file(index, expert_format.check_digest)
        except DAMAGE as error:
            self._damaged(index, error)

    def _arrow(self, index: int) -> Place:
        return self.folder / f"{index:05d}.arrow"

    def _manifest(self, index: int) -> Place:
        return self.folder / f"{index:05d}.json"

    def _damaged(self, index: int, error: Exception) -> NoReturn:
        """Raise a UserError: trajectory `index` is missing, can't be read, or is not what was written."""
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self.folder} has no complete expert {index}: train it with `fbpc experts`") from error
        if isinstance(error, OSError) and error.errno:  # the system's word; Arrow's own have no number
            raise UserError(
                f"{self._arrow(index)} cannot be read ({error.strerror}): fix that and run again"
            ) from error
        raise UserError(f"{self._arrow(index)} is damaged ({reason_of(error)}): delete it and run again") from error

    def _claimed(self) -> bool:
        """Return whether the folder has this recipe. Raises UserError if it has another."""
        recipe = _recipe_in(self.folder)
        if recipe is None:
            return False
        needed = self.recipe.to_json()
        names = [name for name in {**needed, **recipe} if recipe.get(name) != needed.get(name)]
        if names:
            present = ", ".join(f"{name} {recipe.get(name)}" for name in names)
            wants = ", ".join(f"{name} {needed.get(name)}" for name in names)
            raise UserError(
                f"experts in {self.folder} were made with {present}, this run wants {wants}: give another --experts "
                "folder"
            )
        return True

    def _opened(self, index: int) -> Trajectory:
        """Return trajectory `index`, mapped anew if its file is another one. The caller holds the lock."""
        trajectory = self._open.pop(index, None)
        if trajectory is None or trajectory.identity != expert_format.identity(trajectory.path):
            if isinstance(self.folder, Remote):  # unmap copies that the cache deleted, to free their space on the disk
                self._open = {
                    n: other for n, other in self._open.items()
                    if other.identity == expert_format.identity(other.path)
                }  # fmt: skip
            trajectory = self._with_file(
                index, lambda path, manifest: expert_format.open_trajectory(path, manifest, self.recipe)
            )
        self._open[index] = trajectory  # last: the one used longest ago is first
        if len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]
        return trajectory

    def _with_file(self, index: int, use: Callable[[Path, dict[str, Any]], Result]) -> Result:
        """Call `use` with the file of trajectory `index`, or its local copy, and its manifest.

        A copy that `use` can't read is fetched once more: it was checked on arrival, so it was damaged on this disk.
        """
        arrow, manifest = self._arrow(index), inputs.read_json(self._manifest(index))
        if isinstance(arrow, Path):
            return use(arrow, manifest)
        for last in (False, True):
            with cache.copy(arrow, manifest["bytes"], manifest["checksum"]) as path:
                try:
                    return use(path, manifest)
                except DAMAGE:
                    if last:
                        raise
                    path.unlink(missing_ok=True)
        raise AssertionError("not reached")


def open_store(root: Place, recipe: Recipe) -> ExpertStore:
    """Open the store of `recipe` below `root`, in `folder`.

    If that folder holds another recipe (other training images, another learning rate), the store lies beside it, under
    a digest of the recipe. The fingerprint tells data sets apart: the same images read from another path share the
    experts. Raises UserError for a store.json that can't be read.
    """
    home = folder(root, recipe)
    stored = _recipe_in(home) or {}
    if {**stored, "data": recipe.data} == recipe.to_json():
        recipe = recipe._replace(data=str(stored["data"]))
    recipe_json = recipe.to_json()
    beside = folder(root, recipe, f"-{hashlib.blake2b(json.dumps(recipe_json).encode(), digest_size=4).hexdigest()}")
    if stored not in ({}, recipe_json):
        return ExpertStore(beside, recipe)
    return ExpertStore(home, recipe, beside)


def _recipe_in(folder: Place) -> dict[str, Any] | None:
    """Return the recipe whose experts are in `folder`, None if the folder has none. Raises UserError."""
    path = folder / "store.json"
    try:
        store = inputs.read_json(path)
        version, recipe = store["format"], dict(store["recipe"])
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read ({error}): give another --experts folder") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}: give another --experts folder")
    return recipe


def folder(root: Place, recipe: Recipe, end: str = "") -> Place:
    """Return the folder of `recipe`, e.g. experts/cifar10/convnet-in-w128-d3; of a path its last part counts.

    Those without DSA (Table 10) live beside those with it, as convnet-in-w128-d3-none, those of bf16 as ...-bf16.
    """
    parts = [re.split(r"[/\\]", part.rstrip("/\\"))[-1] for part in recipe.data.split(":", 1)]
    name = f"{recipe.architecture}-w{recipe.width}-d{recipe.depth}"
    name += "" if recipe.augment == "dsa" else f"-{recipe.augment}"
    name += "" if recipe.precision == "fp32" else f"-{recipe.precision}"
    return root / slug("-".join(parts)) / slug(name + end)


def slug(text: str) -> str:
    """Turn `text` into a file name: letters, digits, dots, dashes and underscores, no dot or dash at its ends."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "data"
