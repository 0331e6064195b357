"""Copies of remote expert files on the disk of this node, made once and memory-mapped by all its processes.

They lie in $FBPC_CACHE, else in the user's cache folder, each under its checksum, which is tested as it arrives. The
folder holds at most $FBPC_CACHE_GB, else half of what its disk has for it; the copies used longest ago go first. A
process that has a copy mapped keeps it, and its place on the disk, until it opens the next one.
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
from fbpc_ray.core.storage import Remote

TRIES = 3
"""Of a copy that others push out before it is opened."""


def folder() -> Path:
    """Where the copies lie."""
    if chosen := os.environ.get("FBPC_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fbpc-ray"


def open_to_others(path: Path) -> Path | None:
    """Where others could change what lies in `path`: itself, or its parent, where they could put another in its place.
    None where they can't."""
    for each, sticky in ((path, 0), (path.parent, stat.S_ISVTX)):
        if each.exists():
            status = each.stat()
            others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & sticky
            if others or status.st_uid not in (os.geteuid(), 0):
                return each
    return None


def digest() -> hashlib.blake2b:
    """The checksum under which files are known."""
    return hashlib.blake2b(digest_size=32)


@contextmanager
def copy(source: Remote, size: int, checksum: str) -> Iterator[Path]:
    """The local copy of `source`, which has `size` bytes; downloaded where there is none. It stays during the block.

    Raises FileNotFoundError, ValueError where the source is another than `size` and `checksum` say, and UserError for
    a store that doesn't answer, a full disk, or a file above the limit.
    """
    root = folder()
    path = root / f"{checksum}.arrow"
    for _ in range(TRIES):
        with file_lock(root / ".lock", shared=True):
            if _whole(path, size):
                os.utime(path)  # used now
                yield path
                return
        with file_lock(root / f".lock-{checksum[:2]}"):
            if not _whole(path, size):
                _download(source, size, checksum)
    raise UserError(f"{root} is too small for the experts that are in use: raise FBPC_CACHE_GB, or set FBPC_CACHE")


@contextmanager
def scratch(size: int = 0) -> Iterator[BinaryIO]:
    """A new file beside the copies, with room for `size` bytes; gone after the block unless it was `keep`t.

    Raises UserError where the disk is full, inside the block too.
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
    """Make of a whole scratch file the copy that `checksum` stands for."""
    file.flush()
    os.fsync(file.fileno())
    os.fchmod(file.fileno(), 0o444)
    with file_lock(folder() / ".lock"), suppress(UserError):  # too large to be kept: it isn't
        _make_room(0)
        Path(file.name).replace(folder() / f"{checksum}.arrow")


def _whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _download(source: Remote, size: int, checksum: str) -> None:
    with scratch(size) as file:
        found, length = digest(), 0
        for piece in source.chunks():
            length += len(piece)
            if length > size:
                break
            found.update(piece)
            file.write(piece)
        if length != size or found.hexdigest() != checksum:
            raise ValueError("it is not the file that its manifest describes")
        keep(file, checksum)


def _make_room(size: int) -> None:
    """Delete the copies used longest ago until `size` bytes more are within the limit and on the disk. The caller holds
    the lock. Raises UserError where they can't be."""
    root = folder()
    files = stat_existing(path for path in root.iterdir() if path.suffix in (".arrow", ".tmp"))
    used, free = sum(status.st_size for _, status in files), shutil.disk_usage(root).free
    given = os.environ.get("FBPC_CACHE_GB")
    try:
        limit = float(given) * 1e9 if given else (free + used) / 2
    except ValueError:
        raise UserError(f"FBPC_CACHE_GB is {given!r}: it must be a number") from None
    if size > limit:
        raise UserError(
            f"an expert of {size / 1e9:.3g} GB doesn't fit in the {limit / 1e9:.3g} GB of {root}: raise FBPC_CACHE_GB, "
            "or set FBPC_CACHE to a folder on a larger disk",
            code=1,
        )
    drop_oldest([each for each in files if each[0].suffix == ".arrow"], max(used + size - limit, size - free))


def stat_existing(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """Those of `paths` that nobody has removed meanwhile."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found


def drop_oldest(files: Sequence[tuple[Path, os.stat_result]], excess: float) -> None:
    """Delete the files used longest ago, until they had `excess` bytes."""
    for path, status in sorted(files, key=lambda each: each[1].st_mtime):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= status.st_size
