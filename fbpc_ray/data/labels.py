"""Labels in other forms than numbers: names of classes, and one-hot rows."""

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.splits import listed


def from_one_hot(rows: np.ndarray) -> np.ndarray | None:
    """Return the class numbers (n,) int64 of rows (n, d), each a single 1 among 0; None where they aren't such."""
    if rows.ndim != 2 or rows.shape[1] < 2 or not (rows.dtype == bool or np.issubdtype(rows.dtype, np.number)):
        return None
    if not np.isin(rows, (0, 1)).all() or (np.count_nonzero(rows, axis=1) != 1).any():
        return None
    return rows.argmax(1).astype(np.int64)


def is_names(labels: np.ndarray) -> bool:
    """Return whether labels are names of classes."""
    return labels.ndim == 1 and labels.dtype.kind == "U"


def number_names(
    labels: Mapping[str, np.ndarray], origin: object, classes: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Replace names of classes by numbers in the order of `classes`, by default all names, sorted.

    Args:
        labels: of each split.

    Returns:
        Labels of each split, and the classes; labels that are no names, as they are, with `classes`.

    Raises:
        UserError: only some splits have names, a name is none of `classes`, or two names look the same.
    """
    class_names = tuple(map(str, classes)) if classes is not None else None
    named = [split for split, values in labels.items() if is_names(values)]
    if not named:
        return dict(labels), class_names
    if len(named) < len(labels):
        others = listed(split for split in labels if split not in named)
        raise UserError(f"{origin}: labels of {listed(named)} are names, those of {others} are not; use one form")
    names = sorted({name for values in labels.values() for name in np.unique(values).tolist()})
    if len({unicodedata.normalize("NFC", name) for name in names}) < len(names):
        raise UserError(f"{origin}: two class names differ only in Unicode form (NFC, NFD); write both in one form")
    numbers = {name: number for number, name in enumerate(class_names or names)}
    if unknown := [name for name in names if name not in numbers]:
        raise UserError(f"{origin}: label {unknown[0]!r} is none of the classes ({listed(numbers)}); correct it")
    numbered = {}
    for split, values in labels.items():
        unique, inverse = np.unique(values, return_inverse=True)
        numbered[split] = np.array([numbers[name] for name in unique.tolist()], np.int64)[inverse]
    return numbered, class_names or tuple(names)
