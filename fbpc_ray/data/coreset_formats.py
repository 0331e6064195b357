"""Write coresets in others' formats: Hugging Face's Parquet, MTT's .pt, npz, PNG, safetensors.

`files` says what an export consists of:

    hf           data/train-00000-of-00001.parquet: image (8 bits, to look at), pixels (the exact float32), label
    pt           images_best.pt (m, c, h, w) float32, normalised, and labels_best.pt (m,) int64
    png          LABEL-NAME/INDEX.png, 8 bits: the one format that rounds
    npz          images, labels, mean, std, classes
    safetensors  the file of a run (coreset.py)

Learned labels are in `soft_label` of the Parquet file, soft_labels_best.pt and `soft_labels`, (m, d) float32 logits;
png has none. In the first three formats a coreset.json keeps the normalisation and the names of the classes. No file is
replaced.
"""

import io
import json
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fbpc_ray.core import files as atomic
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.data.coreset import Coreset, dumps
from fbpc_ray.data.datasets import denormalise

Files = dict[str, bytes]
"""Name below the folder of an export -> content."""
SIDECAR = "coreset.json"
SHARD = "data/train-00000-of-00001.parquet"
PAIR = ("images_best.pt", "labels_best.pt")
SOFT = "soft_labels_best.pt"


def files(coreset: Coreset, kind: str, facts: dict[str, str], card: str) -> Files:
    """Return the files of `coreset` in format `kind`; safetensors and npz are one file, named by its suffix.

    `facts` say what made it; `card` becomes README.md. Raises UserError for another `kind`, or channels that PNG lacks.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: {closest(kind, list(FORMATS))}")
    if kind in SINGLE:
        return FORMATS[kind](coreset, facts)
    beside = {"mean": coreset.mean, "std": coreset.std, "classes": coreset.classes, "made_by": facts}
    sidecar = json.dumps(beside, indent=2, allow_nan=False) + "\n"
    return {**FORMATS[kind](coreset, facts), SIDECAR: sidecar.encode(), "README.md": card.encode()}


def with_kind_suffix(out: Path, kind: str) -> Path:
    """Return `out` with the suffix of a format that is one file, by which readers know it.

    Raises UserError for the suffix of another format.
    """
    suffix = SINGLE.get(kind, "")
    if out.suffix == suffix or not out.name:
        return out
    if out.suffix in OTHERS and out.suffix != f".{kind}":
        raise UserError(
            f"--out {out.name}: --format {kind} is {describe(kind)}; give another name, or another --format"
        )
    return out.with_name(out.name + suffix)


def describe(kind: str) -> str:
    """Describe the path of a format."""
    return f"one file {SINGLE[kind]}" if kind in SINGLE else "a folder"


def write(outputs: Files, out: Path) -> None:
    """Write a file alone to `out`, or a folder, whole or not at all. Raises UserError where something is there."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: delete it, or give another --out")
    atomic.remove_leftovers_of(out)
    if set(outputs) <= set(SINGLE.values()):
        atomic.write_bytes(out, next(iter(outputs.values())))
        return
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        with atomic.locked_temp_folder(temporary):
            for name, data in outputs.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _hf(coreset: Coreset, facts: dict[str, str]) -> Files:
    del facts
    m, c, h, w = coreset.images.shape
    pixels: pa.Array = pa.array(coreset.images.numpy().ravel())
    for size, count in ((w, m * c * h), (h, m * c), (c, m)):
        pixels = pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * size, pa.int32()), pixels)
    columns: dict[str, pa.Array] = {"pixels": pixels, "label": pa.array(coreset.labels.numpy())}
    features: dict[str, Any] = {
        "pixels": {"shape": [c, h, w], "dtype": "float32", "_type": "Array3D"},
        "label": {"names": list(coreset.classes), "_type": "ClassLabel"},
    }
    if coreset.soft_labels is not None:
        d = len(coreset.classes)
        columns["soft_label"] = pa.FixedSizeListArray.from_arrays(pa.array(coreset.soft_labels.numpy().ravel()), d)
        features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "length": d, "_type": "Sequence"}
    if c in (1, 3):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns["image"] = pa.array([{"bytes": data, "path": None} for data in _pngs(coreset)], kind)
        features["image"] = {"_type": "Image"}
    schema_metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(schema_metadata), buffer)
    return {SHARD: buffer.getvalue()}


def _pt(coreset: Coreset, facts: dict[str, str]) -> Files:
    del facts
    outputs: Files = {}
    tensors: dict[str, torch.Tensor] = dict(zip(PAIR, (coreset.images, coreset.labels), strict=True))
    if coreset.soft_labels is not None:
        tensors[SOFT] = coreset.soft_labels
    for name, tensor in tensors.items():
        buffer = io.BytesIO()
        torch.save(tensor.clone(), buffer)
        outputs[name] = buffer.getvalue()
    return outputs


def _png(coreset: Coreset, facts: dict[str, str]) -> Files:
    del facts
    digits, places = len(str(len(coreset.classes) - 1)), len(str(len(coreset.labels) - 1))
    folders = [
        f"{label:0{digits}d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"[:80].rstrip("-")
        for label, name in enumerate(coreset.classes)
    ]
    pairs = zip(coreset.labels.tolist(), _pngs(coreset), strict=True)
    return {f"{folders[label]}/{index:0{places}d}.png": data for index, (label, data) in enumerate(pairs)}


def _npz(coreset: Coreset, facts: dict[str, str]) -> Files:
    buffer = io.BytesIO()
    arrays = {
        "images": coreset.images.numpy(), "labels": coreset.labels.numpy(), "mean": np.array(coreset.mean),
        "std": np.array(coreset.std), "classes": np.array(coreset.classes), "made_by": np.array(json.dumps(facts)),
    }  # fmt: skip
    if coreset.soft_labels is not None:
        arrays["soft_labels"] = coreset.soft_labels.numpy()
    np.savez(buffer, allow_pickle=False, **arrays)
    return {".npz": buffer.getvalue()}


def _safetensors(coreset: Coreset, facts: dict[str, str]) -> Files:
    return {".safetensors": dumps(coreset, facts)}


def _pngs(coreset: Coreset) -> list[bytes]:
    pixels = denormalise(coreset.images, coreset.mean, coreset.std).numpy()
    if pixels.shape[1] not in (1, 3):
        raise UserError(f"--format png: must have 1 or 3 channels, got {pixels.shape[1]}; choose another --format")
    pngs = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    return pngs


FORMATS: dict[str, Callable[[Coreset, dict[str, str]], Files]] = {
    "hf": _hf, "safetensors": _safetensors, "pt": _pt, "png": _png, "npz": _npz,
}  # fmt: skip
SINGLE = {"safetensors": ".safetensors", "npz": ".npz"}
"""Format of one file -> its suffix."""
OTHERS = (*SINGLE.values(), ".pt", ".pth", ".parquet", ".png")
"""Suffixes of files that hold a coreset, or a picture."""
