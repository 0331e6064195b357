"""Read coresets in the formats of coreset_formats.py, whoever made them, and fit them to a data set.

Without a coreset.json the normalisation and the names of the classes are those of the data set. Nothing is unpickled
but tensors (torch's weights_only).
"""

import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fbpc_ray.core import inputs, memory, storage, tensor_files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Place, Remote
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.coreset_formats import PAIR, SIDECAR
from fbpc_ray.data.datasets import Dataset, normalise
from fbpc_ray.data.folder import folder
from fbpc_ray.data.parquet import parquet

OF_A_RUN = "coreset/coreset.safetensors"
Pixels = Literal["auto", "normalised", "unit"]


class _Raw(NamedTuple):
    """What a file holds, not yet checked."""

    images: Tensor
    labels: Tensor
    facts: dict[str, Any] | None = None
    """mean, std and classes where the file says them."""
    soft_labels: Tensor | None = None
    """(m, d) logits."""


class Loaded(NamedTuple):
    """A coreset that fits the data set."""

    coreset: Coreset
    """Its mean and std are its own where its file says them, else those of the data set."""
    notes: tuple[str, ...]
    """What was assumed."""


def load(where: Place, dataset: Dataset, pixels: Pixels = "auto") -> Loaded:
    """Read a coreset, of this package or another, that has the classes and the image size of `dataset`.

    A file (.safetensors, .npz, .pt, .pth, .parquet), MTT's pair (its folder or images_X.pt), a Hugging Face folder, a
    run, or class folders of images. Images are uint8 or floats; (m, h, w, c) and (m, h, w) are understood. Floats of a
    file that doesn't say its normalisation are as `pixels` says: normalised as the data set is | unit, in 0..1 | auto:
    unit where all are in 0..1. Raises UserError for everything else; no file runs code.
    """
    try:
        if isinstance(where, Remote):
            if Path(where.name).suffix not in SUFFIXES:
                raise UserError(
                    f"{where}: from an object store only a single file can be read ({', '.join(SUFFIXES)}); copy the "
                    "folder to this machine"
                )
            with storage.local(where) as near:
                return _fitted(_read(near, dataset), dataset, str(where), pixels)
        return _fitted(_read(where, dataset), dataset, str(where), pixels)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or where}: coreset not found; check the path") from None
    except Exception as error:  # a damaged file fails in any way
        raise UserError(
            f"{where} is not a coreset of plain arrays ({_line(error)}); no code in it was run: write the file again"
        ) from error


def settings_of(where: Place) -> dict[str, Any]:
    """Return the settings that a coreset was distilled with, where its file has them.

    Empty for a file that can't be read, too: `load` says what is wrong with it.
    """
    with suppress(Exception), storage.local(where) as near:
        settings = inputs.parse_json(_facts_of(near)["settings"])
        return settings if isinstance(settings, dict) else {}
    return {}


def _facts_of(where: Path) -> dict[str, str]:
    """Return what the file says of its origin. Raises any error."""
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


def check_size(where: Place) -> None:
    """Raise UserError for a file that does not fit into memory."""
    size = where.stat().st_size if isinstance(where, Path) and where.is_file() else 0
    if size > (free := memory.available()):
        raise UserError(
            f"{where}: a coreset of {memory.gigabytes(size)} does not fit into memory, {memory.gigabytes(free)} are "
            "available; use a smaller coreset"
        )


def _read(where: Path, dataset: Dataset) -> _Raw:
    if not where.exists():
        raise FileNotFoundError(2, "", str(where))
    if where.is_file():
        return SUFFIXES[_suffix(where)](where)
    if (where / "config.json").exists() and (where / OF_A_RUN).exists():
        return _read_safetensors(where / OF_A_RUN)
    if (where / PAIR[0]).exists():
        return _read_pt(where / PAIR[0])
    if any(where.glob("*.parquet")) or any(where.glob("data/*.parquet")):
        return _read_parquet(where)
    return _read_folders(where, dataset)


def _suffix(path: Path) -> str:
    """Return the suffix of a file's name or, for an unknown one, that of its first bytes."""
    if path.suffix in SUFFIXES:
        return path.suffix
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


