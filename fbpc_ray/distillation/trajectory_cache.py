"""theta_x and its K steps on the disk of this node, computed once for every step, run and sweep that asks for them.

They depend on an expert's snapshot and on the settings of the K steps, not on the pseudocoreset: one file for each,
under a checksum of all that it depends on. The folder holds a bounded number of bytes; what was used longest ago goes
first. A cache that can't be written is one that isn't there.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fbpc_ray.core import cache
from fbpc_ray.core import files as atomic

LARGEST = 256e6
"""Bytes of a block that is kept. That of a ResNet18 (1.4 GB) costs more to read than to prefetch."""

HEADER = 128
"""Bytes of a .npy file before its values."""


class TrajectoryCache(NamedTuple):
    """A folder and the bytes that it may hold, half of what its disk has for it at most."""

    folder: Path
    limit: float

    def block(self, key: str, shape: tuple[int, int], rows: Callable[[], Iterable[Tensor]]) -> np.ndarray | None:
        """The float32 block of `shape` known as `key`, mapped read-only; made of `rows` where it isn't there. None
        where it is too large to be kept, or the disk doesn't take it."""
        size = HEADER + 4 * shape[0] * shape[1]
        if size > min(LARGEST, self.limit):
            return None
        path = self.folder / f"{key}.npy"
        found = _read(path, shape)
        if found is not None:
            with suppress(OSError):
                os.utime(path)  # used now
            return found
        temporary = path.with_name(f".{key}.{secrets.token_hex(4)}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with atomic.locked_temp_file(temporary) as file:
                block = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is met here, not in a mapped page
                for place, row in zip(block, rows(), strict=True):
                    place[:] = row.numpy(force=True)
                block.flush()
                del block
                temporary.replace(path)
        except OSError:
            return None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return _read(path, shape)

    def _make_room(self, size: int) -> None:
        atomic.remove_stale_temp_files(self.folder, ".*.tmp")
        files = cache.present(self.folder.glob("*.npy"))
        used, free = sum(status.st_size for _, status in files), shutil.disk_usage(self.folder).free
        cache.drop_oldest(files, used + size - min(self.limit, (used + free) / 2))


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None
