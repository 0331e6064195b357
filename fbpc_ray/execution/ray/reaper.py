"""End the processes of a Ray cluster of ours that outlive it, or a killed driver.

Ray's agents notice that their parent is gone, report it to the cluster's head, and wait forever for its answer if it is
gone, too. Processes start late, change their parent, and overwrite their environment with a title; but each writes to a
log in the folder of the cluster's session, whose name ends with the driver's pid. A small process, this file run as a
script, waits for the driver's end and then kills those that do.
"""

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

AFTER_SECONDS = 2.0
"""From the driver's end until what is left is killed."""
ROUNDS = 20
"""Searches for processes: one that is killed may just have started another."""


class Reaper:
    """Kills the processes of the cluster that this process starts. Works where there is /proc, on Linux."""

    def __init__(self):
        """Start the process that waits."""
        self._waiting = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())], stdin=subprocess.PIPE, start_new_session=True
        )

    def reap(self) -> None:
        """Kill the processes of the cluster."""
        _kill(os.getpid())

    def dismiss(self) -> None:
        """End the process that waits."""
        assert self._waiting.stdin
        if self._waiting.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._waiting.stdin.write(b"done\n")
        with contextlib.suppress(OSError):
            self._waiting.stdin.close()
        self._waiting.wait()


def main() -> None:
    """Wait on standard input: a line dismisses, its end, the driver's, makes it kill. Argument: the driver's pid."""
    if not sys.stdin.readline():
        time.sleep(AFTER_SECONDS)
        _kill(int(sys.argv[1]))


def _kill(driver: int) -> None:
    for _ in range(ROUNDS):
        pids = _of_session(driver)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.05)


def _of_session(driver: int) -> list[int]:
    """Return the processes that write to a file of the driver's Ray session; one that only reads it is the user's."""
    session = re.compile(rf"/session_[^/]+_{driver}/")
    pids = set()
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if session.search(str(path.readlink())) and path.lstat().st_mode & stat.S_IWUSR:
                pids.add(int(path.parts[2]))
    return sorted(pids - {driver})


if __name__ == "__main__":
    main()
