"""Read Parquet files in the layout of Hugging Face's hub; shards.py finds the files of a split."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.image_cache import cached
from fbpc_ray.data.images import decode
from fbpc_ray.data.labels import from_one_hot, to_numbers
from fbpc_ray.data.raw import RawDataset, RawSplit, check_is_not_pointer, line
from fbpc_ray.data.resize import UNCHANGED, Resizing
from fbpc_ray.data.shards import check_is_not_saved_to_disk, find_shards
from fbpc_ray.data.splits import listed

IMAGE_COLUMNS = ("img", "image", "imgs", "images")
LABEL_COLUMNS = ("label", "fine_label", "labels", "target", "targets", "class", "classes")
"""Usual names; of several the first one that a file has."""
MAX_NAME = 200
"""Characters of a class name."""


class Columns(NamedTuple):
    """Names of the columns to read; empty: the usual ones."""

    image: str = ""
    label: str = ""


USUAL_COLUMNS = Columns()


def parquet(path: Path, columns: Columns = USUAL_COLUMNS, resizing: Resizing = UNCHANGED) -> RawDataset:
    """Read Parquet in Hugging Face layout: PATH or PATH/data with train-*, test-*, valid-* files, or one file.

    A column of IMAGE_COLUMNS (bytes of a file, or a struct with `bytes`) and one of LABEL_COLUMNS, or those of
    `columns`. Labels are integers from 0, names of classes, or one-hot lists. Raises UserError.
    """
    check_is_not_saved_to_disk(path)
    shards, notes = find_shards(path)
    heads = {split: [_head(file, columns) for file in files] for split, files in shards.items()}
    first = heads["train"][0]
    names = _check_agreement([head for group in heads.values() for head in group])
    if first.other_labels and not columns.label:
        notes += (f"{path}: labels are of the column {first.label}, not of {', '.join(first.other_labels)}",)
    labels, classes, more = to_numbers({split: _all_labels(group) for split, group in heads.items()}, path, names)
    parts = {split: _part(group, labels[split], resizing) for split, group in heads.items()}
    return RawDataset(str(path), classes, parts, notes + more)


def _check_agreement(heads: "list[_Head]") -> tuple[str, ...] | None:
    """Return the class names of the files, None where none has them. Raises UserError where two files differ."""
    first = heads[0]
    for head in heads[1:]:
        if head.form != first.form:
            raise UserError(
                f"{first.file} has {first.form} as labels, {head.file} {head.form}; use one form in all files"
            )
        if head.label != first.label:
            raise UserError(
                f"{first.file} has the column {first.label}, {head.file} {head.label}: their labels don't mean "
                "the same; give all files one column of labels"
            )
    named = [head for head in heads if head.classes]
    for head in named[1:]:
        if head.classes != named[0].classes:
            raise UserError(
                f"{named[0].file} and {head.file} name different classes: their labels don't mean the same; "
                "write both with the same names"
            )
    return named[0].classes if named else None


class _Head(NamedTuple):
    """Schema and columns of one Parquet file."""

    file: Path
    rows: int
    image: str
    label: str
    form: str
    """integers | names | one-hot lists."""
    classes: tuple[str, ...] | None
    other_labels: tuple[str, ...] = ()
    """Further columns of LABEL_COLUMNS, which are not read."""


def _head(file: Path, columns: Columns) -> _Head:
    with file.open("rb") as raw:
        check_is_not_pointer(file, raw.read(64))
    try:
        with pq.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({line(error)}); download it again") from error
    image_names = (columns.image,) if columns.image else IMAGE_COLUMNS
    label_names = (columns.label,) if columns.label else LABEL_COLUMNS
    image = _column(file, schema.names, image_names, "--image-column")
    label = _column(file, schema.names, label_names, "--label-column")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise UserError(
            f"{file}: column {image} is {kind}; it must hold the bytes of image files, or a struct of them; write it "
            "again, or name another column with --image-column"
        )
    if not (form := _form(schema.field(label).type)):
        raise UserError(
            f"{file}: column {label} is {schema.field(label).type}; it must hold integers from 0, names of classes, or "
            "one-hot lists; cast it, or name another column with --label-column"
        )
    others = tuple(name for name in LABEL_COLUMNS if name in schema.names and name != label)
    return _Head(file, rows, image, label, form, _class_names(file, schema, label), others)


def _column(file: Path, columns: Sequence[str], names: Sequence[str], flag: str) -> str:
    """Return the first of `names` among `columns`. Raises UserError if there is none, or more than one of it."""
    name = next((name for name in names if name in columns), None)
    if name is None:
        raise UserError(
            f"{file}: no column {' or '.join(names)} (found {listed(columns, 20)}); name the column with {flag}"
        )
    if columns.count(name) > 1:
        raise UserError(f"{file}: has {columns.count(name)} columns {name}; rename all but one")
    return name


def _form(kind: Any) -> str:
    """Return the form of labels of a type; "" for a type that holds no labels."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return "integers"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "names"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
        numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        return "one-hot lists" if numbers else ""
    return ""


