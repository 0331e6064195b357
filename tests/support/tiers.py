"""The two tiers of the tests: the quick one, run before each commit, and the rest."""

import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

CALL_LIMIT = 20.0
"""Seconds of CPU that the call of a quick test may take. It should take half: busy cores need more for the same."""
COVERAGE_COST = 3.0
"""How many times longer a call may take while coverage counts its lines."""
REST = ("slow", "ray", "gpu")
"""A test with one of these markers is not in the quick tier."""
SECONDS = {
    "test_machine_faults.py": 240, "test_kills.py": 190, "test_reproduce.py": 180, "test_ray_backend.py": 170,
    "test_sweeps_on_ray.py": 145, "test_jobs.py": 140, "test_benchmark.py": 140, "test_ui.py": 120, "test_docs.py": 100,
    "test_faults.py": 90, "test_chains.py": 70, "test_passes.py": 65, "test_stored_runs.py": 65, "test_database.py": 60,
    "test_interrupted_runs.py": 55, "test_tracking_servers.py": 55, "test_examples.py": 55, "test_custom.py": 50,
    "test_expert_processes.py": 50, "test_model_export.py": 45, "test_legacy.py": 40,
}  # fmt: skip
"""File -> about how many seconds its tests of the rest take on one core, where that is more than 30."""


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the child processes that it has waited for.

    CPU time, not wall time, is what the tier's limit is about: wall time doubles as soon as a second process shares the
    core, and a test must not fail because of its neighbours, which cost CPU time too, but less. A test that sleeps
    leaves its core to the other worker.
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


def longest_files_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Order tests by file: those that take longest first, then those with most tests.

    A worker of pytest-xdist takes the next file whenever it runs out of tests: a long one that begins last would leave
    the other workers idle. Order within a file stays as it is.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def cost(path: Path) -> tuple[int, int]:
        in_rest = any(item.get_closest_marker(name) for item in files[path] for name in REST)
        return SECONDS.get(path.name, 0) if in_rest else 0, len(files[path])

    return [item for path in sorted(files, key=cost, reverse=True) for item in files[path]]
