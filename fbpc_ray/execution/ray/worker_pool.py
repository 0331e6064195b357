"""Workers that come and go: as many actors as are wanted and fit, each with at most one call at a time.

A call is a pure function of its arguments, so one that is lost may be made again by any other worker. Nothing here
knows what the calls compute.
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
"""Seconds between looks at what the cluster has."""
SAY_AFTER = 10.0
"""Seconds of waiting for a first worker before it is said; to start one takes some, more on a busy machine."""
ALONE_SAY_AFTER = 60.0
"""The same where nobody else can hold the cluster."""


Key = tuple[str, Any, Any]
"""By which the asker knows a job: its kind, and what it is about."""


class Job(NamedTuple):
    """Something to be asked of a worker."""

    key: Key
    ask: Callable[[Any], Any]
    """actor -> the reference that is waited for and whose value is fetched."""
    seconds: float = float("inf")
    """After which the worker is taken for lost."""
    skill: Hashable = None
    """Workers that had a job of this skill before are quicker at it."""


class Outcome(NamedTuple):
    """What became of a job."""

    key: Key
    value: Any
    seconds: float
    lost: str = ""
    """Why there is no value: the worker or an argument was lost, or found no room for it. Empty where there is one."""


@dataclass(eq=False)
class Member:
    """A worker."""

    actor: Any
    birth: Any
    """Reference that is there once the worker stands."""
    ready: bool = False
    job: Job | None = None
    reference: Any = None
    began: float = 0.0
    skills: set[Hashable] = field(default_factory=set)


class Pool:
    """At most `wanted` workers. Raises UserError where for `patience` seconds there was no worker at all."""

    def __init__(
        self,
        make: Callable[[], Any],
        wanted: int,
        room: Callable[[], int],
        waiting: Callable[[], str],
        *,
        patience: float,
        check: Callable[[], None],
        log: Callable[[str], None],
        say_after: float = SAY_AFTER,
    ):
        """`make` starts an actor; `room` says how many fit on the cluster as it is now, whoever holds them; `waiting`
        puts into words what is waited for; `check` may raise while there is no worker; `say_after` seconds of it
        are said."""
        self.members: list[Member] = []
        self._make, self._wanted, self._room, self._waiting = make, wanted, room, waiting
        self._patience, self._check, self._log, self._say_after = patience, check, log, say_after
        self._looked = self._alone = time.monotonic()
        self._said = False
        self._staff()

    def idle(self) -> list[Member]:
        """Workers that stand and have nothing to do, in the order in which they were started."""
        return [member for member in self.members if member.ready and member.job is None]

    @property
    def standing(self) -> int:
        """Workers that can work or do."""
        return sum(member.ready for member in self.members)

    def give(self, job: Job) -> bool:
        """Hand `job` to an idle worker, one with its skill first; False where all have something to do."""
        idle = self.idle()
        if not idle:
            return False
        self.assign(next((member for member in idle if job.skill in member.skills), idle[0]), job)
        return True

    def assign(self, member: Member, job: Job) -> None:
        """Hand `job` to an idle worker."""
        member.job, member.reference, member.began = job, job.ask(member.actor), time.monotonic()
        member.skills.add(job.skill)

    def running(self) -> dict[Key, float]:
        """Seconds since each job that is being worked on was handed out."""
        now = time.monotonic()
        return {member.job.key: now - member.began for member in self.members if member.job}

    def outcomes(self, seconds: float = 0.5) -> list[Outcome]:
        """Wait at most so long for something to happen; what became of which job. Lost workers are replaced.

        Raises what a job raised, and UserError as `Pool` says.
        """
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._staff()
        self._mind_the_wait()
        watched = {member.reference if member.ready else member.birth: member for member in self.members}
        watched = {reference: member for reference, member in watched.items() if reference is not None}
        if not watched:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(list(watched), num_returns=1, timeout=seconds)
        found = []
        for reference in done:
            member = watched[reference]
            if not member.ready:
                self._born(member)
            else:
                found.append(self._ended(member))
        for member in list(self.members):
            if member.job and time.monotonic() - member.began > member.job.seconds:
                found.append(self._lost(member, f"no answer within {member.job.seconds:g} s"))
        return found

    def close(self) -> None:
        """End all workers."""
        for member in self.members:
            ray.kill(member.actor)
        self.members = []

    def _staff(self) -> None:
        """Start workers up to what is wanted and fits."""
        self._looked = time.monotonic()
        for _ in range(len(self.members), min(self._wanted, self._room())):
            actor = self._make()
            self.members.append(Member(actor, actor.__ray_ready__.remote()))

    def _mind_the_wait(self) -> None:
        if self.standing:
            self._alone, self._said = time.monotonic(), False
            return
        self._check()
        waited = time.monotonic() - self._alone
        if waited > self._say_after and not self._said:
            self._said = True
            self._log(f"no worker yet: waiting for {self._waiting()}")
        if waited > self._patience:
            raise UserError(
                f"no worker within {self._patience:g} s: waited for {self._waiting()}; add nodes, end what holds them, "
                "or raise --placement-timeout",
                code=1,
            )

    def _born(self, member: Member) -> None:
        try:
            ray.get(member.birth)
            member.ready = True
        except WORKER_LOST as error:
            if getattr(error, "actor_init_failed", False):
                raise
            self._remove(member)

    def _ended(self, member: Member) -> Outcome:
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

    def _lost(self, member: Member, why: str) -> Outcome:
        job, seconds = member.job, time.monotonic() - member.began
        assert job is not None
        self._remove(member)
        self._staff()
        return Outcome(job.key, None, seconds, why)

    def _remove(self, member: Member) -> None:
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
