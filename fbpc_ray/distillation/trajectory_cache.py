"""Cache theta_x and its K steps on this node's disk, for all steps, runs and sweeps.

They depend on an expert's snapshot and on the settings of the K steps, not on the pseudocoreset. Each trajectory is one
.npy file, named by a checksum of all that it depends on (`TrajectoryKey`). The folder holds a bounded number of bytes;
the files used longest ago are deleted first. If the folder can't be written to, trajectories are computed again.

After its values a file holds their checksum, which other readers of .npy ignore. A process compares it at the first
use of a file, and replaces a damaged one.
"""

import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fbpc_ray.core import cache, files, inputs
from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.expert_format import Recipe

MAX_BLOCK = 256e6
"""Bytes of the largest cached trajectory. That of a ResNet18 (1.4 GB) costs more to read than to prefetch."""

HEADER = 128
"""Bytes of a .npy file before its values."""

CHECKSUM_BYTES = len(inputs.crc([]))
"""Bytes of a .npy file of ours after its values."""


class TrajectoryKey(NamedTuple):
    """All that the bits of theta_x and its K steps depend on. Order and values name the files on disk: keep them."""

    format: int
    """`EXPERT_SIDE_FORMAT`: what the K steps compute and draw."""
    recipe: Recipe
    """Data, network and training of the expert; its seed draws the real images."""
    expert: int
    checksum: str
    """Of the expert's file."""
    epoch: int
    lambda_x: float
    real_batch_size: int
    posterior_steps: int
    augment: str
    torch_version: str
    threads: int
    compiled: bool
    cpu_capability: str
    device: str
    """cpu, or the name of the GPU."""
    precision: str = "fp32"
    """Number format of the K steps."""
    chunk_images: int = 0
    """Most images of one pass; 0 where a batch is passed at once."""

    def digest(self) -> str:
        """Return the name of the trajectory's file, without its suffix.

        Fields that were added later don't count at their defaults, so that names stay the same.
        """
        values = tuple(self)
        for field in ("chunk_images", "precision"):
            if values[-1] == self._field_defaults[field] and len(values) == 1 + self._fields.index(field):
                values = values[:-1]
        return hashlib.blake2b(repr(values).encode(), digest_size=20).hexdigest()


class TrajectoryCache(NamedTuple):
    """A folder and the bytes that it may hold, at most half of what its disk has for it."""

    folder: Path
    limit: float

    def block(self, key: str, shape: tuple[int, int], rows: Callable[[], Iterable[Tensor]]) -> np.ndarray | None:
        """Map the trajectory `key` read-only, computing and storing it if missing.

        Args:
            key: a `TrajectoryKey.digest()`.
            shape: (1 + K, P) of float32 values.
            rows: computes the rows, each (P,).

        Returns:
            The rows, or None if they are too large for the cache or can't be written to the disk.
        """
        if not fits(shape, self.limit):
            return None
        size = _file_size(shape)
        path = self.folder / f"{key}.npy"
        stored = _read(path, shape)
        if stored is not None:
            with suppress(OSError):
                os.utime(path)  # used now
            return stored
        temporary = path.with_name(f".{key}.{secrets.token_hex(4)}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with files.locked_temp_file(temporary) as file:
                block = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is met here, not in a mapped page
                for target, row in zip(block, rows(), strict=True):
                    target[:] = row.numpy(force=True)
                block.flush()
                file.seek(size - CHECKSUM_BYTES)
                file.write(inputs.crc([block.data]).encode())
                file.flush()
                del block
                temporary.replace(path)
        except OSError:
            return None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return _read(path, shape)

    def _make_room(self, size: int) -> None:
        """Delete the files used longest ago until `size` bytes more are within the limit."""
        files.remove_stale_temp_files(self.folder, ".*.tmp")
        entries = cache.stat_existing(self.folder.glob("*.npy"))
        used, free = sum(status.st_size for _, status in entries), shutil.disk_usage(self.folder).free
        cache.drop_oldest(entries, used + size - min(self.limit, (used + free) / 2))


def fits(shape: tuple[int, int], limit: float) -> bool:
    """Return whether a cache of `limit` bytes keeps trajectories of `shape`, (1 + K, P)."""
    return _file_size(shape) <= min(MAX_BLOCK, limit)


def bytes_of_a_snapshot(shapes: Iterable[tuple[int, int]], limit: float) -> int:
    """Return the bytes of one snapshot of each network, of those that a cache of `limit` bytes keeps.

    Args:
        shapes: (1 + K, P) of each network.
    """
    return sum(_file_size(shape) for shape in shapes if fits(shape, limit))


def _file_size(shape: tuple[int, int]) -> int:
    return HEADER + 4 * shape[0] * shape[1] + CHECKSUM_BYTES


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Map the array in `path`; None if it is missing, damaged, of another shape or without a checksum."""
    size = _file_size(shape)
    try:
        with inputs.open_regular(path) as file:
            status, header = os.fstat(file.fileno()), file.read(HEADER)
            if header != _header(shape) or status.st_size != size:
                return None  # numpy's own reader fails in many ways on a damaged header
            array = np.memmap(file, np.float32, "r", HEADER, shape)
            file.seek(size - CHECKSUM_BYTES)
            checksum = file.read()
    except (OSError, ValueError, UserError):
        return None
    identity = (str(path), status.st_ino)
    if identity not in _checked and checksum != inputs.crc([array.data]).encode():
        return None
    _checked.add(identity)
    return array


def _header(shape: tuple[int, int]) -> bytes:
    """Return the start of a .npy file of float32 values."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


_checked: set[tuple[str, int]] = set()
"""(path, inode) of the files whose checksums this process has compared."""
