"""The Ray backend: tasks for what is independent, a pool of actors for the gradients of Algorithm 1.

Every call is a pure function of its arguments, so a lost worker is replaced and its call made again, and the result is
the same to the bit. Arrays travel as numpy: zero-copy through the object store.
"""

import logging
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.exceptions import AuthenticationError as RayAuthenticationError
from ray.exceptions import RayTaskError

from fbpc_ray.core.allocator import keep_freed_memory
from fbpc_ray.core.config import Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.threads import torch_threads
from fbpc_ray.distillation.methods.common import Gradient
from fbpc_ray.distillation.state import GradientTask, State, map_start
from fbpc_ray.distillation.worker import Worker, WorkerGroupSpec
from fbpc_ray.execution.ray.placement import Node, Resources, capacity, infeasible_message, resources_of, steps_ahead
from fbpc_ray.execution.ray.probe import probe, refused
from fbpc_ray.execution.ray.worker_pool import (
    LOG_AFTER,
    OWN_CLUSTER_LOG_AFTER,
    STORE_FULL,
    Job,
    WorkerPool,
    first_line,
    raise_cause,
)
from fbpc_ray.execution.serial import device_name, gradient_of

ATTEMPTS = 5
"""Attempts per gradient before the run fails."""
FIRST_DEADLINE, LEAST_DEADLINE, TIMES_USUAL = 1800.0, 300.0, 20.0
"""Deadlines in seconds: of a first call; the least of a later call; else this multiple of the longest call so far."""

_Worker = ray.remote(max_restarts=0, max_task_retries=0)(Worker)


@ray.remote
def _task(function: Callable[[Any, Any, str], Any], shared: Any, item: Any, device: str) -> Any:
    keep_freed_memory()
    with torch_threads(1):
        return function(shared, item, device)


@ray.remote
def _device_name(device: str) -> str:
    return device_name(device)


