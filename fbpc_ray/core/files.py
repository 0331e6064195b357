"""Files that are either whole or not there, and folders that one process at a time writes to."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote


def write_bytes(path: Place, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash at any time, sees the old file or the new one, not a part.

    Raises OSError (a full disk, no permission), or UserError where an object store doesn't take it, with the old file
    intact and nothing of the new one left behind.
    """
    if isinstance(path, Remote):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Place, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_first(path: Place, text: str) -> None:
    """`write_text` of a file that may be there by then: the first one stays. In an object store, and on a file system
    without hard links, it is the last one."""
    if isinstance(path, Remote):
        write_text(path, text)
        return
    mine = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_text(mine, text)
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    except OSError:
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


def remove_stale_temp_files(folder: Path, pattern: str) -> None:
    """Remove what killed writers left behind: a living one holds a lock on its file."""
    for leftover in folder.glob(pattern):
        with suppress(OSError), leftover.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


@contextmanager
def locked_temp_file(path: Path) -> Iterator[BinaryIO]:
    """A new file for the block, which no `sweep` takes from it. Raises OSError."""
    while True:
        with path.open("xb") as file:
            with suppress(OSError):  # a file system without locks: nothing is swept there either
                fcntl.flock(file, fcntl.LOCK_EX)  # a sweep that was quicker has it for a moment
            if _same(path, file):
                yield file
                return


@contextmanager
def file_lock(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """The block has the lock of `path`, a file for this alone, among the processes of this machine; it is waited for.
    Where the file system has no locks, what is inside may happen twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        with suppress(OSError):
            fcntl.flock(file, kind)
        yield


@contextmanager
def exclusive_directory(folder: Place) -> Iterator[None]:
    """The block has `folder` to itself among the processes of this machine, made where it is not there. Raises
    UserError where another one has it, and OSError for a folder that can't be made. A process that is killed has it no
    more.

    In an object store, and on a file system without locks, nobody is kept out.
    """
    if isinstance(folder, Remote):
        yield
        return
    path = folder / LOCK
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}: wait until it ends, or give another --out") from None
    try:
        yield
    finally:
        if lock:
            path.unlink(missing_ok=True)
            lock.close()
        with suppress(OSError):  # not empty
            folder.rmdir()


LOCK = ".lock"
"""The file in a folder that its process holds a lock on."""


def _locked(path: Path) -> BinaryIO | None:
    """`path`, opened and locked; None where there are no locks. Raises BlockingIOError where another process has it."""
    while True:
        with suppress(FileExistsError):
            path.parent.mkdir()
        try:
            file = path.open("ab")
        except FileNotFoundError:
            if path.parent.is_symlink():  # to nowhere
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
            continue  # the process that had it removed the folder meanwhile
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(path, file):
                return file
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            file.close()
            return None
        file.close()  # the process that had it removed the file meanwhile


def _same(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
