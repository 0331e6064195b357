"""Files that are either whole or not there."""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from fbpc_ray.storage import Place, Remote


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


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed writers left behind: a living one holds a lock on its file."""
    for leftover in folder.glob(pattern):
        with suppress(OSError), leftover.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
