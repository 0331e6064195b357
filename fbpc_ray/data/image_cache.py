"""Keep decoded images on this node's disk, memory-mapped, so that encoded images are decoded once.

A file in $FBPC_CACHE/images is named by a checksum of the bytes of the source files and of all else that decoding
depends on: size, name and time of a source file do not show every change. It holds

    8 bytes    size of the header, little-endian
    header     JSON: shape, notes, checksum of the values and of the header, padded with spaces
    values     (n, c, h, w) uint8

Its checksums are compared at each start, and a damaged file is replaced. Where other users can write to the folder, or
the disk is full, images are decoded at each start. The folder holds at most $FBPC_CACHE_GB, else half of what its disk
has for it; the files used longest ago are deleted first.
"""

import hashlib
import inspect
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from fbpc_ray.core import cache, files, inputs
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import images as decoding
from fbpc_ray.data import resize
from fbpc_ray.data.resize import Resizing

MIN_IMAGES = 2000
"""Fewer images are decoded at each start: it takes a fraction of a second."""
MAX_HEADER = 2**20
Decoded = tuple[np.ndarray, tuple[str, ...]]
"""Images (n, c, h, w) uint8, and notes on them: what `images.decode` returns."""


def cached(
    decode: Callable[[], Decoded], sources: Sequence[Path], column: str, count: int, origin: str, resizing: Resizing
) -> Decoded:
    """Return what `decode` returns for `sources`, from the cache if it is there; the images may be read-only.

    Args:
        decode: decodes the `count` images of the column `column` of `sources`, in their order.
        origin: what notes call the sources.
    """
    try:
        folder = cache.folder() / "images"
        if count < MIN_IMAGES or cache.open_to_others(folder):
            return decode()
        name = _checksum(sources, column, origin, resizing)
    except (OSError, UserError):
        return decode()
    path = folder / f"{name}.images"
    stored = _read(path, count)
    if stored is not None:
        with suppress(OSError):
            os.utime(path)  # used now
        return stored
    images, notes = decode()
    with suppress(OSError, UserError):
        if _checksum(sources, column, origin, resizing) == name:  # else a source changed while it was decoded
            _write(path, images, notes)
    return images, notes


def _checksum(sources: Sequence[Path], column: str, origin: str, resizing: Resizing) -> str:
    """Hash all that the images and their notes depend on. Raises OSError."""
    digest = hashlib.blake2b(digest_size=20)
    codecs = [features.version(codec) for codec in ("jpg", "jpg_2000", "webp", "libtiff", "zlib")]
    code = [inspect.getsource(module) for module in (decoding, resize)]
    digest.update(repr((PIL.__version__, codecs, code, column, origin, tuple(resizing))).encode())
    for source in sources:
        with inputs.open_regular(source) as file:
            digest.update(hashlib.file_digest(file, cache.digest).digest())
    return digest.hexdigest()


def _read(path: Path, count: int) -> Decoded | None:
    """Map the images in `path`, read-only; None if the file is missing or damaged."""
    try:
        with inputs.open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                return None
            facts = inputs.without_checksum(inputs.parse_json(file.read(size)))
            shape, notes = tuple(facts["shape"]), tuple(facts["notes"])
            if len(shape) != 4 or shape[0] != count or os.fstat(file.fileno()).st_size != 8 + size + np.prod(shape):
                return None
            values = np.asarray(np.memmap(file, np.uint8, "r", 8 + size, shape))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, UserError):
        return None
    return (values, notes) if inputs.crc([values.data]) == facts["values"] else None


def _write(path: Path, images: np.ndarray, notes: tuple[str, ...]) -> None:
    """Write the file of `images`, if it is within the limit. Raises OSError or UserError."""
    facts = {"shape": images.shape, "notes": notes, "values": inputs.crc([images.data])}
    header = json.dumps(inputs.with_checksum(facts)).encode()
    header += b" " * (-(8 + len(header)) % 64)
    size = 8 + len(header) + images.nbytes
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    files.remove_stale_temp_files(path.parent, ".*.tmp")
    entries = cache.stat_existing(path.parent.glob("*.images"))
    used, free = sum(status.st_size for _, status in entries), shutil.disk_usage(path.parent).free
    limit = cache.limit(free + used)
    if len(header) > MAX_HEADER or size > limit:
        return
    cache.drop_oldest(entries, max(used + size - limit, size - free))
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp")
    try:
        with files.locked_temp_file(temporary) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is met before the values are written
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(images.data)
            file.flush()
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
