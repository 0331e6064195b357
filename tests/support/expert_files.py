"""Files of an expert store, and processes that write to it."""

from pathlib import Path


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def visible(folder: Path) -> list[str]:
    return [name for name in listing(folder) if not name.startswith(".")]
