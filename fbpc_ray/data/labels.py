"""Labels in other forms than numbers: names of classes, one-hot rows, and columns of a table."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.splits import listed


class NumberedLabels(NamedTuple):
    """Labels of all splits as class numbers."""

    labels: dict[str, np.ndarray]
    """Labels of each split; those that are neither names nor one-hot rows are as they were."""
    classes: tuple[str, ...] | None
    """Names of the classes; None where neither the source nor the form of the labels says how many there are."""
    notes: tuple[str, ...] = ()


def to_numbers(
    labels: Mapping[str, np.ndarray], origin: object, classes: Sequence[str] | None = None
) -> NumberedLabels:
    """Replace names of classes and one-hot rows by class numbers, and columns (n, 1) by (n,).

    Names are numbered in the order of `classes`, by default all names, sorted. One-hot rows have a value for each
    class, so that a class without an image is noticed.

    Args:
        labels: of each split.

    Raises:
        UserError: only some splits have names, a name is none of `classes`, two names look the same, or one-hot rows
            are not as long as the classes are many.
    """
    labels = {split: _without_column(values) for split, values in labels.items()}
    class_names = _class_names(classes, origin)
    labels, class_names, notes = _from_one_hot_rows(labels, origin, class_names)
    labels, class_names = _number_names(labels, origin, class_names)
    return NumberedLabels(labels, class_names, notes)


def from_one_hot(rows: np.ndarray) -> np.ndarray | None:
    """Return the class numbers (n,) int64 of rows (n, d), each a single 1 among 0; None where they aren't such."""
    if rows.ndim != 2 or rows.shape[1] < 2 or not (rows.dtype == bool or np.issubdtype(rows.dtype, np.number)):
        return None
    if not np.isin(rows, (0, 1)).all() or (np.count_nonzero(rows, axis=1) != 1).any():
        return None
    return rows.argmax(1).astype(np.int64)


def _without_column(values: np.ndarray) -> np.ndarray:
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _class_names(classes: Sequence[str] | None, origin: object) -> tuple[str, ...] | None:
    """Return the names as texts. Raises UserError for what has no order, such as a set, or is one text."""
    if classes is None:
        return None
    if isinstance(classes, str | bytes | set | frozenset | Mapping) or not hasattr(classes, "__iter__"):
        raise UserError(
            f"{origin}: classes is a {type(classes).__name__}; it must be a list of names in the order of the labels"
        )
    return tuple(map(str, classes))


def _from_one_hot_rows(
    labels: dict[str, np.ndarray], origin: object, classes: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None, tuple[str, ...]]:
    """Replace one-hot rows by numbers; without `classes`, the columns are the classes."""
    numbers = {split: values for split, rows in labels.items() if (values := from_one_hot(rows)) is not None}
    if not numbers:
        return labels, classes, ()
    widths = {split: labels[split].shape[1] for split in numbers}
    if len(set(widths.values())) > 1:
        texts = (f"{split} {width}" for split, width in widths.items())
        raise UserError(
            f"{origin}: one-hot labels have different numbers of columns ({listed(texts)}); make them agree"
        )
    width = next(iter(widths.values()))
    if classes is None:
        classes = tuple(map(str, range(width)))
    if len(classes) != width:
        raise UserError(
            f"{origin}: one-hot labels of {listed(numbers)} have {width} columns, but there are {len(classes)} "
            "classes; make them agree"
        )
    note = f"{origin}: labels of {listed(numbers)} are one-hot, read as the numbers of {width} classes"
    return labels | numbers, classes, (note,)


def _number_names(
    labels: dict[str, np.ndarray], origin: object, classes: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Replace names by numbers in the order of `classes`, by default all names, sorted."""
    named = [split for split, values in labels.items() if values.ndim == 1 and values.dtype.kind == "U"]
    if not named:
        return labels, classes
    if len(named) < len(labels):
        others = listed(split for split in labels if split not in named)
        raise UserError(f"{origin}: labels of {listed(named)} are names, those of {others} are not; use one form")
    names = sorted({name for values in labels.values() for name in np.unique(values).tolist()})
    if len({unicodedata.normalize("NFC", name) for name in names}) < len(names):
        raise UserError(f"{origin}: two class names differ only in Unicode form (NFC, NFD); write both in one form")
    numbers = {name: number for number, name in enumerate(classes or names)}
    if unknown := [name for name in names if name not in numbers]:
        raise UserError(f"{origin}: label {unknown[0]!r} is none of the classes ({listed(numbers)}); correct it")
    numbered = {}
    for split, values in labels.items():
        unique, inverse = np.unique(values, return_inverse=True)
        numbered[split] = np.array([numbers[name] for name in unique.tolist()], np.int64)[inverse]
    return numbered, classes or tuple(names)
