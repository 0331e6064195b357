"""Load a data set by its name, as --data takes it, or from the images and labels of a Python caller."""

import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

from fbpc_ray.core import settings
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import arrays, datasets
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.data.resize import Resizing


def load(train: Any, test: Any, validation: Any, classes: Sequence[str] | None, options: settings.Data) -> Dataset:
    """Read named data, or convert images and labels.

    Args:
        train: a name, a path, or a split as `arrays.read` takes it.
        test: a split, or a share of each class of train; None: a fifth.
        validation: a split, or a share of each class of train.
        classes: names in the order of the labels.
        options: `data` is the name of the user's own images; their shares are `test` and `validation` instead.

    Raises:
        UserError: an argument or a file is wrong.
    """
    if isinstance(train, Dataset):
        raise UserError(f"{arrays.ORIGIN}: train is a data set already; use it as it is")
    test_split, test_share = _split_or_share(test)
    validation_split, validation_share = _split_or_share(validation)
    if isinstance(train, str | os.PathLike):
        name = os.fspath(train)
        if test_split is not None or validation_split is not None or classes is not None:
            raise UserError(f"{name} brings its test images and classes: leave out test and classes")
        return datasets.load(
            name, root=options.data_root, download=options.download, normalisation=options.normalisation,
            validation=validation_share, seed=options.data_seed, label_column=options.label_column,
            image_column=options.image_column, image_size=options.image_size, resize=options.resize, test=test_share,
        )  # fmt: skip
    if options.label_column or options.image_column:
        raise UserError("--label-column, --image-column: only parquet:PATH has columns; leave them out")
    resizing = Resizing(options.image_size, options.resize)
    resizing.check()
    source = arrays.read(train, test_split, validation_split, classes, resizing)
    shares = validation_share, options.data_seed, test_share
    return datasets.assemble(source, options.data, options.normalisation, *shares)


def _split_or_share(value: Any) -> tuple[Any, float]:
    """Return (split, 0) or (None, share); None stands for neither."""
    return (None, float(value)) if isinstance(value, Real) else (value, 0.0)
