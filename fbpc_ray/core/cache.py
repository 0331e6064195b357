"""Copy remote expert files to the disk of this node, once, for all its processes to memory-map.

The copies lie in $FBPC_CACHE, else in the user's cache folder, each under its checksum, which is verified on arrival.
The folder holds at most $FBPC_CACHE_GB, else half of what its disk has for it; the copies used longest ago are deleted
first. A process that has mapped a copy keeps it, and its space on the disk, until it opens the next one.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.files import file_lock, locked_temp_file, remove_stale_temp_files
from fbpc_ray.core.storage import Remote, local_folder

TRIES = 3
"""Downloads of a copy that other processes delete before it is opened."""


def folder() -> Path:
    """Return the folder of the copies."""
    if chosen := os.environ.get("FBPC_CACHE"):
        return local_folder(chosen, "FBPC_CACHE").absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fbpc-ray"


def open_to_others(path: Path) -> Path | None:
    """Return what lets other users change the files of the folder `path`; None if they can't.

    It is the folder itself, its parent, a folder further up that everybody may write to (unless it is sticky, as /tmp),
    or a link of another user on the way.
    """
    trusted, absolute = (os.geteuid(), 0), path.absolute()
    for link in (absolute, *absolute.parents):
        if link.is_symlink() and link.lstat().st_uid not in trusted:
            return link
    real = Path(os.path.realpath(path))
    for candidate in (real, *real.parents):
        if not candidate.exists():
            continue
        status, near = candidate.stat(), candidate in (real, real.parent)
        sticky = status.st_mode & stat.S_ISVTX and candidate != real
        others = stat.S_IWOTH | (stat.S_IWGRP if near else 0)
        if (status.st_mode & others and not sticky) or (near and status.st_uid not in trusted):
            return candidate
    return None


def digest() -> hashlib.blake2b:
    """Start the checksum that names a copy."""
    return hashlib.blake2b(digest_size=32)


@contextmanager
def copy(source: Remote, size: int, checksum: str) -> Iterator[Path]:
    """Give the local copy of `source`, downloading it if missing; no process deletes it during the block.

    Raises:
        FileNotFoundError: the source is missing.
        ValueError: the source has another `size` or `checksum`.
        UserError: the store doesn't answer, the disk is full, or the file is larger than the limit.
    """
    root = folder()
    path = root / f"{checksum}.arrow"
    for _ in range(TRIES):
        with file_lock(root / ".lock", shared=True):
            if _is_complete(path, size):
                os.utime(path)  # used now
                yield path
                return
        with file_lock(root / f".lock-{checksum[:2]}"):
            if not _is_complete(path, size):
                _download(source, size, checksum)
    raise UserError(f"{root}: too small for the experts in use; raise FBPC_CACHE_GB, or set FBPC_CACHE")


@contextmanager
def scratch(size: int = 0) -> Iterator[BinaryIO]:
    """Create a file beside the copies, with `size` bytes reserved; deleted after the block unless passed to `keep`.

    Raises UserError if the disk is full, inside the block too.
    """
    root = folder()
    path = root / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked_temp_file(path) as file:
            with file_lock(root / ".lock"):
                remove_stale_temp_files(root, ".*.tmp")
                _make_room(size)
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
            yield file
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {root} is full ({size / 1e9:.3g} GB more for experts): free some space, or set FBPC_CACHE to "
            "a folder on another disk, then run the same command again",
            code=1,
        ) from error
    finally:
        path.unlink(missing_ok=True)


def keep(file: BinaryIO, checksum: str) -> None:
    """Make a complete scratch file the copy named `checksum`, unless it is too large for the cache."""
    file.flush()
    os.fsync(file.fileno())
    os.fchmod(file.fileno(), 0o444)
    with file_lock(folder() / ".lock"), suppress(UserError):  # too large
        _make_room(0)
        Path(file.name).replace(folder() / f"{checksum}.arrow")


def _is_complete(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _download(source: Remote, size: int, checksum: str) -> None:
    with scratch(size) as file:
        checked, length = digest(), 0
        for chunk in source.chunks():
            length += len(chunk)
            if length > size:
                break
            checked.update(chunk)
            file.write(chunk)
        if length != size or checked.hexdigest() != checksum:
            raise ValueError("it is not the file that its manifest describes")
        keep(file, checksum)


def _make_room(size: int) -> None:
    """Delete the copies used longest ago until `size` bytes more fit in the limit and on the disk.

    The caller holds the lock. Raises UserError if `size` is above the limit.
    """
    root = folder()
    files = stat_existing(path for path in root.iterdir() if path.suffix in (".arrow", ".tmp"))
    used, free = sum(status.st_size for _, status in files), shutil.disk_usage(root).free
    most = limit(free + used)
    if size > most:
        raise UserError(
            f"an expert of {size / 1e9:.3g} GB doesn't fit in the {most / 1e9:.3g} GB of {root}: raise FBPC_CACHE_GB, "
            "or set FBPC_CACHE to a folder on a larger disk",
            code=1,
        )
    drop_oldest(
        [(path, status) for path, status in files if path.suffix == ".arrow"], max(used + size - most, size - free)
    )


def limit(available: float) -> float:
    """Return the bytes that a folder of the cache may hold: $FBPC_CACHE_GB, else half of `available`.

    Raises UserError if the variable is not a number.
    """
    gigabytes = os.environ.get("FBPC_CACHE_GB")
    try:
        return float(gigabytes) * 1e9 if gigabytes else available / 2
    except ValueError:
        raise UserError(f"FBPC_CACHE_GB: must be a number, got {gigabytes!r}") from None


def stat_existing(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """Return the status of each path that still exists."""
    entries = []
    for path in paths:
        with suppress(FileNotFoundError):
            entries.append((path, path.stat()))
    return entries


def drop_oldest(files: Sequence[tuple[Path, os.stat_result]], excess: float) -> None:
    """Delete the files used longest ago until `excess` bytes are freed."""
    for path, status in sorted(files, key=lambda entry: entry[1].st_mtime):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= status.st_size
