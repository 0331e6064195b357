"""Files damaged at random are refused in one line, or give the right value: jobs/fuzz.py, with FBPC_FUZZ files each."""

import os
import warnings

import pytest
from support.fuzz import all_readers, fuzz

pytestmark = pytest.mark.slow


def test_damaged_files_are_refused_in_one_line_or_give_the_right_value(tmp_path):
    count = int(os.environ.get("FBPC_FUZZ", "200"))
    with warnings.catch_warnings(action="ignore"):  # of Pillow, about the images
        counts = {reader.name: fuzz(reader, count, seed=1) for reader in all_readers(tmp_path)}
    assert {name: each.as_json() for name, each in counts.items() if each.faults} == {}
    assert all(each.tried == count for each in counts.values())
    assert all(each.refused > count / 10 for name, each in counts.items() if name != "cached trajectory")
