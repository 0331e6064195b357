"""Hooks of mkdocs: README.md and CONTRIBUTING.md become pages, and links that leave docs/ become plain text."""

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
