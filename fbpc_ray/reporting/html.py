"""A document as plain data, and the same as one HTML page that needs nothing else, or as Markdown with its pictures.

All text is taken as text: what looks like markup, in a name or a path that came out of a file, is shown as written.
"""

import base64
import html
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple
from urllib.parse import quote

GENERATOR = "fbpc-ray report"
"""What both forms say of themselves in their first line, so that a report is replaced by a report alone."""
PNG = b"\x89PNG\r\n\x1a\n"
SHARP = 96 / 150
"""Pixels of a page for a pixel of a picture, which are drawn at 150 dots an inch."""
BIG = 640
"""Width in pixels of a page from which a phone scrolls a picture instead of making it too small to read."""
LONG = 40
"""Characters from which a cell is broken into lines."""


class Heading(NamedTuple):
    text: str
    level: int = 2


class Text(NamedTuple):
    text: str


class Table(NamedTuple):
    """Cells as text, the first line being the heads of the columns; numbers are right-aligned."""

    lines: Sequence[Sequence[str]]


class Facts(NamedTuple):
    """Names and what they are."""

    pairs: Sequence[tuple[str, str]]


class Code(NamedTuple):
    """To be copied."""

    text: str
    language: str = ""


class Picture(NamedTuple):
    png: bytes
    name: str
    """Of its file, without the ending; different for every picture of a document."""
    caption: str


Block = Heading | Text | Table | Facts | Code | Picture


def is_png(data: bytes) -> bool:
    return len(data) >= 24 and data.startswith(PNG) and data[12:16] == b"IHDR"


STYLE = """
:root { color-scheme: light; --line: #d5d9de; --soft: #f5f7f9; --quiet: #50575e; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1.25rem 4rem; color: #16191d; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.wide { overflow-x: auto; margin: .75rem 0; background: linear-gradient(90deg, #fff 50%, #fff0) 0 / 2rem 100% local,
  linear-gradient(270deg, #fff 50%, #fff0) 100% / 2rem 100% local, linear-gradient(90deg, #0002, #0000) 0 / .6rem 100%,
  linear-gradient(270deg, #0002, #0000) 100% / .6rem 100%; background-repeat: no-repeat; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th { color: var(--quiet); font-weight: 600; }
td.long { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
.number { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: .75rem 0; font-size: .95rem; }
dt { color: var(--quiet); }
dd { margin: 0; min-width: 0; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem;
  margin: .75rem 0; white-space: pre; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.25rem 2rem; align-items: flex-start; margin: 1.25rem 0; }
figure { margin: 0; max-width: 100%; }
figure div { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--quiet); font-size: .88rem; margin-top: .4rem; max-width: 46rem; }
footer { margin-top: 3rem; color: var(--quiet); font-size: .85rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.35rem; }
  table { font-size: .82rem; }
  th, td { padding: .3rem .45rem; }
  pre { font-size: .78rem; padding: .6rem .7rem; }
  img.big { max-width: none; width: 42rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def to_html(title: str, blocks: Sequence[Block], foot: str) -> str:
    """One page: pictures inside, no script, and a policy that lets it fetch nothing."""
    body = "\n".join(_rows_of_pictures(blocks))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title>
<style>{STYLE}</style></head>
<body>
<h1>{_escape(title)}</h1>
{body}
<footer>{_escape(foot)}</footer>
</body></html>
"""


def to_markdown(title: str, blocks: Sequence[Block], foot: str, folder: str) -> str:
    """The same, its pictures being files of `folder` beside it."""
    parts = [f"<!-- {GENERATOR} -->", f"# {_marked(title)}", *(_markdown(block, folder) for block in blocks)]
    return "\n\n".join([*parts, f"*{_marked(foot)}*", ""])


def pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    return (block for block in blocks if isinstance(block, Picture))


def _escape(text: str) -> str:
    return html.escape(_clean(text))


def _clean(text: str) -> str:
    """Without what no document may hold: control characters, halves of characters, turned writing directions."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def _rows_of_pictures(blocks: Sequence[Block]) -> Iterator[str]:
    """The blocks, pictures that follow each other being side by side where there is room."""
    for pictured, group in groupby(blocks, lambda block: isinstance(block, Picture)):
        written = "\n".join(_html(block) for block in group)
        yield f'<div class="pictures">{written}</div>' if pictured else written


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{_escape(text)}</p>"
        case Code(text):
            return f"<pre><code>{_escape(text)}</code></pre>"
        case Facts(pairs):
            return f"<dl>{''.join(f'<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>' for name, value in pairs)}</dl>"
        case Picture(png, _, caption):
            width, height = (round(SHARP * side) for side in struct.unpack(">II", png[16:24]))
            source, said = base64.b64encode(png).decode(), _escape(caption)
            size = f'width="{width}" height="{height}"' + (' class="big"' if width > BIG else "")
            image = f'<div><img src="data:image/png;base64,{source}" {size} alt="{said}"></div>'
            return f"<figure>{image}<figcaption>{said}</figcaption></figure>"
        case Table(lines):
            kinds = [all(map(_is_number, column)) for column in zip(*lines[1:], strict=True)] or [False] * len(lines[0])
            rows = [_row(line, kinds, "td") for line in lines[1:]]
            head = _row(lines[0], kinds, "th")
            return f'<div class="wide"><table><thead>{head}</thead>\n<tbody>{"".join(rows)}</tbody></table></div>'


def _row(cells: Sequence[str], kinds: Sequence[bool], tag: str) -> str:
    marked = []
    for cell, number in zip(cells, kinds, strict=True):
        kind = ' class="number"' if number else ' class="long"' if len(cell) > LONG else ""
        marked.append(f"<{tag}{kind}>{_escape(cell)}</{tag}>")
    return f"<tr>{''.join(marked)}</tr>\n"


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-?\d[\d.,]*(e-?\d+)?( ± [\d.]+)?( \(.*\))?|diverged|-", cell))


def _markdown(block: Block, folder: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_marked(text)}"
        case Text(text):
            return _marked(text)
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{_clean(text)}\n{fence}"
        case Facts(pairs):
            return "\n".join(f"* {_marked(name)}: {_marked(value)}" for name, value in pairs)
        case Picture(_, name, caption):
            return f"![{_marked(caption)}]({quote(f'{folder}/{name}.png')})\n\n{_marked(caption)}"
        case Table(lines):
            marked = [f"| {' | '.join(_marked(cell) for cell in line)} |" for line in lines]
            return "\n".join([marked[0], "|---" * len(lines[0]) + "|", *marked[1:]])


def _marked(text: str) -> str:
    """One line whose marks mean nothing."""
    line = " ".join(_clean(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
    return re.sub(r"^([#>+-]|\d+[.)])", r"\\\1", line) if not _is_number(line) else line