def _read_safetensors(path: Path) -> _Raw:
    with tensor_files.open_checked(path) as file:
        ours = "classes" in (file.metadata() or {})
        if not ours:
            images, labels = (_tensor(file.get_tensor(name).clone()) for name in ("images", "labels"))  # out of the map
            return _Raw(images, labels)
    pseudocoreset = coreset.load(path)
    return _Raw(pseudocoreset.images, pseudocoreset.labels, pseudocoreset._asdict(), pseudocoreset.soft_labels)


def _read_npz(path: Path) -> _Raw:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        lacks = [name for name in ("images", "labels") if name not in archive.files]
        if lacks:
            raise UserError(f"{path} has no array {lacks[0]} (it has {', '.join(archive.files)}): rename the array")
        facts = {name: archive[name].tolist() for name in ("mean", "std", "classes") if name in archive.files}
        images, labels = (torch.from_numpy(np.ascontiguousarray(archive[name])) for name in ("images", "labels"))
        soft = torch.from_numpy(archive["soft_labels"]) if "soft_labels" in archive.files else None
    return _Raw(images, labels, facts if len(facts) == 3 else None, soft)


def _read_pt(path: Path) -> _Raw:
    """Read MTT's images_X.pt with labels_X.pt and, optionally, soft_labels_X.pt beside it; or one file.

    One file holds {images, labels}, (images, labels), or DC's and DM's {"data": [(images, labels), ...]}, of which the
    last pair is read.
    """
    content, soft = _tensors_of(path), None
    if isinstance(content, Tensor):
        if not path.name.startswith("images"):
            raise UserError(f"{path} holds images without labels: name them images_X.pt and labels_X.pt")
        labels = path.with_name("labels" + path.name.removeprefix("images"))
        content = content, _tensors_of(labels)
        if (beside := labels.with_name(f"soft_{labels.name}")).exists():
            soft = _tensor(_tensors_of(beside))
    if isinstance(content, dict):
        content = content["data"][-1] if "data" in content else (content["images"], content["labels"])
    images, labels = content
    return _Raw(_tensor(images), _tensor(labels), _sidecar(path.parent), soft)


def _tensors_of(path: Path) -> Any:
    """Read a file of torch.save that holds tensors and plain containers alone, without torch's warnings."""
    with warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_parquet(path: Path) -> _Raw:
    shards = [path] if path.is_file() else sorted([*path.glob("data/*.parquet")] or [*path.glob("*.parquet")])
    shards = [shard for shard in shards if shard.name.startswith("train")] or shards
    facts = _sidecar(path if path.is_dir() else path.parent.parent if path.parent.name == "data" else path.parent)
    if "pixels" not in pq.read_schema(shards[0]).names:
        source = parquet(path)
        part = source.parts["train"]
        classes = {"classes": source.classes} if source.classes else {}
        return _Raw(torch.from_numpy(part.images), torch.from_numpy(part.labels), (facts or {}) | classes or None)
    soft_column = ["soft_label"] if "soft_label" in pq.read_schema(shards[0]).names else []
    tables = [pq.read_table(shard, columns=["pixels", "label", *soft_column]) for shard in shards]
    soft = torch.cat([_nested(table.column("soft_label")) for table in tables]) if soft_column else None
    images = torch.cat([_nested(table.column("pixels")) for table in tables])
    labels = torch.cat([torch.from_numpy(table.column("label").to_numpy().copy()) for table in tables])
    return _Raw(images, labels, facts, soft)


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


def _read_folders(path: Path, dataset: Dataset) -> _Raw:
    """Read images from folders named by class or, beside a coreset.json, LABEL-NAME."""
    source, facts = folder(path), _sidecar(path)
    names, part = source.classes or (), source.parts["train"]
    unknown = [name for name in names if not (re.match(r"\d+(-|$)", name) if facts else name in dataset.classes)]
    if unknown:
        raise UserError(f"{path / unknown[0]} is not a class of {dataset.name}: name each folder like its class")
    of = torch.tensor([int(name.partition("-")[0]) if facts else dataset.classes.index(name) for name in names])
    labels = of[torch.from_numpy(part.labels)]
    order = labels.argsort(stable=True)
    return _Raw(torch.from_numpy(part.images)[order], labels[order], facts)


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


