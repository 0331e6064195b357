"""Make images, and files of every source: Parquet, folders, npz, Tiny-ImageNet."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fbpc_ray.data.datasets import Dataset, load


def pixels(n: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """(n, size, size, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def huggingface(names: Any, label: str = "label") -> dict[bytes, bytes]:
    features = {"img": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(
    path: Path,
    blobs: Sequence[bytes | None],
    labels: Sequence[int | None],
    *,
    names: Any = ("cat", "dog"),
    image: str = "img",
    label: str = "label",
    struct: bool = True,
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": b, "path": None} for b in blobs], kind) if struct else pa.array(blobs, pa.binary())
    table = pa.table({image: column, label: pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata(huggingface(names, label) if names else None), path, **options)
    return path


def write_pair(folder: Path, n: int = 10, **splits: int) -> Path:
    """Parquet files of n images with labels 0, 1, 0, 1, ...: splits maps a file's name to the seed of its pixels."""
    for name, seed in splits.items():
        write_parquet(folder / f"{name}.parquet", [encoded(x) for x in pixels(n, seed)], [i % 2 for i in range(n)])
    return folder


def write_images(folder: Path, images: np.ndarray, form: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        (folder / f"{index:03d}.{form}").write_bytes(encoded(image, {"JPEG": "JPEG"}.get(form, "PNG")))


def write_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def whole_npz(path: Path, **replaced: Any) -> str:
    arrays = {"x_train": pixels(8), "y_train": np.arange(8) % 2, "x_test": pixels(4, 1), "y_test": np.arange(4) % 2}
    return write_npz(path, **(arrays | replaced))


def write_tiny_imagenet(base: Path) -> Path:
    """Two classes, three train images and one val image each; the first image of n02 is grey."""
    for number, wnid in enumerate(("n02", "n01")):
        write_images(base / "train" / wnid / "images", pixels(3, number), "JPEG")
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("000.JPEG\t0\t0\t7\t7\n")
    grey = base / "train" / "n02" / "images" / "000.JPEG"
    Image.fromarray(pixels(1)[0, :, :, 0]).save(grey)
    write_images(base / "val" / "images", pixels(2, 5), "JPEG")
    (base / "val" / "val_annotations.txt").write_text("000.JPEG\tn02\t0\t0\t7\t7\n001.JPEG\tn01\t0\t0\t7\t7\n")
    write_images(base / "test" / "images", pixels(2, 6), "JPEG")
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "words.txt").write_text("n01\tgoldfish\nn02\tnewt\n")
    return base


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def channels_first(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2)


def well_formed(data: Dataset) -> None:
    for split in (data.train, data.validation, data.test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64
        assert split.images.flags.c_contiguous and split.images.shape[1:] == data.image_shape
        assert split.labels.shape == (len(split.images),)
        assert np.all((split.labels >= 0) & (split.labels < len(data.classes)))
    assert len(data.mean) == len(data.std) == data.image_shape[0] and min(data.std) > 0
    assert len(data.fingerprint) == 16 and int(data.fingerprint, 16) >= 0


def scenes(n: int, height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(n, c, h, w) uint8 whose spectra fall like those of photographs."""
    noise = np.random.default_rng(seed).normal(size=(n, channels, height, width))
    noise = 0.6 * noise + 0.8 * noise.mean(1, keepdims=True) * math.sqrt(channels)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    field = np.fft.ifft2(np.fft.fft2(noise) / np.maximum(frequency, 1 / max(height, width))).real
    return np.clip(120 + 55 * field / field.std(), 0, 255).astype(np.uint8)


def coloured(tmp_path: Path, n: int = 6) -> Dataset:
    """20 training and `n` test images of 8x8 pixels in three classes, from a file."""
    x = scenes(20, 8, 8).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(20) % 3, x_test=x[:n], y_test=np.arange(n) % 3)
    return load(f"npz:{tmp_path / 'a.npz'}")
