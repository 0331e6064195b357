"""The two tiers of the tests: the quick one, run before each commit, and the rest."""

import os
import sys
from collections.abc import Collection

CALL_LIMIT = 10.0
"""Seconds of CPU that the call of a quick test may take."""
COVERAGE_COST = 3.0
"""How many times longer a call may take while coverage counts its lines."""
REST = ("slow", "ray", "gpu")
"""A test with one of these markers is not in the quick tier."""


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the child processes that it has waited for.

    CPU time, not wall time, is what the tier's limit is about: wall time doubles as soon as a second process shares the
    core, and a test must not fail because of its neighbours. A test that sleeps leaves its core to the other worker.
    """
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def call_limit() -> float:
    """Return the limit in seconds; it is longer while coverage counts the lines of this process."""
    coverage = sys.modules.get("coverage")
    counting = coverage is not None and coverage.Coverage.current() is not None
    return CALL_LIMIT * (COVERAGE_COST if counting else 1.0)


def exceeded_limit(seconds: float, markers: Collection[str]) -> str | None:
    """Return the error message for a quick test that took more than CALL_LIMIT, else None."""
    limit = call_limit()
    if seconds <= limit or any(name in markers for name in REST):
        return None
    return (
        f"took {seconds:.1f} s of CPU, and a test of the quick tier at most {limit:.0f} s; "
        "make it smaller, or mark it slow (tests with that marker run by make test-full)"
    )
