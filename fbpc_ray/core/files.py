"""Write files atomically, and lock files and folders among the processes of one machine."""

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fbpc_ray.core import inputs
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote, place

if TYPE_CHECKING:
    from filelock import BaseFileLock  # in functions: `fbpc doctor` runs without it, and says so


def write_bytes(path: Place, data: bytes, private: bool = False) -> None:
    """Replace `path` by `data` atomically: readers, and crashes, see the old file or the new one, never a part.

    A `private` local file is readable by its owner alone.
    A link stays, and its target is replaced. A device or a FIFO is written through.

    Raises:
        OSError: the disk is full or not writable; the old file is intact and no temporary file is left.
        UserError: the object store refused the write, or nobody reads the FIFO.
    """
    if isinstance(path, Remote):
        path.write_bytes(data)
        return
    if _is_special(path):
        _write_through(path, data)
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with locked_temp_file(temporary) as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_special(path: Path) -> bool:
    """Return whether `path` is, or links to, something that no file may replace: a device, a FIFO, a folder."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _write_through(path: Path, data: bytes) -> None:
    """Write `data` to a device or a FIFO, which stays. Raises UserError if nobody reads the FIFO."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise UserError(f"{path}: nobody reads this FIFO; start its reader first, or name a file", code=1) from None
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def write_text(path: Place, text: str) -> None:
    """Write UTF-8 text by `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Place, value: Any, private: bool = False) -> None:
    """Write `value` as JSON by `write_bytes`. Raises ValueError for NaN and infinity, which are not JSON."""
    write_bytes(path, _to_json(value).encode(), private)


def write_checked_json(path: Place, value: Mapping[str, Any], private: bool = False) -> None:
    """Write a JSON object with its checksum, which `inputs.read_checked_json` compares. Raises as `write_json`."""
    write_json(path, inputs.with_checksum(value), private)


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_output(target: str, value: Any) -> None:
    """Write `value` as JSON to the `target` of a --json flag: a path, "-" for standard output, or "" for none."""
    if target == "-":
        sys.stdout.write(_to_json(value))
        sys.stdout.flush()
    elif target:
        write_text(place(target).absolute(), _to_json(value))


def check_output(target: str) -> None:
    """Raise UserError for a --json flag that can't be written, before the work begins."""
    path = place(target) if target not in ("", "-") else None
    if isinstance(path, Path) and path.is_dir():
        raise UserError(f"--json {target}: must be a file, is a folder; name a file in the folder")


def check_folder(folder: Place) -> None:
    """Raise OSError where no file can be made in a local folder, before the work begins."""
    if isinstance(folder, Path):
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            pass


def nearest_existing(path: Path) -> Path:
    """Return `path` or, where it is missing, its nearest parent that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), path)


def write_first(path: Place, text: str) -> None:
    """Write UTF-8 text unless `path` exists. Of several writers the first wins.

    In an object store, and on a file system without hard links, the last one wins.
    """
    if isinstance(path, Remote):
        write_text(path, text)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_text(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale_temp_files(folder: Path, pattern: str) -> None:
    """Remove the files and folders of killed writers: a live writer holds a lock on its own.

    See `locked_temp_file` and `locked_temp_folder`.
    """
    for leftover in folder.glob(pattern):
        with suppress(OSError), _opened(leftover) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def remove_leftovers_of(path: Path) -> None:
    """Remove the temporary files and folders of killed writers of `path`."""
    remove_stale_temp_files(path.parent, f".{glob.escape(path.name)}.*.tmp")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a folder, or a regular file for writing: a network file system locks no read-only file. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def locked_temp_folder(path: Path) -> Iterator[Path]:
    """Create the folder `path` for the block, locked so that `remove_stale_temp_files` leaves it alone."""
    path.mkdir(parents=True)
    with _opened(path) as descriptor:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path


@contextmanager
def locked_temp_file(path: Path) -> Iterator[BinaryIO]:
    """Create `path` for the block, locked so that `remove_stale_temp_files` leaves it alone. Raises OSError."""
    while True:
        with path.open("xb") as file:
            with suppress(OSError):  # a file system without locks: `remove_stale_temp_files` removes nothing there
                fcntl.flock(file, fcntl.LOCK_EX)  # `remove_stale_temp_files` may hold it for a moment
            if _is_same(path, file):
                yield file
                return


@contextmanager
def file_lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Wait for the lock of `path`, a file of its own, and hold it among the processes of this machine.

    Several processes can hold a `shared` lock at once. On a file system without locks the block runs unlocked.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    if shared:  # filelock has no shared lock on a plain file
        with path.open("ab") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
            yield
        return
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


@contextmanager
def exclusive_directory(folder: Place) -> Iterator[None]:
    """Hold an exclusive lock on `folder` among the processes of this machine, creating it if missing.

    A killed process frees the lock. In an object store, and on a file system without locks, nobody is kept out. An
    empty folder is removed after the block.

    Raises:
        UserError: another process holds the lock.
        OSError: the folder can't be created.
    """
    from filelock import Timeout

    if isinstance(folder, Remote):
        yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_directory(folder)
    except Timeout:
        raise UserError(f"another process uses {folder}: wait until it ends, or give another --out") from None
    try:
        yield
    finally:
        if lock:
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()
        with suppress(OSError):  # not empty
            folder.rmdir()


LOCK = ".lock"
"""Name of the lock file in a folder."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""Errors of flock on a file system without locks, such as NFS without its lock service."""


def _lock_directory(folder: Path) -> "BaseFileLock | None":
    """Lock `folder`; None on a file system without locks. Raises Timeout if another process holds the lock."""
    from filelock import FileLock, Timeout

    path = folder / LOCK
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        if _is_no_directory(folder):  # filelock would create what a link to nowhere names
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        try:
            lock.acquire()
            return lock
        except Timeout:
            if path.exists():
                raise  # else its holder removed the file as we opened it
        except (FileNotFoundError, FileExistsError):
            continue  # its holder removed the folder as we opened the file
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None


def _is_no_directory(path: Path) -> bool:
    """Return whether `path` is a file, or a link without a target."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return path.is_symlink()


def _is_same(path: Path, file: BinaryIO) -> bool:
    """Return whether `path` still names the open `file`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
