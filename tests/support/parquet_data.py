"""What `--data parquet:PATH` makes of a folder or a file."""

from functools import partial
from pathlib import Path

from support import errors

from fbpc_ray.data.datasets import Dataset, load


def read(path: Path) -> Dataset:
    return load(f"parquet:{path}")


refusal = partial(errors.refusal, read)
"""The line that refuses what `read` is given."""
