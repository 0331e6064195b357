"""Memory that this process can still get, and the refusal of work that needs more."""

import sys
from pathlib import Path

from fbpc_ray.core.errors import UserError

PROC, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available() -> float:
    """Return the bytes that this process can still get; infinity where the system doesn't tell.

    That is the free memory of the machine, with what it can drop or swap out, or less in a container with a limit.
    """
    if not sys.platform.startswith("linux"):
        return float("inf")
    try:
        machine = of_machine(PROC.read_text())
    except (OSError, ValueError, KeyError):
        return float("inf")
    try:
        names = ("memory.max", "memory.current", "memory.stat")
        return min(machine, of_container(*((CGROUP / name).read_text() for name in names)))
    except (OSError, ValueError, KeyError):  # no container, or cgroup v1
        return machine


def of_machine(meminfo: str) -> float:
    """Return the bytes that /proc/meminfo calls available, and free swap. Raises ValueError or KeyError."""
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in meminfo.splitlines())}
    return 1024.0 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0))


def of_container(most: str, current: str, statistics: str) -> float:
    """Return the bytes left below a cgroup's limit, by its files. Raises ValueError or KeyError.

    Files that were read count to the limit, but the system drops those that are inactive.
    """
    if most.strip() == "max":
        return float("inf")
    counters = dict(line.split() for line in statistics.splitlines())
    return float(int(most) - int(current) + int(counters["inactive_file"]))


def gigabytes(count: float) -> str:
    """Write bytes as gigabytes with two digits, at least 0.1: 512 GB, 1.5 GB."""
    value = max(count / 1e9, 0.1)
    return f"{float(f'{value:.2g}'):,.0f} GB" if value >= 10 else f"{value:.1f} GB"


def require(count: float, setting: str, need: str, lower: str) -> None:
    """Raise UserError if `count` bytes are more than what is available.

    Args:
        setting: the flag that is too large, with its value: `--width 8192`.
        need: what needs the memory.
        lower: the flags of which one must be lowered.
    """
    if count > (free := available()):
        raise UserError(
            f"{setting}: {need} need about {gigabytes(count)} of memory, {gigabytes(free)} are available; lower {lower}"
        )
