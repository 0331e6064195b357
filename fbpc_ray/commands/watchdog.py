"""Run a command that ends when its standard input closes: when its parent dies, even by SIGKILL.

`python watchdog.py COMMAND...`, in a process group of its own, which the command and its children join. The kernel has
a signal for a parent's death (PR_SET_PDEATHSIG), but grandchildren, such as a server's workers, don't inherit it.
"""

import os
import select
import signal
import subprocess
import sys
import time

CHECK_SECONDS, END_SECONDS = 0.5, 10.0
"""Between two looks at the command; between SIGTERM and SIGKILL."""


def main(command: list[str]) -> int:
    """Return the command's exit status, or kill the process group."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None:
        ready, _, _ = select.select([0], [], [], CHECK_SECONDS)
        if ready and not os.read(0, 1024):
            _end_group(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end_group(process: subprocess.Popen[bytes]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    end = time.monotonic() + END_SECONDS
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
