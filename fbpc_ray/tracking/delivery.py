"""Deliver records to MLflow from a daemon thread, which may be late or fail but never blocks a run.

A thread, and not a call that tries and gives up: the first use of a SQLite database takes seconds, and a server that
accepts and never answers costs a whole timeout a call. Nothing forks. Notes are printed by the caller's thread at its
next call, so that they don't tear a progress bar.

A delivery that failed may have arrived all the same, so a record can be sent twice without harm: metrics carry the time
of the call (MLflow drops a point that it has), a run is found again by its session tag, images by key and step. After a
failure the sender probes the server. No answer: wait `retry_seconds`. An answer, twice: only this record is at fault,
so the sender sets it aside, tries it again later, and goes on with those behind it.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import UserError
from fbpc_ray.tracking.mlflow_client import MAX_METRICS, Metric, MlflowClient, MlflowException, milliseconds, reason
from fbpc_ray.tracking.mlflow_run import MlflowRun

LAST_ATTEMPTS = 3
"""Rounds of delivery after the caller has finished, with a server that doesn't answer."""


@dataclass(slots=True)
class Record:
    """A call of the tracker, to be delivered."""

    send: Callable[[MlflowClient, str, bool], None]
    """(client, run id, whether this record was tried before)."""
    metrics: list[Metric] | None = None
    """In the place of `send`: neighbours of that kind share one request."""
    attempts: int = 0
    refusals: int = 0
    """Attempts that failed although the server answered right after them."""


class Notes:
    """Lines for the user, one of each kind, printed by the thread that asks for them."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self.kinds: set[str] = set()

    def add(self, kind: str, line: str) -> None:
        """Queue `line`, without secrets, unless a line of its kind was queued before."""
        if kind not in self.kinds:
            self.kinds.add(kind)
            self._lines.append(redacted(line))

    def print(self, log: Callable[[str], None]) -> None:
        while self._lines:
            log(self._lines.popleft())


class Sender:
    """A queue of records and the thread that sends them to a run."""

    def __init__(self, run: MlflowRun, notes: Notes, retry_seconds: float):
        self._run, self._notes, self._retry_seconds = run, notes, retry_seconds
        self._wake = threading.Condition()  # guards what follows; the thread sends without holding it
        self._queue: deque[Record] = deque()
        self._aside: list[Record] = []  # failed although the server answers
        self._aside_due = 0.0  # time.monotonic() of their next attempt
        self._refused = 0  # the server will never take them
        self._status: str | None = None  # set by finish
        self._deadline = float("inf")  # time.monotonic() after which finish waits for no more records
        self.run_ended = False
        """The run has its status on the server."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def pending(self) -> int:
        """Records not delivered (yet)."""
        return len(self._queue) + len(self._aside) + self._refused

    @property
    def finished(self) -> bool:
        return self._status is not None

    def put(self, record: Record) -> None:
        with self._wake:
            self._queue.append(record)
            self._wake.notify()

    def finish(self, status: str, seconds: float) -> None:
        """Deliver the rest and end the run with `status`, waiting for `seconds` at most."""
        with self._wake:
            # The last quarter is kept for the status: a run that ended must not read RUNNING because of a long queue.
            self._deadline = time.monotonic() + 0.75 * seconds
            self._status = status
            self._wake.notify()
        self._thread.join(seconds)

    # From here on: the sending thread.

    def _work(self) -> None:
        client, rounds_left = None, LAST_ATTEMPTS
        while True:
            last = self._status is not None  # read before delivering: what was queued before finish gets its attempt
            rounds_left -= last
            answered = False
            try:
                client = client or self._run.open()
                answered = self._deliver(client)
            except Exception as error:  # noqa: BLE001  whatever MLflow, SQL or the network raises
                self._note_silence(error)
            if last and (answered or not rounds_left or time.monotonic() > self._deadline):
                break
            self._wait(answered, last)
        if client and answered:
            self._end_run(client)

    def _wait(self, answered: bool, last: bool) -> None:
        """Sleep until there is something to send, or until the next attempt is due."""
        with self._wake:
            if last:
                self._wake.wait(min(1.0, self._retry_seconds))
            elif answered:
                seconds = self._retry_seconds if self._aside else None
                self._wake.wait_for(lambda: self._queue or self._status, seconds)
            else:
                self._wake.wait_for(lambda: self._status, self._retry_seconds)

    def _end_run(self, client: MlflowClient) -> None:
        for _ in range(2):
            with contextlib.suppress(Exception):
                client.set_terminated(str(self._run.run_id), self._status, milliseconds())
                self.run_ended = True
                return

    def _deliver(self, client: MlflowClient) -> bool:
        """Send the queue, oldest first, until the deadline. Return whether the server answered."""
        if self._status or time.monotonic() >= self._aside_due:
            with self._wake:
                self._queue.extend(self._aside)
                self._aside.clear()
        while self._queue and time.monotonic() < self._deadline:
            batch = self._next_batch()
            again = batch[0].attempts > 0
            for record in batch:
                record.attempts += 1
            try:
                self._send(client, batch, again)
            except Exception as error:  # noqa: BLE001  whatever MLflow, SQL, the network or a disk raises
                if not self._answers(client):
                    self._note_silence(error)
                    return False
                for record in batch:
                    record.refusals += 1
                if len(batch) == 1 and batch[0].refusals > 1:  # once: the server may have come back only just now
                    self._set_aside(error)
            else:
                with self._wake:
                    for _ in batch:
                        self._queue.popleft()
        return True

    def _send(self, client: MlflowClient, batch: list[Record], again: bool) -> None:
        if batch[0].metrics is None:
            batch[0].send(client, str(self._run.run_id), again)
        else:
            self._run.send_metrics(client, [point for record in batch for point in record.metrics or []])

    def _next_batch(self) -> list[Record]:
        """Return the oldest record, with the metrics that follow it as far as they fit in one request and are new."""
        batch, points = [self._queue[0]], len(self._queue[0].metrics or [])
        if batch[0].metrics is not None and not batch[0].attempts:
            for index in range(1, len(self._queue)):
                record = self._queue[index]
                points += len(record.metrics or [])
                if record.metrics is None or record.attempts or points > MAX_METRICS:
                    break
                batch.append(record)
        return batch

    def _set_aside(self, error: Exception) -> None:
        """Take the oldest record, which failed twice on a live server, out of the queue."""
        with self._wake:
            record = self._queue.popleft()
            code = error.get_http_status_code() if isinstance(error, MlflowException) else 500
            if 400 <= code < 500 and code not in (408, 429):
                self._refused += 1  # invalid, or the run was deleted: will not get better
            else:
                self._aside.append(record)
                self._aside_due = time.monotonic() + self._retry_seconds
        line = f"MLflow: {self._run.uri} does not take a record ({reason(error)}); going on without it."
        self._notes.add("refused", line)

    def _answers(self, client: MlflowClient) -> bool:
        with contextlib.suppress(Exception):
            client.get_run(str(self._run.run_id))
            return True
        return False

    def _note_silence(self, error: Exception) -> None:
        tail = "" if self._status else f"; going on without it, trying again every {self._retry_seconds:g} s"
        cause = str(error) if isinstance(error, UserError) else f"{self._run.uri} does not answer ({reason(error)})"
        self._notes.add("silent", f"MLflow: {cause}{tail}.")
