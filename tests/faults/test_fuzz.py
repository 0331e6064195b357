"""Files damaged at random are refused in one line, or give the right value: jobs/fuzz.py, with FBPC_FUZZ files each."""

import json
import os
import warnings

import pytest
from support.fuzz import Counts, all_readers, fuzz, write_report


@pytest.mark.slow
def test_damaged_files_are_refused_in_one_line_or_give_the_right_value(tmp_path):
    count = int(os.environ.get("FBPC_FUZZ", "200"))
    with warnings.catch_warnings(action="ignore"):  # of Pillow, about the images
        counts = {reader.name: fuzz(reader, count, seed=1) for reader in all_readers(tmp_path)}
    assert {name: tally.as_json() for name, tally in counts.items() if tally.faults} == {}
    assert all(tally.tried == count for tally in counts.values())
    assert all(tally.refused > count / 10 for name, tally in counts.items() if name != "cached trajectory")


def test_a_report_of_some_readers_keeps_the_others_each_with_its_commit(tmp_path):
    path = tmp_path / "fuzz.json"
    write_report(path, 0, {"a": Counts(tried=2), "b": Counts(tried=2)}, {"commit": "old"})
    write_report(path, 1, {"b": Counts(tried=3)}, {"commit": "new"}, keep=True)
    report = json.loads(path.read_text())
    assert {name: (tally["tried"], tally["commit"]) for name, tally in report["readers"].items()} == {
        "a": (2, "old"), "b": (3, "new"),
    }  # fmt: skip
    assert report["runs"] == {"old": {"seed": 0, "commit": "old"}, "new": {"seed": 1, "commit": "new"}}
    write_report(path, 2, {"c": Counts(tried=1)}, {"commit": "new"})
    assert json.loads(path.read_text())["readers"].keys() == {"c"}
