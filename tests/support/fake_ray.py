"""A cluster without processes, on a clock that only waiting moves: for tests of what the driver decides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fbpc_ray.execution.ray.worker_pool import Job, WorkerPool

NEVER = float("inf")


@dataclass(eq=False)
class Reference:
    """Resolves at `time` to `value`, or raises it if it is an exception."""

    time: float
    value: Any = None


@dataclass(eq=False)
class Actor:
    """A worker of a fake cluster. `answer(method, arguments)` returns (seconds, value) of a call."""

    runtime: "FakeRuntime"
    ready: Reference
    answer: Callable[[str, tuple[Any, ...]], tuple[float, Any]] = lambda method, arguments: (1.0, None)
    killed: bool = False
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def _call(self, name: str, *arguments: Any) -> Reference:
        self.calls.append((name, arguments))
        seconds, value = self.answer(name, arguments)
        return Reference(self.runtime.now() + seconds, value)

    def __getattr__(self, name: str) -> Any:
        """Return a method that is called as Ray's: actor.name.remote(...), or with two return values by options."""
        if name.startswith("__"):
            raise AttributeError(name)

        def remote(*arguments: Any) -> Reference:
            return self._call(name, *arguments)

        def options(num_returns: int) -> Any:
            assert num_returns == 2
            return SimpleNamespace(
                remote=lambda *arguments: (done := remote(*arguments), Reference(done.time, "block"))
            )

        return SimpleNamespace(remote=remote, options=options)


class FakeRuntime:
    """A `worker_pool.Runtime`. Waiting moves the clock to the first reference that resolves."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def wait(self, references: Sequence[Reference], seconds: float) -> list[Reference]:
        first = min(references, key=lambda reference: reference.time)
        if first.time > self.time + seconds:
            self.time += seconds
            return []
        self.time = max(self.time, first.time)
        return [first]

    def get(self, reference: Reference) -> Any:
        assert reference.time <= self.time, "the reference has not resolved: a real driver would block here"
        if isinstance(reference.value, BaseException):
            raise reference.value
        return reference.value

    def ready_ref(self, actor: Actor) -> Reference:
        return actor.ready

    def kill(self, actor: Actor) -> None:
        actor.killed = True


class FakeCluster:
    """A pool of fake actors. Each of `starts` is the (seconds, value) of an actor's start; then (0, None)."""

    def __init__(self, wanted: int = 2, capacity: int = 2, patience: float = 100.0, starts: Sequence[Any] = ()):
        self.runtime, self.capacity = FakeRuntime(), capacity
        self.actors: list[Actor] = []
        self.lines: list[str] = []
        self.checks = 0
        self.answer: Callable[[str, tuple[Any, ...]], tuple[float, Any]] = lambda method, arguments: (1.0, None)
        self._starts = list(starts)
        self.pool = WorkerPool(
            self._start, wanted, lambda: self.capacity, lambda: "1 CPU", patience=patience, check=self._check,
            log=self.lines.append, runtime=self.runtime,
        )  # fmt: skip

    def _start(self) -> Actor:
        seconds, value = self._starts.pop(0) if self._starts else (0.0, None)
        ready = Reference(self.runtime.now() + seconds, value)
        self.actors.append(Actor(self.runtime, ready, lambda method, arguments: self.answer(method, arguments)))
        return self.actors[-1]

    def _check(self) -> None:
        self.checks += 1

    def await_ready(self, count: int) -> None:
        """Wait until so many workers are ready."""
        for _ in range(1000):
            if self.pool.num_ready >= count:
                return
            assert self.pool.results() == []
        raise AssertionError(f"{self.pool.num_ready} workers are ready, not {count}")

    def results(self, count: int = 1) -> list[Any]:
        """Return the next `count` results."""
        results: list[Any] = []
        for _ in range(10_000):
            if len(results) >= count:
                return results
            results += self.pool.results()
        raise AssertionError(f"got {len(results)} results, expected {count}")


def job(key: Any, value: Any = None, seconds: float = 1.0, **fields: Any) -> Job:
    """A job that ends after so many seconds with `value`, or raises it."""
    return Job(key, lambda actor: Reference(actor.runtime.now() + seconds, value), **fields)