def _fitted(raw: _Raw, dataset: Dataset, source: str, pixels: Pixels) -> Loaded:
    """Check a coreset and convert it to a `Coreset` of `dataset`."""
    images, labels, soft, notes = raw.images, raw.labels, raw.soft_labels, []
    if soft is None and labels.ndim == 2 and labels.is_floating_point():
        soft, note = _soft_labels(labels.float())
        labels = labels.argmax(1)
        notes.append(note)
    if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"{source}: labels are {labels.dtype} {tuple(labels.shape)}; they must be class numbers (m,), or soft "
            "labels, floats (m, classes)"
        )
    facts = raw.facts or {}
    mean, std = (tuple(facts.get(name, getattr(dataset, name))) for name in ("mean", "std"))
    classes = tuple(facts.get("classes", dataset.classes))
    if classes != dataset.classes:
        raise UserError(f"{source} has other classes than {dataset.name}: give its data set with --data")
    images = _channels_first(images, dataset.image_shape)
    if images.shape[1:] != dataset.image_shape:
        side = f", or add --image-size {images.shape[-1]}" if images.shape[-1] == images.shape[-2] else ""
        raise UserError(
            f"{source} has images of {tuple(images.shape[1:])}, {dataset.name} of {dataset.image_shape}: "
            f"give its data set with --data{side}"
        )
    if images.dtype == torch.uint8:
        images = normalise(images, mean, std)
    elif not images.is_floating_point():
        raise UserError(f"{source}: images are {images.dtype}; they must be uint8 or floats")
    elif "mean" not in facts:
        inside = bool(images.min() >= 0 and images.max() <= 1)
        unit = pixels == "unit" or (pixels == "auto" and inside)
        if pixels == "unit" and not inside:
            raise UserError(f"{source} has pixels outside 0..1: --pixels unit does not fit; try normalised")
        notes.append(
            f"pixels taken as {'0..1' if unit else f'normalised with mean {[*mean]} and std {[*std]}'} (--pixels)"
        )
        if unit:
            shaped = [torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std)]
            images = (images.float() - shaped[0]) / shaped[1]
    pseudocoreset = Coreset(images.float().contiguous(), labels.long(), mean, std, classes, soft)
    if wrong := coreset.problem(pseudocoreset):
        raise UserError(f"{source} is not a coreset ({wrong}): make it again")
    return Loaded(pseudocoreset, tuple(notes))


def _soft_labels(values: Tensor) -> tuple[Tensor, str]:
    """Return labels (m, d) of others as centred logits, and what was assumed of them."""
    if bool((values >= 0).all()) and bool((values.sum(1) - 1).abs().max() < 1e-3):
        logits, note = values.clamp(min=1e-6).log(), "probabilities (each row sums to 1)"
    else:
        logits, note = values, "logits (not every row sums to 1)"
    return logits - logits.mean(1, keepdim=True), f"soft labels taken as {note}"


def _channels_first(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Convert (m, h, w), (m, h, w, c) and grey images of three channels to the data set's (m, c, h, w)."""
    c, h, w = shape
    if images.ndim == 3:
        images = images[:, None]
    if images.shape[1:] == (h, w, c) != shape:
        images = images.permute(0, 3, 1, 2)
    if images.shape[1:] == (3, h, w) and c == 1 and bool((images == images[:, :1]).all()):
        images = images[:, :1]
    if images.shape[1:] == (1, h, w) and c == 3:
        images = images.expand(-1, 3, -1, -1)
    return images


def _line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return text.split(". ")[0][:120].rstrip(".")


SUFFIXES: dict[str, Callable[[Path], _Raw]] = {
    ".safetensors": _read_safetensors, ".npz": _read_npz, ".pt": _read_pt, ".pth": _read_pt, ".parquet": _read_parquet,
}  # fmt: skip
"""End of a file's name -> its reader."""
