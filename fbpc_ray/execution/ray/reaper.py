"""End the processes of a Ray cluster of ours that outlive it, or a killed driver.

Ray's agents notice that their parent is gone, report it to the cluster's head, and wait forever for its answer if it is
gone, too. Processes start late, change their parent, and overwrite their environment with a title; but each writes to a
log in the folder of the cluster's session, whose name ends with the driver's pid. A small process, this file run as a
script, waits for the end of the driver and then kills those that do. It also says why the driver ended, where Ray did
it: a call to a dead node manager ends a process without a word.
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

DONE = "done"
RAY = ("gcs_server", "raylet")
FORMAT = "%Y-%m-%d_%H-%M-%S"
"""Of the time with which Ray's name of a session begins."""
AFTER_SECONDS = 2.0
"""From the driver's end until what is left is killed."""
ROUNDS = 20
"""Searches for processes: one that is killed may just have started another."""


class Reaper:
    """Kills the processes of the cluster that this process starts. Works where there is /proc, on Linux."""

    def __init__(self):
        """Start the process that waits."""
        self._since = time.strftime(FORMAT)
        words = [sys.executable, "-I", "-S", __file__, str(os.getpid()), self._since]
        self._waiting = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)

    def explain(self, message: str) -> None:
        """Print `message` to standard error if the driver ends without `dismiss`.

        With {name} in it: only if one of Ray's two processes has ended, with its name.
        """
        self._write(message)

    def reap(self) -> None:
        """Kill the processes of the cluster."""
        _kill(os.getpid(), self._since)

    def dismiss(self) -> None:
        """End the process that waits."""
        assert self._waiting.stdin
        if self._waiting.stdin.closed:
            return
        self._write(DONE)
        with contextlib.suppress(OSError):
            self._waiting.stdin.close()
        self._waiting.wait()

    def _write(self, line: str) -> None:
        assert self._waiting.stdin
        with contextlib.suppress(OSError):
            self._waiting.stdin.write(line.encode() + b"\n")
            self._waiting.stdin.flush()


def main() -> None:
    """Wait on standard input for its end, the driver's, then kill. Arguments: the driver's pid, and since when.

    The line DONE dismisses; another one is the message of `explain`.
    """
    driver, since, message = int(sys.argv[1]), sys.argv[2], ""
    for line in sys.stdin:
        if line.strip() == DONE:
            return
        message = line.strip()
    if "{name}" in message:
        name = _dead_process(driver, since)
        message = message.format(name=name) if name else ""
    if message:
        print(message, file=sys.stderr, flush=True)
    time.sleep(AFTER_SECONDS)
    _kill(driver, since)


def _dead_process(driver: int, since: str) -> str:
    """Return which of Ray's two processes ended while the other still runs; "" if it cannot be known."""
    names = set()
    for pid in _of_session(driver, since):
        with contextlib.suppress(OSError):
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    dead = set(RAY) - names
    return dead.pop() if len(dead) == 1 else ""


def _kill(driver: int, since: str) -> None:
    for _ in range(ROUNDS):
        pids = _of_session(driver, since)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.05)


def _of_session(driver: int, since: str) -> list[int]:
    """Return the processes that write to a file of the driver's Ray session; one that only reads it is the user's.

    A session that began before `since` is of an earlier process with the same pid.
    """
    session = re.compile(rf"/session_([^/]+)_{driver}/")
    pids = set()
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            match = session.search(str(path.readlink()))
            if match and match[1] >= since and path.lstat().st_mode & stat.S_IWUSR:
                pids.add(int(path.parts[2]))
    return sorted(pids - {driver})


if __name__ == "__main__":
    main()
