"""Ray backend: Ray tasks for independent work, a pool of actors for the gradients of Algorithm 1.

Every call is a pure function of its arguments. So a lost worker is replaced and its call made again, and the result is
the same to the bit. Arrays travel as numpy: zero-copy through the object store.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray

from fbpc_ray.core.config import Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation.methods.common import Gradient
from fbpc_ray.distillation.state import State
from fbpc_ray.distillation.worker import Worker, WorkerGroupSpec
from fbpc_ray.execution.ray.cluster_watch import watch
from fbpc_ray.execution.ray.connection import connect, free, get, nodes, num_nodes, put
from fbpc_ray.execution.ray.gradient_workers import GradientWorkers
from fbpc_ray.execution.ray.mapping import map_as_tasks, map_on_pool
from fbpc_ray.execution.ray.placement import Resources, capacity, infeasible_message, resources_of, steps_ahead
from fbpc_ray.execution.ray.waiting import Wait
from fbpc_ray.execution.ray.worker_pool import LOG_AFTER, OWN_CLUSTER_LOG_AFTER, WorkerPool
from fbpc_ray.execution.serial import device_name

_Worker = ray.remote(max_restarts=0, max_task_retries=0)(Worker)


@ray.remote
def _device_name(device: str) -> str:
    return device_name(device)


class RayBackend:
    """Runs work on a running Ray cluster, or on one that it starts; in a Tune trial, on the trial's bundles.

    A `Backend`.
    """

    def __init__(
        self, settings: Workers, interruption: Interruption, log: Callable[[str], None] = print, **init_options: Any
    ):
        """Connect, unless this process is connected.

        Args:
            init_options: arguments of ray.init for a cluster that is started here.

        Raises:
            UserError: if no cluster answers, or it has no GPU for --device cuda.
        """
        self.settings, self.interruption, self.log = settings, interruption, log
        self.workers: GradientWorkers | None = None
        self.owns_connection = not ray.is_initialized()
        reaper = connect(settings.address, init_options, log) if self.owns_connection else None
        self.owns_cluster = reaper is not None
        """Whether this process started the cluster: a missing worker is then starting, not waiting for resources."""
        self.watch = watch(reaper)
        try:
            self.device = self._choose_device()
        except BaseException:
            self.close()
            raise

    def _choose_device(self) -> str:
        """Return cuda if the cluster has or starts GPUs and --device allows it, else cpu. Raises UserError."""
        gpus, x = sum(node.gpus for node in nodes()), self.settings
        if x.device == "cuda" and not gpus and not x.autoscale:
            raise UserError(
                "--device cuda, but the Ray cluster has no GPU: use --device cpu, add a GPU node, or add --autoscale "
                "if the cluster starts nodes itself"
            )
        return "cuda" if x.device == "cuda" or (gpus and x.device == "auto") else "cpu"

    @property
    def uses_other_machines(self) -> bool:
        return self.settings.autoscale or num_nodes() > 1

    def map(self, function, shared, items):
        if self.workers:
            return map_on_pool(function, shared, items, self.workers.pool, self.check)
        need = self.need(len(items), 1)
        self._check_capacity(need)
        return map_as_tasks(function, shared, items, self.device, need, self._check_while_pending(need))

    def start_workers(self, group: WorkerGroupSpec) -> None:
        x = self.settings
        need = self.need(len(group.tasks), group.worker.threads)
        self._check_capacity(need)
        ahead = steps_ahead(x.prefetch, len(group.tasks), group.expert_side_bytes, nodes())
        pool = self._worker_pool(group, len(group.tasks) * (2 if ahead else 1), need)
        self.workers = GradientWorkers(
            group, pool, put, self.log, ahead=ahead, step_deadline=x.step_deadline, skip_stragglers=x.skip_stragglers
        )
        while not pool.num_ready:
            self._check_capacity(need)
            pool.results()

    def gradients(self, state: State) -> list[Gradient | None]:
        assert self.workers is not None
        return self.workers.gradients(state)

    def stop_workers(self) -> None:
        if self.workers and not self.watch.message:
            self.workers.pool.close()
        self.workers = None

    def check(self) -> None:
        """Raise Interrupted if a signal came, UserError if the cluster died."""
        self.interruption.check()
        self.watch.check()

    def describe(self) -> str:
        need = self.need(1, 1)
        self._check_capacity(need)
        name = _device_name.options(num_cpus=need.cpus, num_gpus=need.gpus).remote(self.device)
        self._wait_for(name, need)
        all_nodes, count = nodes(), num_nodes()
        cpus, gpus = sum(node.cpus for node in all_nodes), sum(node.gpus for node in all_nodes)
        return f"{get(name)}; {count} Ray node{'s' * (count != 1)}, {cpus:g} CPU, {gpus:g} GPU"

    def close(self) -> None:
        self.watch.close()
        if ray.is_initialized() and not self.watch.message:  # a dead cluster does not answer
            self.stop_workers()
            if self.owns_connection:
                ray.shutdown()

    def need(self, workers: int, threads: int) -> Resources:
        """Return the resources of each of `workers` on this cluster."""
        x = self.settings
        return resources_of(
            workers, nodes(), gpu=self.device == "cuda", threads=threads,
            cpus_per_actor=x.cpus_per_actor, gpus_per_actor=x.gpus_per_actor or (1.0 if x.autoscale else 0.0),
        )  # fmt: skip

    def _worker_pool(self, group: WorkerGroupSpec, wanted: int, need: Resources) -> WorkerPool:
        """Start the workers of `group`; each argument goes into the object store once."""
        arguments = {name: put(value) for name, value in group.worker._asdict().items()}
        actor = _Worker.options(num_cpus=need.cpus, num_gpus=need.gpus)
        grows = self.settings.autoscale  # a worker that does not fit is what makes the cluster grow
        return WorkerPool(
            partial(actor.remote, **arguments, device=self.device),
            wanted,
            lambda: wanted if grows else capacity(nodes(), need),
            lambda: f"{need}; the Ray cluster has {free()} free",
            patience=self.settings.placement_timeout,
            check=self.check,
            log=self.log,
            log_after=OWN_CLUSTER_LOG_AFTER if self.owns_cluster else LOG_AFTER,
        )

    def _wait(self, need: Resources) -> Wait:
        """Begin to wait for a task's `need`: its `check` raises UserError after --placement-timeout."""
        return Wait(
            time.monotonic, self.log, log_after=LOG_AFTER, patience=self.settings.placement_timeout,
            message=lambda: f"waiting for {need}; the Ray cluster has {free()} free",
            error=lambda seconds: (
                f"the Ray cluster had no {need} free within {seconds:.0f} s: end what holds them, add nodes, or raise "
                "--placement-timeout"
            ),
        )  # fmt: skip

    def _wait_for(self, reference: Any, need: Resources) -> None:
        """Wait for a task that takes `need`. Raises UserError after --placement-timeout."""
        wait = self._wait(need)
        try:
            while not ray.wait([reference], timeout=0.5)[0]:
                self.check()
                wait.check()
        except UserError:
            ray.cancel(reference)
            raise

    def _check_while_pending(self, need: Resources) -> Callable[[], None]:
        """Return `check`, which also raises UserError after --placement-timeout without a node that has `need`.

        Ray keeps tasks that fit on no node pending without end, for instance after their node died.
        """
        wait = self._wait(need)

        def check() -> None:
            self.check()
            if capacity(nodes(), need):
                wait.restart()
            else:
                wait.check()

        return check

    def _check_capacity(self, need: Resources) -> None:
        """Raise UserError if not one worker fits on the cluster as it is, and the cluster does not grow."""
        if not self.settings.autoscale and not capacity(all_nodes := nodes(), need):
            raise UserError(infeasible_message(all_nodes, need))
