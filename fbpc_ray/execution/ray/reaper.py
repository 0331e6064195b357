"""End the processes of a Ray cluster of ours that outlive a killed driver.

Ray's agents notice that their parent is gone, report it to the cluster's head, and wait forever for its answer if it is
gone, too. So a small process waits for the driver's end and then kills them.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import os, signal, sys, time
words = sys.stdin.readline().split()
if sys.stdin.readline():
    sys.exit()
time.sleep(2)
for pid, started in zip(words[::2], words[1::2]):
    try:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rsplit(")", 1)[1].split()[19] == started:
                os.kill(int(pid), signal.SIGKILL)
    except OSError:
        pass
"""
"""Reads pids and their start times. A second line dismisses it; the end of the file, the driver's, makes it kill."""


class Reaper:
    """Knows the processes of a cluster that this process started. Works where there is /proc, on Linux."""

    def __init__(self, node: Any):
        """Start the process that waits. `node` is Ray's record of the processes it started."""
        roots = [info.process.pid for infos in node.all_processes.values() for info in infos] if node else []
        self._processes = {pid: started for root in roots for pid, started in _family(root)}
        self._waiting = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", SCRIPT], stdin=subprocess.PIPE, start_new_session=True, text=True
        )
        assert self._waiting.stdin
        with contextlib.suppress(OSError):
            self._waiting.stdin.write(" ".join(f"{pid} {started}" for pid, started in self._processes.items()) + "\n")
            self._waiting.stdin.flush()

    def reap(self) -> None:
        """Kill the processes that are left."""
        for pid, started in self._processes.items():
            if _started(pid) == started:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def dismiss(self) -> None:
        """End the process that waits."""
        assert self._waiting.stdin
        if self._waiting.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._waiting.stdin.write("done\n")
            self._waiting.stdin.close()
        self._waiting.wait()


def _family(pid: int) -> list[tuple[int, str]]:
    """Return (pid, start time) of a process and of its children; none where there is no /proc."""
    family = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            family += map(int, task.read_text().split())
    return [(each, started) for each in family if (started := _started(each))]


def _started(pid: int) -> str:
    """Return the start time of a process, which tells it from a later one of the same pid; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""
