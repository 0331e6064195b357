"""One NumPy archive with the arrays of each split."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.conversion import to_split
from fbpc_ray.data.labels import to_numbers
from fbpc_ray.data.raw import RawDataset, check_is_not_pointer, line
from fbpc_ray.data.splits import listed

NPZ_KEYS = {
    "train": (
        ("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("X_train", "y_train"),
        ("images", "targets"), ("imgs", "labels"), ("data", "labels"), ("data", "targets"),
    ),
    "validation": (
        ("x_val", "y_val"), ("val_images", "val_labels"), ("X_val", "y_val"), ("x_valid", "y_valid"),
        ("valid_images", "valid_labels"), ("X_valid", "y_valid"), ("x_validation", "y_validation"),
        ("validation_images", "validation_labels"), ("X_validation", "y_validation"),
    ),
    "test": (("x_test", "y_test"), ("test_images", "test_labels"), ("X_test", "y_test")),
}  # fmt: skip
"""Split -> names of (images, labels); the first pair that the file has."""


def npz(path: Path) -> RawDataset:
    """Read arrays of one NumPy file, see NPZ_KEYS; images NHWC, NCHW or NHW, integers 0..255 or floats in [0, 1].

    Labels are integers from 0, names of classes, or one-hot rows (n, d). Raises UserError.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give npz:FILE, or folder:{path} for folders of images")
    try:
        with path.open("rb") as file:
            check_is_not_pointer(path, file.read(64))
            if not zipfile.is_zipfile(file):
                raise ValueError("not a whole archive of numpy.savez")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            pairs = {split: pair for split, known in NPZ_KEYS.items() if (pair := _pair(known, archive.files))}
            keys = [key for pair in pairs.values() for key in pair]
            missing = [key for key in keys if key not in archive]
            if "train" not in pairs or missing:
                raise UserError(
                    f"{path}: no array {', '.join(missing) or 'x_train'} (found {', '.join(archive.files) or 'none'}); "
                    "save x_train, y_train, x_test, y_test with numpy.savez"
                )
            images, labels = ({split: archive[pair[at]] for split, pair in pairs.items()} for at in (0, 1))
            left_out = sorted(set(archive.files) - set(keys))
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails in any way
        raise UserError(f"{path}: not a readable npz file of plain arrays ({line(error)}); save it again") from error
    notes = (f"{path}: left out the arrays {listed(left_out)}",) if left_out else ()
    numbered = to_numbers(labels, path)
    parts = {split: to_split(str(path), pairs[split], images[split], numbered.labels[split]) for split in pairs}
    return RawDataset(str(path), numbered.classes, parts, notes + numbered.notes)


def _pair(known: Sequence[tuple[str, str]], names: Sequence[str]) -> tuple[str, str] | None:
    """Return the first pair of which both arrays are there, else the first of which the images are."""
    both = next((pair for pair in known if set(pair) <= set(names)), None)
    return both or next((pair for pair in known if pair[0] in names), None)
