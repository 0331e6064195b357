"""A pool of actors that come and go: as many as wanted and as fit, each with at most one call at a time.

A call is a pure function of its arguments, so any other worker can repeat a lost one. Nothing here knows what the calls
compute.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from fbpc_ray.core.errors import UserError

WORKER_LOST = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
STORE_FULL = (ObjectStoreFullError, OutOfDiskError)
LOOK_EVERY = 2.0
"""Seconds between checks of the cluster's capacity."""
LOG_AFTER = 10.0
"""Seconds without a worker before the log says so; starting one takes a few, more on a busy machine."""
OWN_CLUSTER_LOG_AFTER = 60.0
"""The same on a cluster that this process started, which nobody else can hold."""


Key = tuple[str, Any, Any]
"""Names a job for its caller: (kind, subject, step or reference)."""


class Job(NamedTuple):
    """One call to a worker."""

    key: Key
    ask: Callable[[Any], Any]
    """actor -> ObjectRef of the value."""
    seconds: float = float("inf")
    """Deadline, after which the pool replaces the worker."""
    affinity: Hashable = None
    """Workers that had a job with this affinity are faster at it."""


class Outcome(NamedTuple):
    """How a job ended."""

    key: Key
    value: Any
    seconds: float
    lost: str = ""
    """Why there is no value: a lost worker, a lost argument or a full object store; empty if there is a value."""


@dataclass(eq=False)
class PooledWorker:
    """An actor and its current job."""

    actor: Any
    ready_ref: Any
    """ObjectRef that resolves when the actor is ready."""
    ready: bool = False
    job: Job | None = None
    reference: Any = None
    began: float = 0.0
    affinities: set[Hashable] = field(default_factory=set)


class WorkerPool:
    """Holds at most `wanted` workers. Raises UserError after `patience` seconds without any worker."""

    def __init__(
        self,
        make: Callable[[], Any],
        wanted: int,
        capacity: Callable[[], int],
        waiting: Callable[[], str],
        *,
        patience: float,
        check: Callable[[], None],
        log: Callable[[str], None],
        log_after: float = LOG_AFTER,
    ):
        """Start the first workers.

        Args:
            make: starts an actor.
            capacity: returns how many workers fit on the cluster as it is now, whoever holds its resources.
            waiting: describes the resources that the pool waits for.
            check: called while there is no worker; may raise.
            log_after: seconds without a worker before the log says so.
        """
        self.members: list[PooledWorker] = []
        self._make, self._wanted, self._capacity, self._waiting = make, wanted, capacity, waiting
        self._patience, self._check, self._log, self._log_after = patience, check, log, log_after
        self._looked = self._alone = time.monotonic()
        self._said = False
        self._start_missing()

    def idle(self) -> list[PooledWorker]:
        """Return ready workers without a job, in the order of their start."""
        return [member for member in self.members if member.ready and member.job is None]

    @property
    def num_ready(self) -> int:
        """Workers that are ready, with or without a job."""
        return sum(member.ready for member in self.members)

    def give(self, job: Job) -> bool:
        """Assign `job` to an idle worker, one with its affinity first; return False if no worker is idle."""
        idle = self.idle()
        if not idle:
            return False
        self.assign(next((member for member in idle if job.affinity in member.affinities), idle[0]), job)
        return True

    def assign(self, member: PooledWorker, job: Job) -> None:
        """Assign `job` to the idle worker `member`."""
        member.job, member.reference, member.began = job, job.ask(member.actor), time.monotonic()
        member.affinities.add(job.affinity)

    def running(self) -> dict[Key, float]:
        """Return the seconds since each current job was assigned."""
        now = time.monotonic()
        return {member.job.key: now - member.began for member in self.members if member.job}

    def outcomes(self, seconds: float = 0.5) -> list[Outcome]:
        """Wait up to `seconds` for an event; return the jobs that ended. Replaces lost workers.

        Raises what a job raised, and UserError as the class says.
        """
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._start_missing()
        self._check_waiting()
        watched = {member.reference if member.ready else member.ready_ref: member for member in self.members}
        watched = {reference: member for reference, member in watched.items() if reference is not None}
        if not watched:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(list(watched), num_returns=1, timeout=seconds)
        found = []
        for reference in done:
            member = watched[reference]
            if not member.ready:
                self._start_finished(member)
            else:
                found.append(self._call_finished(member))
        for member in list(self.members):
            if member.job and time.monotonic() - member.began > member.job.seconds:
                found.append(self._lost(member, f"no answer within {member.job.seconds:g} s"))
        return found

    def close(self) -> None:
        """End all workers."""
        for member in self.members:
            ray.kill(member.actor)
        self.members = []

    def _start_missing(self) -> None:
        """Start workers up to the number that is wanted and fits."""
        self._looked = time.monotonic()
        for _ in range(len(self.members), min(self._wanted, self._capacity())):
            actor = self._make()
            self.members.append(PooledWorker(actor, actor.__ray_ready__.remote()))

    def _check_waiting(self) -> None:
        if self.num_ready:
            self._alone, self._said = time.monotonic(), False
            return
        self._check()
        waited = time.monotonic() - self._alone
        if waited > self._log_after and not self._said:
            self._said = True
            self._log(f"no worker yet: waiting for {self._waiting()}")
        if waited > self._patience:
            raise UserError(
                f"no worker within {self._patience:g} s: waited for {self._waiting()}; add nodes, end what holds them, "
                "or raise --placement-timeout",
                code=1,
            )

    def _start_finished(self, member: PooledWorker) -> None:
        try:
            ray.get(member.ready_ref)
            member.ready = True
        except WORKER_LOST as error:
            if getattr(error, "actor_init_failed", False):
                raise
            self._remove(member)

    def _call_finished(self, member: PooledWorker) -> Outcome:
        job, seconds = member.job, time.monotonic() - member.began
        assert job is not None
        try:
            value = ray.get(member.reference)
        except WORKER_LOST as error:
            return self._lost(member, first_line(error))
        except ObjectLostError as error:
            member.job = member.reference = None
            return Outcome(job.key, None, seconds, first_line(error))
        except RayTaskError as error:
            member.job = member.reference = None
            cause = innermost(error)
            if isinstance(cause, (*WORKER_LOST, ObjectLostError, *STORE_FULL)):  # of an argument, or of the result
                return Outcome(job.key, None, seconds, first_line(cause))
            raise_cause(error)
        member.job = member.reference = None
        return Outcome(job.key, value, seconds)

    def _lost(self, member: PooledWorker, why: str) -> Outcome:
        job, seconds = member.job, time.monotonic() - member.began
        assert job is not None
        self._remove(member)
        self._start_missing()
        return Outcome(job.key, None, seconds, why)

    def _remove(self, member: PooledWorker) -> None:
        ray.kill(member.actor)
        self.members.remove(member)


def innermost(error: RayTaskError) -> BaseException:
    """What a remote function raised."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return cause


def raise_cause(error: RayTaskError) -> NoReturn:
    """A UserError that a worker raised as itself; an OSError too, with the worker's traceback behind it."""
    cause = innermost(error)
    if isinstance(cause, UserError):
        raise cause from None
    if isinstance(cause, OSError):
        raise cause from error
    raise error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
