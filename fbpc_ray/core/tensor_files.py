"""Safetensors files with a checksum in the metadata of their header; other readers ignore it.

The checksum is of the whole file, with zeros for its own digits. A file of an earlier release has none and is read
without. Equal tensors and metadata give equal files.
"""

import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fbpc_ray.core import inputs
from fbpc_ray.core.inputs import CHECKSUM, crc

BLANK = b"crc32:00000000"
MAX_HEADER = 100 * 2**20
"""Bytes of the largest header that the library reads."""
CHUNK = 8 * 2**20


def dumps(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file with a checksum, the keys of its header sorted.

    The file is 8 bytes of header size, the header as JSON padded to 8 bytes, the tensors; the library alone would write
    the metadata in another order each time.
    """
    data = save(dict(tensors), {**metadata, CHECKSUM: BLANK.decode()})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    start, body = len(header).to_bytes(8, "little"), memoryview(data)[end:]
    header = header.replace(_member(BLANK), _member(crc([start, header, body]).encode()))
    return b"".join((start, header, body))


def open_checked(path: Path) -> Any:
    """Open a local safetensors file by `safe_open`, after `check`. Raises SafetensorError and as `check`."""
    check(path)
    return open_unchecked(path)


def open_unchecked(path: Path) -> Any:
    """Open a local safetensors file by `safe_open`. Raises SafetensorError, UserError or OSError."""
    inputs.open_regular(path).close()
    return safe_open(path, framework="pt")


def check(path: Path) -> None:
    """Compare a local safetensors file with its checksum, once per process and file.

    Raises:
        ValueError: the checksum differs, or the header is damaged.
        UserError, OSError: see `inputs.open_regular`.
    """
    with inputs.open_regular(path) as file:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if identity in _checked:
            return
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > min(MAX_HEADER, status.st_size - 8):
            raise ValueError("its header is cut off")
        header = file.read(size)
        facts = inputs.parse_json(header)
        metadata = facts.get("__metadata__", {}) if isinstance(facts, dict) else None
        if not isinstance(metadata, dict):
            raise ValueError("its header is damaged")
        checksum = metadata.get(CHECKSUM)
        if checksum is None:
            if any(inputs.is_checksum(value) for value in metadata.values()):
                raise ValueError("its checksum has another name")  # the name is damaged
        else:
            member = _member(str(checksum).encode())
            if header.count(member) != 1:
                raise ValueError("its checksum is damaged")
            blank = header.replace(member, _member(BLANK))
            if checksum != crc(chain([start, blank], iter(lambda: file.read(CHUNK), b""))):
                raise ValueError("its checksum is not that of its content")
    if len(_checked) >= 1024:
        _checked.clear()
    _checked.add(identity)


_checked: set[tuple[int, int, int, int]] = set()
"""(device, inode, bytes, time of change) of the files that `check` has passed."""


def _member(checksum: bytes) -> bytes:
    """Return the checksum as it stands in a header of ours."""
    return b'"%s": "%s"' % (CHECKSUM.encode(), checksum)