class RayBackend:
    """Runs work on a running Ray cluster, or on one that it starts; in a Tune trial, on the trial's share.

    A `Backend`.
    """

    def __init__(
        self, settings: Workers, interruption: Interruption, log: Callable[[str], None] = print, **init_options: Any
    ):
        """Connect; `init_options` go to ray.init if a cluster is started. Raises UserError."""
        self.settings, self.interruption, self.log = settings, interruption, log
        self.pool: WorkerPool | None = None
        self._group: WorkerGroupSpec | None = None
        self.owned = not ray.is_initialized()
        self.own_cluster = self.owned and _connect(settings.address, init_options, log)
        """Whether this process started the cluster: then a missing worker is starting, not waiting for a place."""
        gpus = sum(node.gpus for node in nodes())
        wants_gpu = settings.device == "cuda"
        if wants_gpu and not gpus and not settings.autoscale:
            self.close()
            raise UserError(
                "--device cuda, but the Ray cluster has no GPU: use --device cpu, add a GPU node, or --autoscale where "
                "the cluster starts them by itself"
            )
        self.device = "cuda" if wants_gpu or (gpus and settings.device == "auto") else "cpu"

    def map(self, function, shared, items):
        return self._on_workers(function, shared, items) if self.pool else self._as_tasks(function, shared, items)

    def start_workers(self, group: WorkerGroupSpec) -> None:
        here = nodes()
        need = self.need(len(group.tasks), group.worker.threads)
        self._check_capacity(need)
        self._group = group
        self._ahead = steps_ahead(self.settings.prefetch, len(group.tasks), group.expert_side_bytes, here)
        self._expert_sides: dict[
            tuple[GradientTask, int], Any
        ] = {}  # references; there once no worker has the job any more
        self._seconds: dict[GradientTask, list[float]] = defaultdict(list)
        self._attempts = Counter[GradientTask]()
        references = {name: _put(value) for name, value in group.worker._asdict().items()}
        make = partial(_Worker.options(num_cpus=need.cpus, num_gpus=need.gpus).remote, **references, device=self.device)
        wanted = len(group.tasks) * (2 if self._ahead else 1)
        growing = self.settings.autoscale  # a worker that does not fit is what makes the cluster grow
        self.pool = WorkerPool(
            make,
            wanted,
            lambda: wanted if growing else capacity(nodes(), need),
            lambda: f"{need}; the Ray cluster has {free()} free",
            patience=self.settings.placement_timeout,
            check=self.interruption.check,
            log=self.log,
            log_after=OWN_CLUSTER_LOG_AFTER if self.own_cluster else LOG_AFTER,
        )
        while not self.pool.num_ready:
            self._check_capacity(need)
            self.pool.outcomes()

    def gradients(self, state: State) -> list[Gradient | None]:
        assert self.pool is not None
        images = _put(state.images.numpy())
        found: dict[GradientTask, Gradient | None] = {}
        self._attempts.clear()
        self._expert_sides = {key: value for key, value in self._expert_sides.items() if key[1] >= state.step}
        while len(found) < len(self.group.tasks):
            self._assign_work(state, images, found)
            for outcome in self.pool.outcomes():
                kind, unit, step = outcome.key
                if kind == "x-side" and outcome.lost:
                    self._expert_sides[unit, step] = None  # the gradient computes it itself
                elif kind == "gradient" and step == state.step and unit not in found:
                    if outcome.lost:
                        self._expert_sides.pop((unit, step), None)
                        self._count_loss(unit, step, outcome.lost)
                    else:
                        value, stats, inner_lr, solution = outcome.value
                        own = None if solution is None else solution.copy()  # what Ray gives lies in its store
                        found[unit] = gradient_of((value.copy(), stats, inner_lr, own))
                        self._seconds[unit] = [*self._seconds[unit][-19:], outcome.seconds]
            self._skip_stragglers(state.step, found)
        return [found[unit] for unit in self.group.tasks]

    @property
    def group(self) -> WorkerGroupSpec:
        """The specification that the workers were started from."""
        assert self._group is not None
        return self._group

    def stop_workers(self) -> None:
        if self.pool:
            self.pool.close()
        self.pool, self._group, self._expert_sides = None, None, {}

    def describe(self) -> str:
        need = self.need(1, 1)
        self._check_capacity(need)
        name = _device_name.options(num_cpus=need.cpus, num_gpus=need.gpus).remote(self.device)
        began, said = time.monotonic(), False
        while not ray.wait([name], timeout=0.5)[0]:
            self.interruption.check()
            waited = time.monotonic() - began
            if waited > 10 and not said:
                said = True
                self.log(f"waiting for {need}; the Ray cluster has {free()} free")
            if waited > self.settings.placement_timeout:
                ray.cancel(name)
                raise UserError(
                    f"the Ray cluster had no {need} free within {waited:.0f} s: end what holds them, add nodes, "
                    "or raise --placement-timeout",
                    code=1,
                )
        here, count = nodes(), len([node for node in ray.nodes() if node["Alive"]])
        have = [f"{sum(node.cpus for node in here):g} CPU", f"{sum(node.gpus for node in here):g} GPU"]
        return f"{ray.get(name)}; {count} Ray node{'s' * (count != 1)}, {', '.join(have)}"

    def close(self) -> None:
        if ray.is_initialized():
            self.stop_workers()
            if self.owned:
                ray.shutdown()

    def need(self, workers: int, threads: int) -> Resources:
        """Return the resources of each of `workers` on this cluster."""
        x = self.settings
        return resources_of(
            workers, nodes(), gpu=self.device == "cuda", threads=threads,
            cpus_per_actor=x.cpus_per_actor, gpus_per_actor=x.gpus_per_actor or (1.0 if x.autoscale else 0.0),
        )  # fmt: skip

    def _check_capacity(self, need: Resources) -> None:
        if not capacity(here := nodes(), need) and not self.settings.autoscale:
            raise UserError(infeasible_message(here, need))

    def _assign_work(self, state: State, images: Any, found: dict[GradientTask, Gradient | None]) -> None:
        """Assign this step's gradients to idle workers, the slowest first; to spare workers, later expert sides."""
        order = sorted(self.group.tasks, key=lambda unit: -statistics.median(self._seconds[unit] or [0.0]))
        if self._assign_gradients(state, images, order, found):
            self._prefetch_expert_sides(state.step, order)

    def _assign_gradients(
        self, state: State, images: Any, order: list[GradientTask], found: dict[GradientTask, Gradient | None]
    ) -> bool:
        """Assign the gradients that nobody computes yet; return whether every one has a worker."""
        pool, running, step = self.pool, self.pool.running() if self.pool else {}, state.step
        assert pool is not None
        todo = [
            unit
            for unit in order
            if unit not in found
            and ("gradient", unit, step) not in running
            and ("x-side", unit, step) not in running  # it began earlier, so it will be there earlier
        ]
        while todo and (idle := pool.idle()):
            # A worker prefers the architectures that it has computed before.
            known = [(m, unit) for m in idle for unit in todo if unit.architecture in m.affinities]
            member, unit = known[0] if known else (idle[0], todo[0])
            todo.remove(unit)
            expert_side = self._expert_sides.get((unit, step))
            start = map_start(state, unit, self.group.worker.settings)

            def ask(actor: Any, unit: GradientTask = unit, expert_side: Any = expert_side, start: Any = start) -> Any:
                return actor.gradient.remote(unit, step, images, state.inner_lr, expert_side, start)

            pool.assign(member, Job(("gradient", unit, step), ask, self._deadline(unit), unit.architecture))
        return not todo

    def _prefetch_expert_sides(self, step: int, order: list[GradientTask]) -> None:
        """Assign the expert sides of later steps to workers that this step does not need."""
        pool, last = self.pool, self.group.worker.settings.steps
        assert pool is not None
        for later in range(step + 1, min(step + 1 + self._ahead, last)):
            for unit in order:
                spare = pool.num_ready - len(self.group.tasks)
                busy = sum(key[0] == "x-side" for key in pool.running())
                if busy >= spare:
                    return
                if (unit, later) not in self._expert_sides and not pool.give(self._expert_side_job(unit, later)):
                    return

    def _expert_side_job(self, unit: GradientTask, step: int) -> Job:
        """Return a job whose block stays on the worker's node: the driver fetches only the first, empty result."""

        def ask(actor: Any) -> Any:
            done, self._expert_sides[unit, step] = actor.expert_side.options(num_returns=2).remote(unit, step)
            return done

        return Job(("x-side", unit, step), ask, self._deadline(unit), unit.architecture)

    def _deadline(self, unit: GradientTask) -> float:
        """Return the deadline of a call; each loss in a step doubles it, so that a short deadline ends no run."""
        taken = self._seconds[unit]
        usual = max(LEAST_DEADLINE, TIMES_USUAL * max(taken)) if taken else FIRST_DEADLINE
        return (self.settings.step_deadline or usual) * 2 ** self._attempts[unit]

    def _count_loss(self, unit: GradientTask, step: int, why: str) -> None:
        self._attempts[unit] += 1
        name = self.group.worker.specs[unit.architecture].architecture
        if self._attempts[unit] == ATTEMPTS:
            raise UserError(
                f"the gradient of {name} was lost {ATTEMPTS} times in step {step + 1} ({why}): fix the cluster and "
                "run again with --resume",
                code=1,
            )
        self.log(f"the gradient of {name} was lost in step {step + 1} ({why}); another worker computes it")

    def _skip_stragglers(self, step: int, found: dict[GradientTask, Gradient | None]) -> None:
        """Leave out gradients that take --skip-stragglers times their usual time; keep at least one."""
        times = self.settings.skip_stragglers
        if not times or not any(found.values()):
            return
        assert self.pool is not None
        for (kind, unit, of), seconds in self.pool.running().items():
            taken = self._seconds[unit] if kind == "gradient" and of == step and unit not in found else []
            if len(taken) >= 3 and seconds > times * statistics.median(taken):
                found[unit] = None
                name = self.group.worker.specs[unit.architecture].architecture
                self.log(
                    f"step {step + 1}: {name} is skipped after {seconds:.1f} s, it usually takes "
                    f"{statistics.median(taken):.1f} s; the others stand in for it"
                )

    def _as_tasks(self, function: Callable[..., Any], shared: Any, items: Any) -> Iterator[tuple[int, Any]]:
        need = self.need(len(items), 1)
        self._check_capacity(need)
        task = _task.options(num_cpus=need.cpus, num_gpus=need.gpus)
        reference = _put(shared)
        pending = {task.remote(function, reference, item, self.device): i for i, item in enumerate(items)}
        try:
            while pending:
                self.interruption.check()
                for done in ray.wait(list(pending), num_returns=1, timeout=0.5)[0]:
                    yield pending.pop(done), _get(done)
        finally:
            for left in pending:
                ray.cancel(left, force=True)

    def _on_workers(self, function: Callable[..., Any], shared: Any, items: Any) -> Iterator[tuple[int, Any]]:
        """Run tasks on the gradient workers, which may hold all resources."""
        assert self.pool is not None
        reference, attempts = _put(shared), Counter[int]()
        todo = list(enumerate(items))
        left = len(todo)
        while left:
            self.interruption.check()
            while todo:
                index, item = todo[0]
                ask = partial(_call, function, reference, item)
                if not self.pool.give(Job(("task", index, reference), ask)):
                    break
                todo.pop(0)
            for outcome in self.pool.outcomes():
                kind, index, of = outcome.key
                if kind != "task" or of != reference:
                    continue
                if not outcome.lost:
                    left -= 1
                    yield index, outcome.value
                    continue
                attempts[index] += 1
                if attempts[index] == ATTEMPTS:
                    raise UserError(
                        f"a task lost its worker {ATTEMPTS} times ({outcome.lost}): fix the cluster and run again",
                        code=1,
                    )
                todo.append((index, items[index]))


