"""Collect the messages that libtiff prints to standard error itself, not by Python's sys.stderr."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF files."""


@contextmanager
def collected_messages(data: bytes) -> Iterator[list[str]]:
    """Collect the errors that libtiff prints while the block decodes `data`; nothing for other formats.

    Yields a list, which is filled when the block ends. libtiff's warnings, such as unknown tags, are dropped.
    """
    messages: list[str] = []
    if not data.startswith(STARTS):
        yield messages
        return
    try:
        original = os.dup(2)
    except OSError:  # closed: nothing is printed
        yield messages
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            lines = file.read(4096).decode("utf-8", "replace").splitlines()
            messages += [" ".join(line.split()) for line in lines if line.strip() and "Warning" not in line]
