"""Blocks of a document, independent of HTML and Markdown.

All text is plain text: what looks like markup, in a name or a path that came out of a file, is shown as written.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

GENERATOR = "fbpc-ray report"
"""Written to the first lines of HTML and Markdown: a report replaces only files with this mark."""
PNG = b"\x89PNG\r\n\x1a\n"


class Heading(NamedTuple):
    text: str
    level: int = 2


class Text(NamedTuple):
    text: str


class Lead(NamedTuple):
    """The sentence that a reader should see first."""

    text: str


class Table(NamedTuple):
    """Cells as text; the first line is the header. Columns of numbers are right-aligned."""

    lines: Sequence[Sequence[str]]


class Facts(NamedTuple):
    """Pairs of name and value."""

    pairs: Sequence[tuple[str, str]]


class Code(NamedTuple):
    """Code to copy."""

    text: str
    language: str = ""


class Picture(NamedTuple):
    png: bytes
    name: str
    """File name without suffix, unique in the document."""
    caption: str


Block = Heading | Text | Lead | Table | Facts | Code | Picture


def is_png(data: bytes) -> bool:
    """Tell whether `data` starts as a PNG file does."""
    return len(data) >= 24 and data.startswith(PNG) and data[12:16] == b"IHDR"


def pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    return (block for block in blocks if isinstance(block, Picture))


def clean(text: str) -> str:
    """Replace control characters, surrogates and changes of writing direction, which no document may hold."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def is_number(cell: str) -> bool:
    """Tell whether a cell holds a number, a mean with its deviation, `diverged` or `-`."""
    return bool(re.fullmatch(r"-?\d[\d.,]*(e-?\d+)?( ± [\d.]+)?( \(.*\))?|diverged|-", cell))