def nodes() -> list[Node]:
    """Return the cluster's nodes or, inside a Tune trial, the bundles of its placement group."""
    group = ray.util.get_current_placement_group()
    if group is None:
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    else:
        found = [dict(bundle) for bundle in group.bundle_specs]
        for name, amount in ray.get_runtime_context().get_assigned_resources().items():
            found[0][name] = found[0].get(name, 0.0) - amount  # the trial's own process is in the first
    store = min((n["Resources"].get("object_store_memory", 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)
    return [Node(each.get("CPU", 0.0), each.get("GPU", 0.0), store) for each in found]


def free() -> str:
    """What nobody holds of the cluster, in words."""
    left = ray.available_resources()
    return f"{left.get('CPU', 0):g} CPU and {left.get('GPU', 0):g} GPU"


def _put(value: Any) -> Any:
    """ray.put. Raises UserError where there is no room for it."""
    try:
        return ray.put(value)
    except STORE_FULL as error:
        raise UserError(
            f"Ray's object store is full ({first_line(error)}): free memory or disk, then run again with --resume",
            code=1,
        ) from error


def _call(function: Callable[..., Any], shared: Any, item: Any, actor: Any) -> Any:
    return actor.call.remote(function, shared, item)


def _connect(address: str, options: dict[str, Any], log: Callable[[str], None]) -> bool:
    """Join the cluster at `address`, or start one that nobody can reach from another machine; whether it did. Raises
    UserError."""
    asked = address or os.environ.get("RAY_ADDRESS", "")
    here = asked.rpartition(":")[0] in ("127.0.0.1", "localhost")
    given: Any = address or None  # Ray's annotation forbids None, its documentation doesn't
    try:
        with on_loopback() if here else nullcontext():
            where = services.canonicalize_bootstrap_address(given, options.get("_temp_dir"))
        starts = where is None
        if starts:
            given, options = "local", {"include_dashboard": False, **options}
        elif "://" not in asked:
            probe(where)
        with on_loopback() if starts or here else nullcontext():
            ray.init(address=given, logging_level=logging.ERROR, log_to_driver=False, **options)
    except RayAuthenticationError as error:
        raise refused(first_line(error)) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at '{asked}' ({first_line(error)}): check --address and RAY_ADDRESS, or use "
            "--address local"
        ) from error
    if starts and (host := ray.nodes()[0]["NodeManagerAddress"]) != "127.0.0.1":
        log(f"warning: Ray {ray.__version__} listens on {host}, which other machines may reach: use --backend serial")
    return starts


@contextmanager
def on_loopback() -> Iterator[None]:
    """What Ray starts inside listens on 127.0.0.1 alone, and 127.0.0.1 means 127.0.0.1 to what connects. It does so by
    itself on macOS and Windows, by this switch; elsewhere it puts the machine's address in the place of 127.0.0.1."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _get(reference: Any) -> Any:
    """ray.get, with what the worker raised as itself where it is a UserError or an OSError."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise_cause(error)