def _class_names(file: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    """Return ClassLabel names of the schema's `huggingface` metadata, a list or {"0": name}; None without."""
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
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: its huggingface metadata is damaged ({line(error)}); write it again") from error


def _part(heads: list[_Head], labels: np.ndarray, resizing: Resizing) -> RawSplit:
    ends = list(accumulate(head.rows for head in heads))
    if not ends[-1]:
        raise UserError(f"{heads[0].file}: has no row; write it again, or remove it")

    def place(index: int) -> str:
        shard = bisect_right(ends, index)
        return f"{heads[shard].file}, row {index - ends[shard] + heads[shard].rows}"

    origin = str(heads[0].file if len(heads) == 1 else heads[0].file.parent)

    def decoded() -> tuple[np.ndarray, tuple[str, ...]]:
        return decode((data for head in heads for data in _blobs(head)), ends[-1], place, origin, resizing)

    images, notes = cached(decoded, [head.file for head in heads], heads[0].image, ends[-1], origin, resizing)
    return RawSplit(images, labels, place, notes)


def _all_labels(heads: list[_Head]) -> np.ndarray:
    """Return the labels of the files of a split: numbers (n,), names (n,) or one-hot rows (n, d)."""
    parts = [_labels(head) for head in heads]
    parts = [values for values in parts if len(values)] or parts[:1]
    if len({values.shape[1:] for values in parts}) > 1:
        raise UserError(f"{heads[0].file.parent}: the one-hot lists of its files differ in length; make them agree")
    return np.concatenate(parts)


def _labels(head: _Head) -> np.ndarray:
    try:
        with pq.ParquetFile(head.file) as opened:
            column = opened.read(columns=[head.label]).column(0)
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{head.file}, row {row}: column {head.label} is null; every row needs a label")
        if column.type == pa.uint64():
            large = np.flatnonzero(column.to_numpy() > np.iinfo(np.int64).max)
            if len(large):
                raise UserError(f"{head.file}, row {large[0]}: label {column[int(large[0])]} is too large; correct it")
        if head.form == "names":
            return _names(head, column.to_pylist())
        if head.form == "one-hot lists":
            return _one_hot(head, column.to_pylist())
        return column.cast(pa.int64()).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{head.file}: cannot read column {head.label} ({line(error)})") from error


def _names(head: _Head, values: list[str]) -> np.ndarray:
    """Return names of classes as an array. Raises UserError for texts that are none."""
    longest = max(values, key=len, default="")
    if len(longest) > MAX_NAME:
        raise UserError(
            f"{head.file}: column {head.label} holds texts of up to {len(longest):,} characters "
            f"({longest[:20]!r}...), which are not class names; name another column with --label-column"
        )
    return np.array(values, np.str_)


def _one_hot(head: _Head, rows: list[list[Any]]) -> np.ndarray:
    """Return one-hot lists as rows (n, d). Raises UserError for the first list that is none."""
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]) or from_one_hot(np.array([row])) is None:
            raise UserError(
                f"{head.file}, row {number}: column {head.label} holds {str(row)[:40]}, not one-hot (a single 1 among "
                "0, as many values in each row); write class numbers"
            )
    return np.array(rows, np.int64)


def _blobs(head: _Head) -> Iterator[bytes | None]:
    try:
        with pq.ParquetFile(head.file) as opened:
            for batch in opened.iter_batches(batch_size=1024, columns=[head.image]):
                column = batch.column(0)
                if pa.types.is_struct(column.type):
                    _check_embedded(head, column)
                    column = column.flatten()[column.type.get_field_index("bytes")]
                yield from column.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{head.file}: cannot read column {head.image} ({line(error)}); download it again") from error


def _check_embedded(head: _Head, column: Any) -> None:
    """Refuse a column of {bytes: null, path: ...}: the file names images that lie elsewhere."""
    if column.type.get_field_index("path") < 0 or not len(column):
        return
    first = column[0].as_py() or {}
    if first.get("bytes") is None and first.get("path"):
        raise UserError(
            f"{head.file}: column {head.image} holds paths ({first['path']}), not the bytes of images; "
            "write it again with dataset.with_format('arrow').map(embed_table_storage, batched=True), or push_to_hub"
        )
