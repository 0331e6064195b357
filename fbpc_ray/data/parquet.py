"""Parquet files in the layout of Hugging Face's hub: which belong together, which columns they have, their rows."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.raw import SPLITS, RawDataset, RawSplit, decode, line, listed

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")


def parquet(path: Path) -> RawDataset:
    """Parquet in Hugging Face layout: PATH or PATH/data with train-*, test-*, valid-* files, or one file.

    Column `img` or `image` (bytes of a file, or a struct with `bytes`) and integer column `label` or `fine_label`.
    """
    shards, notes = _shards(path)
    heads = {split: [_head(file) for file in files] for split, files in shards.items()}
    named = [(head.file, head.classes) for each in heads.values() for head in each if head.classes]
    for file, classes in named[1:]:
        if classes != named[0][1]:
            raise UserError(f"{named[0][0]} and {file} name different classes: their labels don't mean the same")
    parts = {split: _part(each) for split, each in heads.items()}
    return RawDataset(str(path), named[0][1] if named else None, parts, notes)


class _Head(NamedTuple):
    """What one parquet file says of itself."""

    file: Path
    rows: int
    image: str
    label: str
    classes: tuple[str, ...] | None


def _shards(path: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Split -> its files in the order of their numbers, and notes on files of no split."""
    if path.is_file():
        return {"train": [path]}, ()
    files = list(path.glob("*.parquet")) or list(path.glob("data/*.parquet"))
    if not files:
        raise UserError(f"no .parquet file in {path} or {path / 'data'}; name the folder that holds them")
    shards: dict[str, list[Path]] = {}
    other = []
    for file in sorted(files, key=_natural):
        word = re.match(r"[a-z]*", file.name.lower())
        split = SPLITS.get(word.group() if word else "")
        if split:
            shards.setdefault(split, []).append(file)
        else:
            other.append(file)
    if "train" not in shards:
        raise UserError(f"no train split in {path}: it has {listed(sorted(files))}; name its files train*.parquet")
    for each in shards.values():
        _whole(each)
    shards = {split: shards[split] for split in ("train", "validation", "test") if split in shards}
    return shards, (f"left out {listed(other)} in {path}: no name of a split",) if other else ()


def _whole(files: list[Path]) -> None:
    """Refuse a half downloaded split: 'train-00000-of-00003.parquet' asks for two more files."""
    counts = {match.group(1) for file in files if (match := re.search(r"-of-([0-9]+)\.parquet$", file.name))}
    for count in counts:
        found = [file for file in files if file.name.endswith(f"-of-{count}.parquet")]
        if len(found) != int(count):
            raise UserError(
                f"{files[0].parent} holds {len(found)} of {int(count)} files like {found[0].name}; "
                f"fetch the others, or rename without '-of-{count}' to use a part"
            )


def _natural(file: Path) -> list[str | int]:
    """Sorts train-2 before train-10: text and numbers take turns."""
    return [int(text) if turn % 2 else text for turn, text in enumerate(re.split(r"([0-9]+)", file.name))]


def _head(file: Path) -> _Head:
    try:
        with pq.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({line(error)}); fetch it again") from error
    image, label = (
        next((name for name in names if name in schema.names), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS)
    )
    if image is None or label is None:
        lacks = IMAGE_COLUMNS if image is None else LABEL_COLUMNS
        raise UserError(f"{file}: no column {' or '.join(lacks)} (found {', '.join(schema.names)}); rename it")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{file}: column {image} is {kind}; it must hold the bytes of image files, or a struct of them")
    if not pa.types.is_integer(schema.field(label).type):
        raise UserError(f"{file}: column {label} is {schema.field(label).type}; it must hold integers from 0")
    return _Head(file, rows, image, label, _class_names(file, schema, label))


def _class_names(file: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    """ClassLabel names in the schema's `huggingface` metadata, a list or {"0": name}; None where it has none."""
    try:
        feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][label]
        names = feature.get("names", feature.get("class_label", {}).get("names"))
        if isinstance(names, dict):
            if sorted(map(int, names)) != list(range(len(names))):
                raise ValueError("its class names aren't numbered from 0 without gaps")
            names = [names[key] for key in sorted(names, key=int)]
        return tuple(map(str, names)) if names else None
    except KeyError:
        return None
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: its huggingface metadata is damaged ({line(error)}); write it again") from error


def _part(heads: list[_Head]) -> RawSplit:
    ends = list(accumulate(head.rows for head in heads))
    if not ends[-1]:
        raise UserError(f"no row in {heads[0].file}")

    def place(index: int) -> str:
        shard = bisect_right(ends, index)
        return f"{heads[shard].file}, row {index - ends[shard] + heads[shard].rows}"

    labels = np.concatenate([_labels(head) for head in heads])
    images = decode((data for head in heads for data in _blobs(head)), ends[-1], place)
    return RawSplit(images, labels, place)


def _labels(head: _Head) -> np.ndarray:
    try:
        with pq.ParquetFile(head.file) as opened:
            column = opened.read(columns=[head.label]).column(0)
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{head.file}, row {row}: column {head.label} is null; every row needs a label")
        return column.cast(pa.int64()).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{head.file}: cannot read column {head.label} ({line(error)})") from error


def _blobs(head: _Head) -> Iterator[bytes | None]:
    try:
        with pq.ParquetFile(head.file) as opened:
            for batch in opened.iter_batches(batch_size=1024, columns=[head.image]):
                column = batch.column(0)
                if pa.types.is_struct(column.type):
                    column = column.flatten()[column.type.get_field_index("bytes")]
                yield from column.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{head.file}: cannot read column {head.image} ({line(error)}); fetch it again") from error
