"""Read the arrays of coresets in the formats of coreset_formats.py, whoever made them.

coreset_reader.py checks them. Nothing is unpickled but tensors (torch's weights_only).
"""

import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fbpc_ray.core import inputs, tensor_files
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset_formats import PAIR, SIDECAR
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.data.folder import folder
from fbpc_ray.data.parquet import parquet
from fbpc_ray.data.raw import RawDataset
from fbpc_ray.data.splits import listed

OF_A_RUN = "coreset/coreset.safetensors"
NOT_IN_RUN = "{}: coreset not found; if the run has not ended, resume it"


class RawCoreset(NamedTuple):
    """What a file holds, not yet checked."""

    images: Tensor
    labels: Tensor
    facts: dict[str, Any] | None = None
    """mean, std and classes where the file says them."""
    soft_labels: Tensor | None = None
    """(m, d) logits."""
    notes: tuple[str, ...] = ()
    """What was left out or assumed."""


def read(where: Path, dataset: Dataset | None) -> RawCoreset:
    """Read a file or a folder. Raises any error for one that is damaged.

    Args:
        dataset: names the classes of class folders without a coreset.json.
    """
    if not where.exists():
        raise FileNotFoundError(2, "", str(where))
    if where.is_file():
        return SUFFIXES[_suffix(where)](where)
    if (where / "config.json").exists():
        if (where / OF_A_RUN).exists():
            return _read_safetensors(where / OF_A_RUN)
        contents = {child.name for child in where.iterdir() if child.is_dir() or child.suffix == ".parquet"}
        if contents <= {"checkpoint", "coreset", "metrics.parquet"}:
            raise UserError(NOT_IN_RUN.format(where / OF_A_RUN))
    if (where / PAIR[0]).exists():
        return _read_pt(where / PAIR[0])
    if any(where.glob("*.parquet")) or any(where.glob("data/*.parquet")):
        return _read_parquet(where)
    return _read_folders(where, dataset)


def _suffix(path: Path) -> str:
    """Return the suffix of a file's name or, for an unknown one, that of its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):  # a zip file, as npz and torch's files are
        with zipfile.ZipFile(path) as archive:
            return ".npz" if any(name.endswith(".npy") for name in archive.namelist()) else ".pt"
    if start.startswith(b"PAR1"):
        return ".parquet"
    if start[8:] == b"{":  # after 8 bytes of length, the header
        return ".safetensors"
    suffixes = ", ".join(SUFFIXES)
    raise UserError(f"{path}: a coreset must be a folder, or a file that ends in {suffixes}; rename or export it")


def _read_safetensors(path: Path) -> RawCoreset:
    with tensor_files.open_checked(path) as file:
        ours = "classes" in (file.metadata() or {})
        if not ours:
            images, labels = (_tensor(file.get_tensor(name).clone()) for name in ("images", "labels"))  # out of the map
            return RawCoreset(images, labels)
    pseudocoreset = coreset.load(path)
    return RawCoreset(pseudocoreset.images, pseudocoreset.labels, pseudocoreset._asdict(), pseudocoreset.soft_labels)


def _read_npz(path: Path) -> RawCoreset:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        lacks = [name for name in ("images", "labels") if name not in archive.files]
        if lacks:
            raise UserError(f"{path} has no array {lacks[0]} (it has {', '.join(archive.files)}): rename the array")
        facts = {name: archive[name].tolist() for name in ("mean", "std", "classes") if name in archive.files}
        if ("mean" in facts) != ("std" in facts):
            raise UserError(f"{path} has one of the arrays mean and std: add the other one, or remove it")
        if archive["labels"].dtype.kind in "US":
            raise UserError(f"{path}: labels are names; write class numbers, in the order of the data set's classes")
        images, labels = (torch.from_numpy(np.ascontiguousarray(archive[name])) for name in ("images", "labels"))
        soft = torch.from_numpy(archive["soft_labels"]) if "soft_labels" in archive.files else None
    return RawCoreset(images, labels, facts or None, soft)


def _read_pt(path: Path) -> RawCoreset:
    """Read MTT's images_X.pt with labels_X.pt and, optionally, soft_labels_X.pt beside it; or one file.

    One file holds {images, labels}, (images, labels), or DC's and DM's {"data": [(images, labels), ...]}, of which the
    last pair is read.
    """
    content, soft = _tensors_of(path), None
    if isinstance(content, Tensor):
        if not path.name.startswith("images"):
            raise UserError(f"{path} holds images without labels: name them images_X.pt and labels_X.pt")
        labels = path.with_name("labels" + path.name.removeprefix("images"))
        if not labels.exists():
            raise UserError(f"{path} holds images without labels: {labels} is missing")
        content = content, _tensors_of(labels)
        if (beside := labels.with_name(f"soft_{labels.name}")).exists():
            soft = _tensor(_tensors_of(beside))
    if isinstance(content, dict):
        if "data" not in content and not {"images", "labels"} <= content.keys():
            raise UserError(f"{path} has no images and labels (it has {listed(content)}): rename its entries")
        content = content["data"][-1] if "data" in content else (content["images"], content["labels"])
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise UserError(f"{path} must hold images and labels, a pair or a dict; no code in it was run: write it again")
    images, labels = content
    return RawCoreset(_tensor(images), _tensor(labels), _sidecar(path.parent), soft)


def _tensors_of(path: Path) -> Any:
    """Read a file of torch.save that holds tensors and plain containers alone, without torch's warnings."""
    with warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_parquet(path: Path) -> RawCoreset:
    shards = [path] if path.is_file() else sorted([*path.glob("data/*.parquet")] or [*path.glob("*.parquet")])
    shards = [shard for shard in shards if shard.name.startswith("train")] or shards
    facts = _sidecar(path if path.is_dir() else path.parent.parent if path.parent.name == "data" else path.parent)
    if "pixels" not in pq.read_schema(shards[0]).names:
        source = parquet(path)
        classes = {"classes": source.classes} if source.classes else {}
        return _of_images(source, (facts or {}) | classes or None)
    soft_column = ["soft_label"] if "soft_label" in pq.read_schema(shards[0]).names else []
    tables = [pq.read_table(shard, columns=["pixels", "label", *soft_column]) for shard in shards]
    soft = torch.cat([_nested(table.column("soft_label")) for table in tables]) if soft_column else None
    images = torch.cat([_nested(table.column("pixels")) for table in tables])
    labels = torch.cat([torch.from_numpy(table.column("label").to_numpy().copy()) for table in tables])
    return RawCoreset(images, labels, facts, soft)


