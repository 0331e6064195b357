"""Find and read image files below class folders: no hidden names, no file twice, no loops of links."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Progress, progress
from fbpc_ray.data.images import decode
from fbpc_ray.data.raw import BAR_DELAY, RawSplit
from fbpc_ray.data.resize import UNCHANGED, Resizing
from fbpc_ray.data.splits import listed

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif",
}  # fmt: skip
SYSTEM_NAMES = {
    "__macosx", "lost+found", "@eadir", "@tmp", "@recycle", "@__thumb", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
"""Names (lower case) that operating systems and storage devices put into folders."""
MAX_DEPTH = 16
"""Folders below a class folder."""


def is_hidden(name: str) -> bool:
    """Tell whether a name starts with a dot or is one that systems create: not part of the data set."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)


def subfolders(path: Path) -> list[Path]:
    """Return the folders in `path` by name, without hidden ones and links to `path` or a folder above it."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the folder of the images")
    real = os.path.realpath(path)
    with os.scandir(path) as children:
        return sorted(
            Path(child.path) for child in children
            if not is_hidden(child.name) and child.is_dir()
            and not (child.is_symlink() and is_inside(real, os.path.realpath(child.path)))
        )  # fmt: skip


def is_inside(path: str, folder: str) -> bool:
    """Tell whether the absolute `path` is `folder` or lies in it."""
    return os.path.commonpath([path, folder]) == folder


def loose_files(path: Path) -> list[Path]:
    """Return the image files directly in `path`, by name."""
    with os.scandir(path) as children:
        return sorted(Path(child.path) for child in children if is_image(child.name) and not child.is_dir())


@dataclass
class Walk:
    """Files below the class folders of one split."""

    files: list[Path] = field(default_factory=list)
    """Image files, by class, then by path."""
    labels: list[int] = field(default_factory=list)
    real: set[str] = field(default_factory=set)
    """Paths of the files with all links resolved."""
    unread: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of files left out, by (suffix, class)."""
    nested: list[str] = field(default_factory=list)
    """Classes with several folders of images in them."""
    repeated: int = 0
    """Links to files that are read under another path."""
    loops: int = 0
    """Links to folders above them."""

    def notes(self, path: Path) -> Iterator[str]:
        """Yield notes on files left out."""
        if self.unread:
            texts = []
            for suffix in sorted({suffix for suffix, _ in self.unread}):
                by_class = {name: n for (end, name), n in sorted(self.unread.items()) if end == suffix}
                classes = listed(f"{name} {n}" for name, n in by_class.items())
                texts.append(f"{sum(by_class.values())} {suffix or 'without suffix'} ({classes})")
            count = self.unread.total()
            files = "file that is" if count == 1 else "files that are"
            yield (
                f"{path}: left out {count} {files} not read as images: {', '.join(texts)}; "
                "convert images among them to PNG"
            )
        if self.nested:
            yield (
                f"{path}: images lie in several folders below {listed(self.nested)}; "
                "all images below a class folder are of that class"
            )
        if self.repeated or self.loops:
            yield (
                f"{path}: left out {self.repeated + self.loops} links to files that are read under another path, "
                "or to folders above the link"
            )


@dataclass
class _Entry:
    path: Path
    real: str
    label: int
    linked: bool


def walk(path: Path, folders: Sequence[tuple[str, int, Path]]) -> Walk:
    """Collect the image files of `folders`, each (class name, label, class folder), of the split in `path`.

    A file with several links to it is listed once: by its own path if that lies in `folders`, else by its first link.
    """
    result, entries = Walk(), list[_Entry]()
    with progress(f"{path}: files seen", None, "file", delay=BAR_DELAY) as bar:
        for name, label, folder in folders:
            entries += _entries(result, bar, name, label, folder)
    first: dict[str, _Entry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.linked, entry.label, entry.path)):
        first.setdefault(entry.real, entry)
    listed_once = sorted(first.values(), key=lambda entry: (entry.label, entry.path))
    result.files, result.labels = [entry.path for entry in listed_once], [entry.label for entry in listed_once]
    result.real, result.repeated = set(first), len(entries) - len(first)
    return result


def _entries(result: Walk, bar: Progress, name: str, label: int, top: Path) -> Iterator[_Entry]:
    """Yield each image file below `top`: folders before links to folders, and no folder twice."""
    visited, holds_images = set[str](), Counter[str]()
    todo, links = [(top, os.path.realpath(top), top.is_symlink(), 0)], list[tuple[Path, str, bool, int]]()
    while todo or links:
        folder, real, linked, depth = todo.pop() if todo else links.pop(0)
        if real in visited:
            result.loops += 1
            continue
        visited.add(real)
        if depth > MAX_DEPTH:
            raise UserError(f"{folder} lies {depth} folders below its class; give a folder of train/CLASS/images")
        with os.scandir(folder) as children:
            for child in sorted((c for c in children if not is_hidden(c.name)), key=lambda child: child.name):
                bar.update()
                at, is_link = Path(child.path), child.is_symlink()
                target = os.path.realpath(child.path) if is_link else f"{real.rstrip(os.sep)}/{child.name}"
                if is_link and child.is_dir() and is_inside(real, target):
                    result.loops += 1
                elif child.is_dir():
                    (links if is_link else todo).append((at, target, linked or is_link, depth + 1))
                elif is_image(child.name):
                    if depth:
                        holds_images[at.relative_to(top).parts[0]] += 1
                    yield _Entry(at, target, label, linked or is_link)
                else:
                    result.unread[at.suffix.lower(), name] += 1
    if len(holds_images) > 1:
        result.nested.append(name)


def by_class(path: Path, classes: Sequence[str]) -> list[tuple[str, int, Path]]:
    """Return (class name, label, folder) for each folder in `path`.

    Folder names match class names up to Unicode normalisation (NFC, NFD).

    Raises:
        UserError: a folder is of no class, or two folders are of one class.
    """
    labels = {unicodedata.normalize("NFC", name): label for label, name in enumerate(classes)}
    folders: dict[int, Path] = {}
    shown = (child for child in path.iterdir() if not is_hidden(child.name))
    if broken := next((child for child in shown if child.is_symlink() and not child.exists()), None):
        raise UserError(f"{broken}: the target of the link doesn't exist; restore the target or remove the link")
    for folder in subfolders(path):
        label = labels.get(unicodedata.normalize("NFC", folder.name))
        if label is None:
            raise UserError(f"{folder}: not one of the classes ({listed(classes)}); rename or remove the folder")
        if label in folders:
            raise UserError(f"{folders[label]} and {folder} differ only in Unicode form (NFC, NFD); keep one")
        folders[label] = folder
    return [(classes[label], label, folder) for label, folder in sorted(folders.items())]


def read_files(
    path: Path, files: Sequence[Path], labels: Sequence[int], notes: Iterable[str] = (), resizing: Resizing = UNCHANGED
) -> RawSplit:
    """Decode `files` of the split in `path`. Raises UserError if a file is missing or not an image."""
    if not files:
        raise UserError(f"no image in {path}; add images to its class folders")

    def place(index: int) -> str:
        return str(files[index])

    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise UserError(f"{missing} is missing or not a regular file; restore it")
    images, decode_notes = decode((file.read_bytes() for file in files), len(files), place, str(path), resizing)
    return RawSplit(images, np.array(labels, np.int64), place, (*notes, *decode_notes))
