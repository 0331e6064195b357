"""Pool of actors that grows, shrinks and replaces lost workers; at most one call each at a time.

A call is a pure function of its arguments, so any worker can repeat a lost one. The pool does not know what the calls
compute, and reaches Ray only through `Runtime`, which tests replace.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from fbpc_ray.execution.ray.ray_errors import STORE_FULL, WORKER_LOST, first_line, innermost, raise_cause
from fbpc_ray.execution.ray.waiting import Wait

CAPACITY_INTERVAL = 2.0
"""Seconds between checks of the cluster's capacity."""
LOG_AFTER = 10.0
"""Seconds without a worker until the pool logs it; starting one takes a few, more on a busy machine."""
OWN_CLUSTER_LOG_AFTER = 60.0
"""The same on a cluster that this process started, whose resources nobody else can hold."""


class Runtime(Protocol):
    """The calls to Ray, and the clock, that the pool needs."""

    def now(self) -> float:
        """Return the seconds of a clock that never goes back."""
        ...

    def sleep(self, seconds: float) -> None: ...

    def wait(self, references: Sequence[Any], seconds: float) -> list[Any]:
        """Wait up to `seconds` for one of the references; return those that resolved."""
        ...

    def get(self, reference: Any) -> Any:
        """Return the value of a reference, or raise what its call raised."""
        ...

    def ready_ref(self, actor: Any) -> Any:
        """Return a reference that resolves when the actor is ready."""
        ...

    def kill(self, actor: Any) -> None: ...