def _nested(column: pa.ChunkedArray) -> Tensor:
    """Convert nested lists of numbers, of one length at each depth, to a tensor (n, ...)."""
    parts = []
    for chunk in column.chunks:
        values, shape = chunk, [len(chunk)]
        while True:
            if isinstance(values, pa.ExtensionArray):  # where `datasets` is imported too
                values = values.storage
            if values.null_count:
                raise ValueError("a pixel is null")
            if not pa.types.is_nested(values.type):
                break
            inner = values.flatten()
            size, rest = divmod(len(inner), len(values))
            if rest or (pa.types.is_list(values.type) and set(values.value_lengths().to_pylist()) != {size}):
                raise ValueError("its images are of several sizes")
            shape.append(size)
            values = inner
        parts.append(torch.from_numpy(values.to_numpy(zero_copy_only=False).reshape(shape).copy()))
    return torch.cat(parts)


def _read_folders(path: Path, dataset: Dataset | None) -> RawCoreset:
    """Read images from folders named by class or, beside a coreset.json, LABEL-NAME."""
    source, facts = folder(path), _sidecar(path)
    names = source.classes or ()
    classes, owner = (dataset.classes, dataset.name) if dataset else (names, str(path))
    unknown = [name for name in names if not (re.match(r"\d+(-|$)", name) if facts else name in classes)]
    if unknown:
        raise UserError(f"{path / unknown[0]} is not a class of {owner}: name each folder like its class")
    of = torch.tensor([int(name.partition("-")[0]) if facts else classes.index(name) for name in names])
    raw = _of_images(source, facts)
    labels = of[raw.labels]
    order = labels.argsort(stable=True)
    return raw._replace(images=raw.images[order], labels=labels[order])


def _of_images(source: RawDataset, facts: dict[str, Any] | None) -> RawCoreset:
    """Return the train split of decoded images; other splits are left out."""
    part = source.parts["train"]
    others = [split for split in source.parts if split != "train"]
    notes = (f"{source.origin}: the {' and '.join(others)} split is left out",) if others else ()
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    return RawCoreset(images, labels, facts, notes=(*source.notes, *part.notes, *notes))


def _sidecar(folder: Path) -> dict[str, Any] | None:
    path = folder / SIDECAR
    if not path.is_file():
        return None
    content = inputs.read_json(path)
    if not isinstance(content, dict) or not {"mean", "std", "classes"} <= content.keys():
        raise UserError(f"{path} is damaged: restore it, or delete it to take the normalisation of the data set")
    return content


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise ValueError(f"a {type(value).__name__} where a plain tensor should be")
    return value.detach().cpu()


def read_facts(where: Path) -> dict[str, str]:
    """Return the facts that a file has of its origin. Raises any error."""
    if (where / OF_A_RUN).is_file():
        return coreset.metadata(where / OF_A_RUN)
    if where.is_dir():
        return inputs.read_json(where / SIDECAR)["made_by"]
    if (suffix := _suffix(where)) == ".safetensors":
        return coreset.metadata(where)
    if suffix == ".npz":
        with where.open("rb") as file:
            return inputs.parse_json(str(np.load(file, allow_pickle=False)["made_by"]))
    folder = where.parent.parent if where.parent.name == "data" else where.parent
    return inputs.read_json(folder / SIDECAR)["made_by"]


SUFFIXES: dict[str, Callable[[Path], RawCoreset]] = {
    ".safetensors": _read_safetensors, ".npz": _read_npz, ".pt": _read_pt, ".pth": _read_pt, ".parquet": _read_parquet,
}  # fmt: skip
"""End of a file's name -> its reader."""
