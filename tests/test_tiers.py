"""The two tiers of the tests: the limit of the quick one, and that both together are all tests, each of them once."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiers import REST, SECONDS, call_limit, cpu_seconds, exceeded_limit, longest_files_first

MAKEFILE = Path(__file__).parents[1] / "Makefile"


def test_an_unmarked_test_above_the_limit_fails():
    message = exceeded_limit(call_limit() + 0.1, ["parametrize"])
    assert message is not None
    assert f"took {call_limit() + 0.1:.1f} s of CPU" in message
    assert "mark it slow" in message


@pytest.mark.parametrize("marker", REST)
def test_a_marked_test_has_no_limit(marker):
    assert exceeded_limit(10 * call_limit(), ["parametrize", marker]) is None


def test_a_test_within_the_limit_passes():
    assert exceeded_limit(call_limit(), []) is None


def test_cpu_time_is_counted_and_sleep_is_not(monkeypatch):
    """Sums what the process and its children took in user and in system mode."""
    monkeypatch.setattr("os.times", lambda: type("Times", (), {
        "user": 1.0, "system": 0.5, "children_user": 2.0, "children_system": 0.25, "elapsed": 100.0,
    }))  # fmt: skip
    assert cpu_seconds() == 3.75


def test_both_tiers_together_hold_each_test_once():
    """By the expressions of the Makefile; GPU tests are in neither."""
    quick, rest = (
        re.search(rf'^{name} := "(.+)"$', MAKEFILE.read_text(), re.M).group(1)  # type: ignore[union-attr]
        for name in ("QUICK", "REST")
    )
    for chosen in itertools.product((False, True), repeat=len(REST)):
        markers: dict[str, object] = dict(zip(REST, chosen, strict=True))
        tiers = [bool(eval(expression, {}, markers)) for expression in (quick, rest)]
        assert sum(tiers) == (not markers["gpu"]), markers
        assert tiers[0] == (not any(chosen)), markers


def test_files_whose_slow_tests_take_longest_come_first():
    """Then those with most tests, as a slow file of which only quick tests are left. The order within a file stays."""

    def item(name: str, number: int, marker: str = "") -> Any:
        return SimpleNamespace(path=Path(name), name=number, get_closest_marker=lambda name: name == marker)

    short, long = sorted(["test_jobs.py", "test_kills.py"], key=SECONDS.__getitem__)
    items = [
        item("test_a.py", 0), item("test_b.py", 1), item("test_b.py", 2), item(short, 3, "ray"), item(long, 4, "slow"),
        item(long, 5), item("test_ui.py", 6),
    ]  # fmt: skip
    assert [item_in_order.name for item_in_order in longest_files_first(items)] == [4, 5, 3, 1, 2, 0, 6]


def test_files_with_known_seconds_exist():
    assert set(SECONDS) <= {path.name for path in Path(__file__).parent.rglob("test_*.py")}
