"""End the processes of a Ray cluster of ours that outlive a killed driver.

Ray's agents notice that their parent is gone, report it to the cluster's head, and wait forever for its answer if it is
gone, too. So a small process, this file run as a script, waits for the driver's end and then kills them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

AFTER_SECONDS = 2.0
"""From the driver's end until what is left is killed."""


class Reaper:
    """Knows the processes of a cluster that this process started. Works where there is /proc, on Linux."""

    def __init__(self, node: Any):
        """Start the process that waits. `node` is Ray's record of the processes it started."""
        roots = [info.process.pid for infos in node.all_processes.values() for info in infos] if node else []
        self._processes = {pid: started for root in roots for pid, started in _family(root)}
        self._waiting = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True, text=True
        )
        assert self._waiting.stdin
        with contextlib.suppress(OSError):
            self._waiting.stdin.write(" ".join(f"{pid} {started}" for pid, started in self._processes.items()) + "\n")
            self._waiting.stdin.flush()

    def reap(self) -> None:
        """Kill the processes that are left."""
        _kill(self._processes)

    def dismiss(self) -> None:
        """End the process that waits."""
        assert self._waiting.stdin
        if self._waiting.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._waiting.stdin.write("done\n")
            self._waiting.stdin.close()
        self._waiting.wait()


def main() -> None:
    """Read pids and start times from standard input; a second line dismisses, its end, the driver's, makes it kill."""
    words = sys.stdin.readline().split()
    if not sys.stdin.readline():
        time.sleep(AFTER_SECONDS)
        _kill(dict(zip(map(int, words[::2]), words[1::2], strict=True)))


def _kill(processes: dict[int, str]) -> None:
    """Kill those of the processes, by pid and start time, that still run."""
    for pid, started in processes.items():
        if _started(pid) == started:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[tuple[int, str]]:
    """Return (pid, start time) of a process and of its children; none where there is no /proc."""
    family = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            family += map(int, task.read_text().split())
    return [(member, started) for member in family if (started := _started(member))]


def _started(pid: int) -> str:
    """Return the start time of a process, which tells it from a later one of the same pid; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


if __name__ == "__main__":
    main()
