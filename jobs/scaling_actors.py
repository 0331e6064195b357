"""Cost of the driver with many actors: steps whose gradients cost nothing, on simulated nodes of a Ray cluster.

The driver is the real one (take_step, GradientWorkers, WorkerPool, the object store); its actors are processes that
return an array as large as the images at once, without torch. Each step has as many tasks (architecture, draw) as there
are actors. Reported for each number of actors: the driver's CPU seconds per task, which other processes don't change,
and the wall-clock seconds per task, which contain the actors' own work where they share the driver's cores.
"""

import statistics
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.cluster_utils import Cluster

from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import preset
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.methods.common import GradientStats
from fbpc_ray.distillation.state import State
from fbpc_ray.distillation.worker import Backend, GradientArrays
from fbpc_ray.execution.ray.gradient_workers import GradientWorkers
from fbpc_ray.execution.ray.worker_pool import RayRuntime, WorkerPool
from fbpc_ray.execution.session import Session, open_session

SHAPES = {"10x1x8x8": (10, 1, 8, 8), "100x3x32x32": (100, 3, 32, 32)}
"""Of the images, by name: digits and CIFAR-10 ipc 10."""


def actor_class() -> Any:
    """Return a trivial actor's class; local, so that it travels by value and no actor imports this module."""

    class Trivial:
        def gradient(self, images: np.ndarray) -> np.ndarray:
            return np.ones_like(images)

    remote: Any = ray.remote
    return remote(num_cpus=1, max_concurrency=64)(Trivial)


class Handle:
    """A trivial actor as `GradientWorkers` calls a worker; only the images travel to it."""

    def __init__(self, actor: Any):
        self.actor, self.gradient = actor, SimpleNamespace(remote=self._gradient)

    def _gradient(self, task: Any, step: int, images: Any, *rest: Any) -> Any:
        return self.actor.gradient.remote(images)


class Runtime(RayRuntime):
    """Ray, with the results of trivial actors as those of workers."""

    def get(self, reference: Any) -> Any:
        value = super().get(reference)
        return GradientArrays(value, GradientStats(loss=0.0)) if isinstance(value, np.ndarray) else value

    def ready_ref(self, actor: Any) -> Any:
        return super().ready_ref(actor.actor)

    def kill(self, actor: Any) -> None:
        """Leave the actor to the next row."""


def measure(
    actors: tuple[int, ...], processes: int, nodes: int, units: int, repeats: int, folder: str
) -> dict[str, Any]:
    """Return {shape: [row for each number of actors]}; each row has about `units` units a repeat.

    Actors beyond `processes` share the processes of the others, in turn: the driver has as many workers and calls.
    """
    processes = min(processes, max(actors))
    per_node = -(-processes // nodes)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": per_node, "include_dashboard": False, "temp_dir": folder}
    )
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=per_node)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        trivial = actor_class()
        started = [trivial.remote() for _ in range(processes)]
        ray.get([actor.__ray_ready__.remote() for actor in started])
        handles = [Handle(started[number % processes]) for number in range(max(actors))]
        return {
            name: [row(handles[:count], shape, units, repeats) for count in actors] for name, shape in SHAPES.items()
        }  # fmt: skip
    finally:
        ray.shutdown()
        cluster.shutdown()


def row(handles: list[Handle], shape: tuple[int, ...], units: int, repeats: int) -> dict[str, Any]:
    """Time steps of as many units as there are actors."""
    actors, left = len(handles), iter(handles)
    opened = _session(actors)
    pool = WorkerPool(
        lambda: next(left), actors, lambda: actors, lambda: "trivial actors",
        patience=300.0, check=lambda: None, log=print, runtime=Runtime(),
    )  # fmt: skip
    try:
        while pool.num_ready < actors:
            pool.results()
        workers = cast(Backend, GradientWorkers(opened.worker_group(), pool, ray.put, print))
        state = _state(opened, shape)
        steps, clock, cpu = -(-units // actors), [], []
        state = _steps(opened.config, state, workers, 2)
        for _ in range(repeats):
            began, began_cpu = time.perf_counter(), time.process_time()
            state = _steps(opened.config, state, workers, steps)
            clock.append((time.perf_counter() - began) / (steps * actors))
            cpu.append((time.process_time() - began_cpu) / (steps * actors))
    finally:
        pool.close()
    result = {
        "actors": actors, "processes": len({handle.actor for handle in handles}),
        "nodes": sum(node["Alive"] for node in ray.nodes()), "steps": steps,
        "cpu_seconds_a_unit": {"median": statistics.median(cpu), "all": cpu},
        "seconds_a_unit": {"median": statistics.median(clock), "all": clock},
    }  # fmt: skip
    print(f"{actors:3} actors, images {shape}: {1e3 * statistics.median(cpu):.2f} ms of CPU per task", flush=True)
    return result


def _session(draws: int) -> Session:
    """Open a session of one architecture and `draws` draws per step."""
    config = preset("digits").updated(
        architectures=("convnet-in",), draws_per_step=draws, threads=1, width=8, steps=10**6, alpha=1e-30
    )
    return open_session(config, lambda line: None)


def _state(opened: Session, shape: tuple[int, ...]) -> State:
    images = torch.zeros(shape)
    return opened.initial[0]._replace(images=images, velocity=torch.zeros_like(images))


def _steps(config: Config, state: State, workers: Backend, count: int) -> State:
    for _ in range(count):
        state = loop.take_step(config.distillation, config.networks.architectures, state, workers).state
    return state
