"""Render a document as Markdown, with its pictures in a folder beside it."""

import re
from collections.abc import Sequence
from urllib.parse import quote

from fbpc_ray.core.tables import markdown_table
from fbpc_ray.reporting.document import (
    GENERATOR,
    Block,
    Code,
    Facts,
    Heading,
    Lead,
    Picture,
    Table,
    Text,
    clean,
    is_number,
)


def to_markdown(title: str, blocks: Sequence[Block], footer: str, folder: str) -> str:
    """Render Markdown that links its pictures in `folder`."""
    parts = [f"<!-- {GENERATOR} -->", f"# {escape(title)}", *(_block(block, folder) for block in blocks)]
    return "\n\n".join([*parts, f"*{escape(footer)}*", ""])


def _block(block: Block, folder: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape(text)}"
        case Text(text):
            return escape(text)
        case Lead(text):
            return f"**{escape(text)}**"
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{clean(text)}\n{fence}"
        case Facts(pairs):
            return "\n".join(f"* {escape(name)}: {escape(value)}" for name, value in pairs)
        case Picture(_, name, caption):
            return f"![{escape(caption)}]({quote(f'{folder}/{name}.png')})\n\n{escape(caption)}"
        case Table(lines):
            return markdown_table(lines[0], lines[1:], escape)


def escape(text: str) -> str:
    """Return `text` as one line in which no character has a meaning in Markdown."""
    line = " ".join(clean(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
    return re.sub(r"^([#>+-]|\d+[.)])", r"\\\1", line) if not is_number(line) else line
