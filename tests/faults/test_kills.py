"""Runs that are hit at random moments end with the bits of an undisturbed one: jobs/kill_runs.py, short."""

import shutil
import tempfile
from pathlib import Path

import pytest
from support.kills import hit_driver, hit_ray, hit_runs

pytestmark = pytest.mark.slow


def test_runs_whose_driver_is_hit_end_with_the_same_bits(tmp_path):
    *_, report = hit_runs(tmp_path, 6, 1, hit_driver)
    assert report.faults == []
    assert sum(report.hits.values()) >= 6


@pytest.mark.ray
def test_runs_whose_ray_processes_are_killed_end_with_the_same_bits():
    folder = Path(tempfile.mkdtemp(prefix="fk", dir="/tmp"))  # Ray's sockets need a short path
    *_, report = hit_runs(folder, 2, 1, hit_ray, backend="ray", address="local", device="cpu")
    assert report.faults == []
    assert sum(report.hits.values()) >= 2
    shutil.rmtree(folder)
