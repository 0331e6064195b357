"""Seconds of a command by phase."""

import pytest

from fbpc_ray.core import phases


def test_phases_follow_each_other(monkeypatch):
    """A name that comes twice has the sum; what took less than a second counts in the total alone."""
    clock = iter([100.0, 107.0, 107.4, 129.0, 130.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    phases.begin()
    measured = phases.Phases()
    for name in ("start", "data", "experts", "start"):
        measured.end(name)
    assert measured.seconds == pytest.approx({"start": 8.0, "data": 0.4, "experts": 21.6})
    assert measured.describe() == "30 s: start 8 s, experts 22 s"


def test_a_command_without_phases():
    assert phases.Phases().describe() == "under a second"
