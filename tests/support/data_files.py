"""Makers of small data sets as files: each image depends on (label, number) alone."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Row = tuple[bytes | None, Any]


def picture(label: int, number: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """(h, w, 3) uint8 noise; `size` is (width, height)."""
    return np.random.default_rng((label, number)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encode(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_image(
    path: Path, label: int = 0, number: int = 99, form: str = "PNG", size: tuple[int, int] = (8, 8)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(label, number, size), form))
    return path


def write_classes(
    root: Path, names: Iterable[str] = ("a", "b"), count: int = 4, first: int = 0, size: tuple[int, int] = (8, 8)
) -> Path:  # fmt: skip
    """root/NAME/NNN.png: `count` images for each name, numbered from `first`."""
    for label, name in enumerate(names):
        for number in range(first, first + count):
            write_image(root / name / f"{number:03d}.png", label, number, size=size)
    return root


def write_splits(
    root: Path, train: str = "train", test: str = "test", names: Sequence[str] = ("a", "b"),
    size: tuple[int, int] = (8, 8),
) -> Path:  # fmt: skip
    """4 images per class in root/TRAIN and 3 in root/TEST."""
    write_classes(root / train, names, size=size)
    write_classes(root / test, names, 3, first=50, size=size)
    return root


def rows(count: int = 4, first: int = 0, classes: int = 2) -> list[Row]:
    """(bytes of a PNG, label) with labels 0, 1, 0, 1, ..."""
    return [
        (encode(picture(label, number)), label) for number in range(first, first + count) for label in range(classes)
    ]


def write_table(
    path: Path, data: Sequence[Row], names: Sequence[str] | None = ("a", "b"), label: str = "label",
    kind: Any = None, more: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A Parquet file in Hugging Face layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": each, "path": None} for each, _ in data], struct)
    table = pa.table({"image": images, label: pa.array([each for _, each in data], kind or pa.int64()), **(more or {})})
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names:
        features[label] = {"names": list(names), "_type": "ClassLabel"}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return path


def write_npz(path: Path, classes: Sequence[str], count: int, side: int) -> str:
    """Write `count` noise images, their classes in turn, as both splits; return the value of --data."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = np.array(classes)[np.arange(count) % len(classes)]
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{path}"