class RayRuntime:
    """The `Runtime` of a cluster to which this process is connected."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, references: Sequence[Any], seconds: float) -> list[Any]:
        ready, _ = ray.wait(list(references), num_returns=1, timeout=seconds)
        if ready and len(references) > 1:  # with those that resolved meanwhile: else n calls would each look at n
            ready, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
        return ready

    def get(self, reference: Any) -> Any:
        return ray.get(reference)

    def ready_ref(self, actor: Any) -> Any:
        return actor.__ray_ready__.remote()

    def kill(self, actor: Any) -> None:
        ray.kill(actor)


class Job(NamedTuple):
    """One call to a worker."""

    key: Hashable
    """Names the job for its caller."""
    submit: Callable[[Any], Any]
    """actor -> ObjectRef of the value."""
    deadline: float = float("inf")
    """Seconds after which the pool replaces the worker."""
    affinity: Hashable = None
    """Workers that had a job with this affinity are faster at it."""


class JobResult(NamedTuple):
    """How a job ended."""

    key: Any
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
    result_ref: Any = None
    started: float = 0.0
    """Time at which the current job was assigned."""
    affinities: set[Hashable] = field(default_factory=set)

    def release(self) -> None:
        """Drop the job that ended, and with it the arguments that it holds in the object store."""
        self.job = self.result_ref = None


class WorkerPool:
    """Holds at most `wanted` workers. Raises UserError after `patience` seconds without a ready worker."""

    def __init__(
        self,
        start_actor: Callable[[], Any],
        wanted: int,
        capacity: Callable[[], int],
        waiting_for: Callable[[], str],
        *,
        patience: float,
        check: Callable[[], None],
        log: Callable[[str], None],
        log_after: float = LOG_AFTER,
        runtime: Runtime | None = None,
    ):
        """Start the first workers.

        Args:
            start_actor: starts an actor.
            capacity: returns how many workers fit on the cluster, whoever holds its resources.
            waiting_for: describes the resources that the pool waits for.
            check: called while no worker is ready; may raise.
            log_after: seconds without a ready worker until the pool logs it.
            runtime: by default, the cluster to which this process is connected.
        """
        self.workers: list[PooledWorker] = []
        self._runtime: Runtime = runtime or RayRuntime()
        self._start_actor, self._wanted, self._capacity, self._check = start_actor, wanted, capacity, check
        self._wait = Wait(
            self._runtime.now, log, log_after=log_after, patience=patience,
            message=lambda: f"no worker yet: waiting for {waiting_for()}",
            error=lambda seconds: (
                f"no worker within {patience:g} s: waited for {waiting_for()}; add nodes, end what holds them, "
                "or raise --placement-timeout"
            ),
        )  # fmt: skip
        self._start_missing()

    def idle(self) -> list[PooledWorker]:
        """Return ready workers without a job, in the order of their start."""
        return [worker for worker in self.workers if worker.ready and worker.job is None]

    @property
    def num_ready(self) -> int:
        """Workers that are ready, with or without a job."""
        return sum(worker.ready for worker in self.workers)

    def submit(self, job: Job) -> bool:
        """Assign `job` to an idle worker, one with its affinity first; return False if no worker is idle."""
        idle = self.idle()
        if not idle:
            return False
        self.assign(next((worker for worker in idle if job.affinity in worker.affinities), idle[0]), job)
        return True

    def assign(self, worker: PooledWorker, job: Job) -> None:
        """Assign `job` to the idle worker `worker`."""
        worker.job, worker.result_ref, worker.started = job, job.submit(worker.actor), self._runtime.now()
        worker.affinities.add(job.affinity)

    def running(self) -> dict[Any, float]:
        """Return the seconds since each current job was assigned, by key."""
        now = self._runtime.now()
        return {worker.job.key: now - worker.started for worker in self.workers if worker.job}

    def results(self, seconds: float = 0.5) -> list[JobResult]:
        """Wait up to `seconds` for an event; return the jobs that ended. Replaces lost workers.

        Raises what a job raised, and UserError as the class says.
        """
        if self._runtime.now() - self._capacity_checked > CAPACITY_INTERVAL:
            self._start_missing()
        self._check_wait()
        watched = {worker.result_ref if worker.ready else worker.ready_ref: worker for worker in self.workers}
        watched = {reference: worker for reference, worker in watched.items() if reference is not None}
        if not watched:
            self._runtime.sleep(seconds)
            return []
        results = []
        for reference in self._runtime.wait(list(watched), seconds):
            worker = watched[reference]
            if worker.ready:
                results.append(self._finish_job(worker))
            else:
                self._finish_start(worker)
        return results + self._end_late_jobs()

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            self._runtime.kill(worker.actor)
        self.workers = []

    def _start_missing(self) -> None:
        """Start workers up to the number that is wanted and fits."""
        self._capacity_checked = self._runtime.now()
        for _ in range(len(self.workers), min(self._wanted, self._capacity())):
            actor = self._start_actor()
            self.workers.append(PooledWorker(actor, self._runtime.ready_ref(actor)))

    def _check_wait(self) -> None:
        if self.num_ready:
            self._wait.restart()
        else:
            self._check()
            self._wait.check()

    def _finish_start(self, worker: PooledWorker) -> None:
        """Note that a worker is ready, or remove it if its process or node died. Raises an error of its constructor."""
        try:
            self._runtime.get(worker.ready_ref)
            worker.ready = True
        except WORKER_LOST as error:
            if getattr(error, "actor_init_failed", False):
                raise_cause(error)
            self._remove(worker)

    def _finish_job(self, worker: PooledWorker) -> JobResult:
        """Fetch the value of a job that ended; replace the worker if it was lost."""
        job, seconds = worker.job, self._runtime.now() - worker.started
        assert job is not None
        try:
            value = self._runtime.get(worker.result_ref)
        except WORKER_LOST as error:
            return self._replace(worker, first_line(error))
        except ObjectLostError as error:
            worker.release()
            return JobResult(job.key, None, seconds, first_line(error))
        except RayTaskError as error:
            worker.release()
            cause = innermost(error)
            if isinstance(cause, (*WORKER_LOST, ObjectLostError, *STORE_FULL)):  # of an argument, or of the value
                return JobResult(job.key, None, seconds, first_line(cause))
            raise_cause(error)
        worker.release()
        return JobResult(job.key, value, seconds)

    def _end_late_jobs(self) -> list[JobResult]:
        """Replace the workers whose job has passed its deadline; return these jobs as lost."""
        now = self._runtime.now()
        late = [(w, w.job.deadline) for w in self.workers if w.job and now - w.started > w.job.deadline]
        return [self._replace(worker, f"no answer within {deadline:g} s") for worker, deadline in late]

    def _replace(self, worker: PooledWorker, reason: str) -> JobResult:
        """Remove a worker, start those that are missing, and return its job as lost."""
        job, seconds = worker.job, self._runtime.now() - worker.started
        assert job is not None
        self._remove(worker)
        self._start_missing()
        return JobResult(job.key, None, seconds, reason)

    def _remove(self, worker: PooledWorker) -> None:
        self._runtime.kill(worker.actor)
        self.workers.remove(worker)
