"""Render a document as one self-contained HTML page, by the template page.html.j2."""

import base64
import struct
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fbpc_ray.reporting.document import GENERATOR, Block, Picture, Table, clean, is_number

PAGE_SCALE = 96 / 150
"""CSS pixels for a pixel of a picture, which is drawn at 150 dots an inch."""
WIDE = 400
"""Width in CSS pixels from which a tap on a picture shows it in full size, which a phone has shrunk."""
LONG = 40
"""Characters from which a table cell is broken into lines."""


def to_html(title: str, blocks: Sequence[Block], footer: str) -> str:
    """Render one page with embedded pictures, without scripts; its content policy forbids all fetches."""
    groups = [(name, list(group)) for name, group in groupby(blocks, lambda block: type(block).__name__)]
    template = _environment().get_template("page.html.j2")
    return template.render(
        generator=GENERATOR, title=title, groups=groups, footer=footer, wide=WIDE, long=LONG
    )  # fmt: skip


@cache
def _environment() -> Environment:
    """Return an environment that cleans and escapes every expression."""
    environment = Environment(
        loader=PackageLoader("fbpc_ray.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"base64": _base64, "page_size": _page_size, "numeric_columns": _numeric_columns}
    return environment


def _cleaned(value: Any) -> Any:
    return clean(value) if type(value) is str else value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _page_size(picture: Picture) -> tuple[int, int]:
    """Return width and height in CSS pixels."""
    width, height = struct.unpack(">II", picture.png[16:24])
    return round(PAGE_SCALE * width), round(PAGE_SCALE * height)


def _numeric_columns(table: Table) -> list[bool]:
    columns = zip(*table.lines[1:], strict=True)
    return [all(map(is_number, column)) for column in columns] or [False] * len(table.lines[0])
