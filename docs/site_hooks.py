"""Hooks of mkdocs: add pages made of README.md, CONTRIBUTING.md and module docstrings; fix links.

Links to files outside docs/ become plain text.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
"""Page of the site -> file of the repository."""
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()#\s]*)(#[^()\s]*)?\)")
"""[text](target#anchor)."""


def on_files(files: Any, config: Any) -> None:
    """Add the pages that lie outside docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "modules.md", content=module_map()))


def module_map() -> str:
    """List every module with the first line of its docstring, room by room."""
    parts = ["# Map of modules", "Imports go down: a room imports the rooms above it in this list."]
    rooms = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("Rooms, bottom to top: `")[2]
    for room in rooms.partition("`")[0].split():
        folder = ROOT / "fbpc_ray" / room
        parts += [f"## {room}", first_line(folder / "__init__.py")]
        modules = [path for path in sorted(folder.rglob("*.py")) if path != folder / "__init__.py"]
        parts.append("\n".join(f"* `{path.relative_to(folder).as_posix()}`: {first_line(path)}" for path in modules))
    return "\n\n".join(parts)


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point every link at a page of the site; keep only the text of a link to another file of the repository."""
    folder = ROOT if page.file.src_uri in PAGES else ROOT / "docs"

    def rewrite(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if not target or "://" in target:
            return match[0]
        path = (folder / target).resolve()
        name = next((name for name, source in PAGES.items() if path == ROOT / source), "")
        if not name and path.parent == ROOT / "docs" and path.is_file():
            name = path.name
        return f"[{text}]({name}{anchor})" if name else text

    return LINK.sub(rewrite, markdown)
