"""Which rows are one-hot labels."""

import numpy as np
import pytest

from fbpc_ray.data.labels import from_one_hot


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float32])
def test_a_single_1_in_each_row_is_its_class(kind):
    numbers = from_one_hot(np.array([[0, 0, 1], [1, 0, 0], [0, 0, 1]], kind))
    assert numbers is not None and numbers.dtype == np.int64
    assert numbers.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    "rows",
    [[[0, 1], [1, 1]], [[0, 1], [0, 0]], [[0, 1], [2, -1]], [[0, 1], [0.5, 0.5]], [[1], [1]], [0, 1], [["1", "0"]]],
)
def test_other_rows_are_none(rows):
    """One bad row is enough."""
    assert from_one_hot(np.array(rows)) is None
