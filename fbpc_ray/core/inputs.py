"""Read files of users and strangers: regular files, JSON within limits, checksums if present.

    {"checksum": "crc32:0f3a5b7c", "steps": 12, ...}

The checksum of a JSON object is over its other members, so that spaces and line ends don't count. It comes first: a cut
that takes the last member's end and a checksum behind it would leave a file that looks whole. A file of an earlier
release has none and is read without, or has it last.
"""

import difflib
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote

MAX_JSON_BYTES = 256 * 2**20
"""Of a JSON file; the largest of ours has some MB."""
MAX_DEPTH = 100
"""Objects and arrays inside each other in a JSON file."""
CHECKSUM = "checksum"
"""Name of the checksum among the members of an object."""
FORM = re.compile(r"crc32:[0-9a-f]{8}")
ALIKE = 0.75
"""Ratio of difflib from which the name of a member is a damaged `CHECKSUM`."""

KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def describe_kind(mode: int) -> str:
    """Name the kind of a file that is not regular: a folder, a FIFO, ..."""
    return next((kind for holds, kind in KINDS if holds(mode)), "no regular file")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; a FIFO doesn't block.

    Raises:
        UserError: `path` is something else, a loop of links, or a name that no file can have.
        OSError: the file is missing, or the system refuses it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or a surrogate
        raise UserError(f"{str(path)!r}: not a file name ({error}); check the path") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UserError(f"{path}: must be a regular file, is {describe_kind(mode)}; check the path")
    return os.fdopen(descriptor, "rb")


def read_bytes(where: Place, most: int | None = None) -> bytes:
    """Read a whole file by `open_regular`, or an object. Raises ValueError above `most` bytes."""
    if isinstance(where, Remote):
        return where.read_bytes()
    with open_regular(where) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f"{size} bytes, expected at most {most}")
        return file.read()


def read_json(where: Place) -> Any:
    """Read a JSON file. Raises ValueError, UserError or OSError."""
    return parse_json(read_bytes(where, MAX_JSON_BYTES))


def read_checked_json(where: Place) -> dict[str, Any]:
    """Read a JSON object that `files.write_checked_json` wrote, without its checksum.

    Raises ValueError if the checksum differs, and as `read_json`.
    """
    value = read_json(where)
    if not isinstance(value, dict):
        raise ValueError("must be one JSON object")
    return without_checksum(value)


def parse_json(data: bytes | str) -> Any:
    """Parse JSON. Raises ValueError for NaN, infinity, numbers beyond 64 bits, deep nesting, and bad UTF-8."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check(value)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _bounded(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check(value: Any) -> None:
    """Raise ValueError for nesting deeper than MAX_DEPTH, and for text that can't be written as UTF-8."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return
        for text in (text for item in level for text in (item if isinstance(item, dict) else [item])):
            if isinstance(text, str):
                text.encode()  # UnicodeEncodeError is a ValueError
        level = [
            child for item in level if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]  # fmt: skip
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")


def crc(parts: Iterable[Any]) -> str:
    """Compute the checksum of buffers, one after the other: 'crc32:' and 8 hexadecimal digits."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"crc32:{value:08x}"


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum to a JSON object, as its first member."""
    return {CHECKSUM: _checksum_of(value), **value}


def without_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """Check and remove the checksum of a JSON object, if it has one. Raises ValueError if the checksum differs."""
    rest = {name: member for name, member in value.items() if name != CHECKSUM}
    if CHECKSUM in value and value[CHECKSUM] != _checksum_of(rest):
        raise ValueError("its checksum is not that of its content")
    if CHECKSUM not in value and any(is_checksum(member) or _is_alike(name) for name, member in rest.items()):
        raise ValueError("its checksum has another name")  # the name is damaged
    return rest


def _is_alike(name: str) -> bool:
    return CHECKSUM in name or difflib.SequenceMatcher(None, name[:100], CHECKSUM).ratio() >= ALIKE


def is_checksum(value: object) -> bool:
    """Return whether `value` has the form of a checksum."""
    return isinstance(value, str) and bool(FORM.fullmatch(value))


def _checksum_of(value: Mapping[str, Any]) -> str:
    return crc([json.dumps(value, sort_keys=True, separators=(",", ":")).encode()])
