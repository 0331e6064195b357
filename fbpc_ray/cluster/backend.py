"""The Ray backend: tasks for what is independent, one actor an architecture for the gradients of Algorithm 1.

Every call is a pure function of its arguments, so a lost worker is replaced and asked again, and the result is the same
to the bit. Arrays travel as numpy: zero-copy through the object store.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.exceptions import AuthenticationError as RayAuthenticationError

from fbpc_ray.allocator import keep_freed_memory
from fbpc_ray.backend import device_name
from fbpc_ray.distill import State, Worker
from fbpc_ray.errors import UserError
from fbpc_ray.methods.common import Gradient
from fbpc_ray.signals import Interruption

ATTEMPTS = 5
"""Times a gradient is asked for before its loss of workers is taken for an illness of the machine."""

_Worker = ray.remote(max_restarts=0, max_task_retries=0)(Worker)


@ray.remote
def _task(function: Callable[[Any, Any, str], Any], shared: Any, item: Any, device: str) -> Any:
    torch.set_num_threads(1)
    keep_freed_memory()
    return function(shared, item, device)


@ray.remote
def _device_name(device: str) -> str:
    return device_name(device)


class RayBackend:
    """Work on a Ray cluster: the one that is there, or one started here."""

    def __init__(
        self,
        *,
        address: str,
        device: str,
        gpus_per_actor: float,
        cpus_per_actor: float,
        interruption: Interruption,
        log: Callable[[str], None] = print,
        **init_options: Any,
    ):
        """`init_options` go to ray.init where a cluster is started. Raises UserError."""
        self.workers: list[Any] = []
        self._make: list[Callable[[], Any]] = []
        self.owned = not ray.is_initialized()
        if self.owned:
            _connect(address, init_options)
        resources = ray.cluster_resources()
        self.cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        if device == "cuda" and not gpus:
            self.close()
            raise UserError("--device cuda, but the Ray cluster has no GPU: use --device cpu or add a GPU node")
        self.device = "cuda" if gpus and device != "cpu" else "cpu"
        self.gpus = gpus if self.device == "cuda" else 0.0
        self.gpus_per_actor, self.cpus_per_actor = gpus_per_actor if self.gpus else 0.0, cpus_per_actor
        self.interruption, self.log = interruption, log

    def map(self, function, shared, items):
        task = _task.options(num_cpus=1, num_gpus=min(self.gpus_per_actor, 1.0))
        reference = ray.put(shared)
        pending = {task.remote(function, reference, item, self.device): i for i, item in enumerate(items)}
        try:
            while pending:
                for done in self._wait(list(pending)):
                    yield pending.pop(done), _get(done)
        finally:
            for left in pending:
                ray.cancel(left, force=True)

    def start_workers(self, shared: dict[str, Any], each: Sequence[dict[str, Any]], threads: int) -> None:
        cpus = self.cpus_per_actor or min(1.0, int(100 * self.cpus / len(each)) / 100)
        for kind, need, have in (
            ("CPU", cpus * len(each), self.cpus),
            ("GPU", self.gpus_per_actor * len(each), self.gpus),
        ):
            if need > have + 1e-9:
                raise UserError(
                    f"{len(each)} architectures need {need:g} {kind}, the Ray cluster has {have:g}: "
                    f"lower --{kind.lower()}s-per-actor (fractions share one) or add nodes"
                )
        options = _Worker.options(num_cpus=cpus, num_gpus=self.gpus_per_actor)
        references = {name: ray.put(value) for name, value in shared.items()}
        self._make = [partial(options.remote, **references, **own, device=self.device, threads=threads) for own in each]
        self.workers = [make() for make in self._make]
        ready = [worker.ready.remote() for worker in self.workers]
        waiting = ready
        while waiting:
            for done in self._wait(waiting):
                _get(done)
                waiting = [one for one in waiting if one != done]

    def gradients(self, state: State) -> list[Gradient]:
        reference = ray.put(state.images.numpy())
        attempts = [1] * len(self.workers)

        def ask(index: int) -> Any:
            return self.workers[index].gradient.remote(state.step, reference, state.inner_lr)

        pending = {ask(index): index for index in range(len(self.workers))}
        results: dict[int, Gradient] = {}
        while pending:
            for done in self._wait(list(pending), raise_on_signal=False):
                index = pending.pop(done)
                try:
                    value, stats, inner_lr = _get(done)
                    results[index] = Gradient(torch.from_numpy(value.copy()), stats, inner_lr)
                except (ActorDiedError, ActorUnavailableError) as error:
                    if attempts[index] == ATTEMPTS:
                        raise UserError(
                            f"worker {index} was lost {ATTEMPTS} times in step {state.step + 1} "
                            f"({_first_line(error)}): mend the cluster and run again with --resume"
                        ) from error
                    attempts[index] += 1
                    self.log(f"worker {index} was lost in step {state.step + 1}; it is replaced and asked again")
                    self._replace(index)
                    pending[ask(index)] = index
        return [results[index] for index in range(len(self.workers))]

    def stop_workers(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers, self._make = [], []

    def describe(self) -> str:
        place = f"{len(ray.nodes())} Ray node{'s' * (len(ray.nodes()) != 1)}"
        task = _device_name.options(num_cpus=0, num_gpus=min(self.gpus_per_actor, 1.0))
        return f"{ray.get(task.remote(self.device))}; {place}, {self.cpus:g} CPU, {self.gpus:g} GPU"

    def close(self) -> None:
        if ray.is_initialized():
            self.stop_workers()
            if self.owned:
                ray.shutdown()

    def _replace(self, index: int) -> None:
        ray.kill(self.workers[index])
        self.workers[index] = self._make[index]()

    def _wait(self, references: list[Any], raise_on_signal: bool = True) -> Iterator[Any]:
        """At least one finished reference; asks for signals meanwhile."""
        while True:
            if raise_on_signal:
                self.interruption.check()
            done, _ = ray.wait(references, num_returns=1, timeout=0.5)
            if done:
                return iter(done)


def _connect(address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(address=address or None, logging_level=logging.ERROR, log_to_driver=False, **options)
    except RayAuthenticationError as error:
        raise UserError(
            f"Ray refused the token ({_first_line(error)}): set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN "
            "here, or RAY_AUTH_MODE=disabled here and on the cluster"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at '{address or os.environ.get('RAY_ADDRESS', '')}' ({_first_line(error)}): "
            "check --address and RAY_ADDRESS, or use --address local"
        ) from error


def _get(reference: Any) -> Any:
    """ray.get, with a UserError raised by the worker as itself."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, UserError):
            raise cause from None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
