"""Memory that is available, and work that needs more."""

import pytest

from fbpc_ray.core import memory
from fbpc_ray.core.errors import UserError

MEMINFO = "MemTotal: 24000000 kB\nMemAvailable: 18000000 kB\nSwapFree: 500000 kB\nHugePages_Total: 0\n"


def test_a_machine_has_what_it_calls_available_and_free_swap():
    assert memory.of_machine(MEMINFO) == 1024 * 18_500_000
    with pytest.raises(KeyError):
        memory.of_machine("MemTotal: 24000000 kB\n")


def test_a_container_has_what_is_left_below_its_limit():
    statistics = "anon 3000\nfile 900\ninactive_file 500\n"
    assert memory.of_container("10000\n", "4000\n", statistics) == 6500
    assert memory.of_container("max\n", "4000\n", statistics) == float("inf")


def test_the_least_of_machine_and_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available() == float("inf")
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert memory.available() == 1024 * 18_500_000
    for name, text in (("max", "8000000000"), ("current", "2000000000"), ("stat", "inactive_file 1000000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available() == 7e9


def test_this_machine_has_some_memory():
    assert 1e8 < memory.available() <= 1e15


@pytest.mark.parametrize(
    ("count", "text"), [(1, "0.1 GB"), (1.54e9, "1.5 GB"), (1.3e10, "13 GB"), (5.12e11, "510 GB"), (3e12, "3,000 GB")]
)
def test_gigabytes_have_two_digits(count, text):
    assert memory.gigabytes(count) == text


def test_what_cannot_fit_is_one_line(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 16e9)
    memory.require(16e9, "--width 512", "copies", "--width")
    with pytest.raises(UserError) as caught:
        memory.require(17e9, "--width 512", "copies of a network", "--width")
    assert str(caught.value) == (
        "--width 512: copies of a network need about 17 GB of memory, 16 GB are available; lower --width"
    )
