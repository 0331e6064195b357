"""One NumPy archive with the arrays of each split."""

from pathlib import Path

import numpy as np

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.conversion import to_split
from fbpc_ray.data.raw import RawDataset, check_is_not_pointer, line
from fbpc_ray.data.splits import listed

NPZ_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels")),
    "validation": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def npz(path: Path) -> RawDataset:
    """Arrays of one NumPy file, see NPZ_KEYS; images NHWC, NCHW or NHW, integers 0..255 or floats in [0, 1]."""
    try:
        with path.open("rb") as file:
            check_is_not_pointer(path, file.read(64))
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("one array, not an archive")
            pairs = {split: next((p for p in known if p[0] in archive), None) for split, known in NPZ_KEYS.items()}
            missing = [key for pair in pairs.values() if pair for key in pair if key not in archive]
            if not pairs["train"] or missing:
                raise UserError(
                    f"{path}: no array {', '.join(missing) or 'x_train'} (found {', '.join(archive.files) or 'none'}); "
                    "save x_train, y_train, x_test, y_test with numpy.savez"
                )
            found = {split: (pair, archive[pair[0]], archive[pair[1]]) for split, pair in pairs.items() if pair}
            left_out = sorted(set(archive.files) - {key for pair in pairs.values() if pair for key in pair})
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails in any way
        raise UserError(f"{path}: not a readable npz file of plain arrays ({line(error)}); save it again") from error
    notes = (f"{path}: left out the arrays {listed(left_out)}",) if left_out else ()
    return RawDataset(str(path), None, {split: to_split(str(path), *each) for split, each in found.items()}, notes)
