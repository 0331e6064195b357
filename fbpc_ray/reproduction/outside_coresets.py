"""Coresets that others made, as rows of a grid: `--coreset-row NAME=PATH`, `--whitening NAME=PATH`.

A coreset is copied below OUT/coresets/, with its whitening beside it; its folder is named by what it holds.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import place
from fbpc_ray.data import coreset, coreset_reader, whitening
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.data.whitening import Whitening
from fbpc_ray.distillation.expert_store import slug
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reproduction import grid
from fbpc_ray.reproduction.tables import Cell

WHITENING = "whitening.npz"


class OutsideCoreset(NamedTuple):
    """A coreset that others made."""

    name: str
    """Of its row."""
    path: str
    coreset: Coreset
    whitening: Whitening | None

    @property
    def ipc(self) -> float:
        """Return its images per class."""
        return len(self.coreset.labels) / len(self.coreset.classes)

    @property
    def folder_name(self) -> str:
        """Name the folder of its copy by what it holds."""
        own = coreset.dumps(self.coreset)
        of_map = self.whitening.digest() if self.whitening else ""
        return f"outside-{slug(self.name)}-{hashlib.sha256(own + of_map.encode()).hexdigest()[:16]}"

    def cells(self, other: Cell) -> list[Cell]:
        """Return a cell for every inference, with the coreset's images per class and else the settings of `other`."""
        config = other.config.updated(ipc=math.ceil(self.ipc), method="random", seed=0)
        return [
            Cell(self.name, f"ipc {self.ipc:g}, {column}", grid.judged_by(config, column), other.judged_on)
            for column in grid.INFERENCES
        ]

    def copy_to(self, folder: Path) -> None:
        """Write whitening and coreset, in this order, where a run directory has its coreset."""
        if self.whitening:
            whitening.save(self.whitening, folder / WHITENING)
        coreset.save(self.coreset, RunDirectory(folder).coreset_path, {"source": self.path})


def parse(words: Sequence[str], flag: str) -> dict[str, str]:
    """Parse NAME=PATH words. Raises UserError."""
    pairs = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name.strip() and equals and path):
            raise UserError(f"{flag} {word}: must be NAME=PATH")
        if name.strip() in pairs:
            raise UserError(f"{flag} {word}: the name {name.strip()} is there twice; give each row its own")
        pairs[name.strip()] = path
    return pairs


def read(rows: dict[str, str], whitenings: dict[str, str], dataset: Dataset) -> tuple[list[OutsideCoreset], list[str]]:
    """Read the coresets of `rows` {name: path}, and what was assumed of them. Raises UserError."""
    unknown = [name for name in whitenings if name not in rows]
    if unknown:
        raise UserError(f"--whitening {unknown[0]}=...: no --coreset-row has this name; give {unknown[0]}=PATH there")
    coresets, notes = [], []
    for name, path in rows.items():
        pseudocoreset, assumed = coreset_reader.load(place(path), dataset)
        notes += [f"{name}: {line}" for line in assumed]
        shape = dataset.image_shape
        of_map = whitening.load(Path(whitenings[name]).expanduser(), shape) if name in whitenings else None
        coresets.append(OutsideCoreset(name, path, pseudocoreset, of_map))
    return coresets, notes


def whitening_of(folder: Path, image_shape: tuple[int, int, int]) -> Whitening | None:
    """Read the whitening beside a coreset; None where it has none."""
    path = folder / WHITENING
    return whitening.load(path, image_shape) if path.exists() else None
