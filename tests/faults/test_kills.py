"""Drivers that are hit at random moments end with the bits of an undisturbed one: jobs/kill_driver.py, short."""

import pytest
from support.kills import kill_drivers

pytestmark = pytest.mark.slow


def test_runs_hit_at_random_moments_end_with_the_same_bits(tmp_path):
    *_, report = kill_drivers(tmp_path, kills=8, seed=1)
    assert report.faults == []
    assert sum(report.hits.values()) >= 8
