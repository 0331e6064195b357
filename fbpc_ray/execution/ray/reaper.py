"""End the processes of a Ray cluster of ours that outlive it, or a killed driver.

Ray's agents notice that their parent is gone, report it to the cluster's head, and wait forever for its answer if it is
gone, too. Processes start and change their parent at any moment, so they are known by an environment variable that all
of the cluster inherit. A small process, this file run as a script, waits for the driver's end and then kills them.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "FBPC_RAY_CLUSTER"
AFTER_SECONDS = 2.0
"""From the driver's end until what is left is killed."""
ROUNDS = 20
"""Searches for processes: one that is killed may just have started another."""


class Reaper:
    """Kills the processes that started within `marking`, and theirs. Works where there is /proc, on Linux."""

    def __init__(self):
        """Start the process that waits."""
        self._mark = secrets.token_hex(16)
        self._waiting = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True, text=True
        )
        self._write(self._mark)

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that start in this block, by their environment."""
        os.environ[VARIABLE] = self._mark
        try:
            yield
        finally:
            del os.environ[VARIABLE]

    def reap(self) -> None:
        """Kill the marked processes."""
        _kill(self._mark)

    def dismiss(self) -> None:
        """End the process that waits."""
        assert self._waiting.stdin
        if self._waiting.stdin.closed:
            return
        self._write("done")
        with contextlib.suppress(OSError):
            self._waiting.stdin.close()
        self._waiting.wait()

    def _write(self, line: str) -> None:
        assert self._waiting.stdin
        with contextlib.suppress(OSError):
            self._waiting.stdin.write(line + "\n")
            self._waiting.stdin.flush()


def main() -> None:
    """Read a mark from standard input; a second line dismisses, its end, the driver's, makes it kill."""
    mark = sys.stdin.readline().strip()
    if mark and not sys.stdin.readline():
        time.sleep(AFTER_SECONDS)
        _kill(mark)


def _kill(mark: str) -> None:
    for _ in range(ROUNDS):
        pids = _marked(mark)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.05)


def _marked(mark: str) -> list[int]:
    """Return the living processes of this user with the mark; a process that ended has no environment."""
    entry, pids = f"{VARIABLE}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids


if __name__ == "__main__":
    main()
