"""A run and a coreset to export, and how the tests write and compare them."""

from pathlib import Path

import torch

from fbpc_ray.data import coreset_formats
from fbpc_ray.data.coreset import Coreset

NAMES = ("cat", "Hündin / wild", 'a "b": c')


def write_export(coreset_to_write: Coreset, kind: str, out: Path) -> Path:
    coreset_formats.write(coreset_formats.files(coreset_to_write, kind, {"method": "fbpc"}, "card"), out)
    return out


def same(one: Coreset, other: Coreset) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and one[2:6] == other[2:6]
