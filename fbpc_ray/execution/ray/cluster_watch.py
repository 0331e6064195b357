"""Detect the death of the Ray cluster, and say how to resume before Ray ends the driver."""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import ray
from ray._private import worker

from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.ray.reaper import Reaper

INTERVAL = 0.5
"""Seconds between two looks at the cluster."""
PATIENCE = 30.0
"""Seconds without an answer of the cluster's head after which it counts as dead; Ray waits for 60."""
GRACE = 5.0
"""Seconds for the driver to come to `check` or `close`; a call that waits for a dead cluster keeps it from there."""
FIX = "run the same command with --resume"
DEAD = f"Ray's process {{name}} ended (killed, or out of memory): {FIX}"


class Liveness:
    """Decides from two observations whether a cluster is dead. Pure: clock and observations are arguments."""

    def __init__(
        self, dead_process: Callable[[], str], head_answers: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        """Start the clock.

        Args:
            dead_process: returns the name of a process of this node's Ray that ended, or "".
            head_answers: returns whether the cluster's head accepts connections.
        """
        self._dead_process, self._head_answers, self._clock = dead_process, head_answers, clock
        self._answered = clock()

    def fault(self) -> str:
        """Return why the cluster is dead, or "" if it lives."""
        if name := self._dead_process():
            return DEAD.format(name=name)
        if self._head_answers():
            self._answered = self._clock()
        seconds = self._clock() - self._answered
        if seconds <= PATIENCE:
            return ""
        return f"the head of the Ray cluster has not answered for {seconds:.0f} s: start it again, then {FIX}"


class ClusterWatch:
    """Looks at the cluster from a thread. `check` raises UserError once it is dead.

    Where the driver comes neither to `check` nor to `close` within GRACE seconds, the thread prints the message and
    ends the process, as Ray would.
    """

    def __init__(
        self, liveness: Liveness, reaper: Reaper | None = None, connected: Callable[[], bool] = ray.is_initialized
    ):
        """Start the thread that watches.

        Args:
            reaper: that of a cluster that this process started.
            connected: tells whether this process is still connected to Ray; once it isn't, the watch does nothing.
        """
        self._liveness, self._reaper, self._connected = liveness, reaper, connected
        self._stop, self._handled = threading.Event(), threading.Event()
        self.message = ""
        """Why the cluster is dead; empty while it lives."""
        self._thread = threading.Thread(target=self._watch, name="cluster-watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if the cluster is dead."""
        if self.message:
            self._handled.set()
            raise UserError(self.message, code=1)

    def close(self) -> None:
        """Stop looking. A dead cluster is left alone from then on."""
        self._stop.set()
        self._handled.set()
        if self.message:
            atexit.unregister(worker.shutdown)  # it would wait for a minute
            if ray.is_initialized():
                atexit.register(_end_process)
        if self._reaper:
            self._reaper.dismiss()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL) and self._connected():
            fault = self._liveness.fault()
            if fault and not self._stop.is_set():  # closed meanwhile: ray.shutdown ends the processes
                self.message = fault
                if self._reaper:
                    self._reaper.explain(f"error: {fault}")
                    self._reaper.reap()  # at once: Ray's agents print the log of a dead raylet
                if not self._handled.wait(GRACE):
                    print(f"error: {fault}", file=sys.stderr, flush=True)
                    if self._reaper:
                        self._reaper.dismiss()
                    os._exit(1)
                return


def _end_process() -> None:
    """End the process with status 1 after all other exit functions: a thread of Ray, still running, may crash it."""
    atexit.unregister(_end_process)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def watch(reaper: Reaper | None) -> ClusterWatch:
    """Watch the cluster that this process is connected to; `reaper` is given for one that this process started."""
    if reaper:
        reaper.explain(f"error: {DEAD}")
        return ClusterWatch(Liveness(dead_process, lambda: True), reaper)
    address = ray.get_runtime_context().gcs_address  # not in the thread: it starts a cluster where there is none
    return ClusterWatch(Liveness(dead_process, lambda: head_answers(address)))


def dead_process() -> str:
    """Return the name of a Ray process that this process started and that ended, or ""."""
    node = worker._global_node
    dead = node.dead_processes() if node else []
    return dead[0][0] if dead else ""


def head_answers(address: str) -> bool:
    """Return whether the head of a cluster at `address` (host:port) accepts a connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True
