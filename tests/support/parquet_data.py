"""What `--data parquet:PATH` makes of a folder or a file."""

from pathlib import Path

import pytest

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import Dataset, load


def read(path: Path) -> Dataset:
    return load(f"parquet:{path}")


def refusal(path: Path) -> str:
    """The one line of the error."""
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
