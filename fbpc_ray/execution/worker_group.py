"""The workers of a distillation: their threads, compiled passes and caches."""

from collections.abc import Sequence

from torch import Tensor

from fbpc_ray.core import cores
from fbpc_ray.core.config import Config, Distillation
from fbpc_ray.core.progress import Log
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.state import gradient_tasks
from fbpc_ray.distillation.trajectory_cache import bytes_of_a_snapshot
from fbpc_ray.distillation.worker import EXPERT_SIDES, WorkerArguments, WorkerGroupSpec
from fbpc_ray.execution import memory_estimate
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import count_macs

RARELY = 4
"""Times the limit of the x cache from which a run doesn't use it."""
USUAL_MAP_STEPS = 100
COMPILE_FROM = 1e13
"""Floating-point operations of a run and architecture, on the way to minutes of CPU time, from which it is worth the
tens of seconds that each pass takes to compile."""


def cpu_threads(config: Config) -> int:
    """Return the CPU threads of a gradient: by default, half the cores divided by the architectures.

    With all cores, whatever else runs (Ray itself, a browser) makes OpenMP's threads wait for each other, and a step
    takes ten times as long.
    """
    return config.workers.threads or max(1, cores.available() // 2 // len(config.networks.architectures))


def compiles_passes(config: Config, dataset: Dataset, specs: Sequence[Spec], log: Log = lambda line: None) -> bool:
    """Return whether the passes of a distillation are compiled."""
    d, x = config.distillation, config.workers
    if x.compiled == "off" or x.device == "cuda":
        return False
    if x.compiled == "auto":
        most = max(2 * count_macs(Network(spec)) for spec in specs)
        if most * d.steps * d.draws_per_step * _forward_images(d, len(dataset.classes)) < COMPILE_FROM:
            return False
    return compiling.can_compile("the passes of a step", log)


def _forward_images(settings: Distillation, classes: int) -> int:
    """Return the images that a gradient passes through a network, forwards; a pass backward counts as two."""
    d = settings
    if d.method in network_pool.METHODS:
        return d.real_batch_size + 7 * d.ipc * classes * (2 if d.mirror else 1)  # a training step, features, gradient
    u_side = min(d.batch_size, d.ipc * classes) * (3 * USUAL_MAP_STEPS + 5 * d.posterior_steps)
    return u_side + 3 * d.real_batch_size * d.posterior_steps


def trajectory_cache_bytes(config: Config, specs: Sequence[Spec]) -> float:
    """Return the bytes of a worker's cache of theta_x and its K steps; 0 if none, or too few, fit to be reused."""
    d, e = config.distillation, config.experts
    if d.method not in EXPERT_SIDES:
        return 0.0
    snapshots = min(d.steps * d.draws_per_step, e.expert_count * e.expert_epochs)
    limit = 1e9 * config.workers.trajectory_cache_gb
    side_bytes = bytes_of_a_snapshot(trajectory_shapes(config, specs), limit)
    return limit if 0 < side_bytes * snapshots <= RARELY * limit else 0.0


def trajectory_shapes(config: Config, specs: Sequence[Spec]) -> list[tuple[int, int]]:
    """Return (1 + K, P), the shape of theta_x and its K steps, of each network."""
    return [(1 + config.distillation.posterior_steps, memory_estimate.count_parameters(spec)) for spec in specs]


def worker_group(
    config: Config, dataset: Dataset, labels: Tensor, specs: Sequence[Spec], stores: Sequence[ExpertStore]
) -> WorkerGroupSpec:
    """Describe the workers of a distillation."""
    d = config.distillation
    largest = max(memory_estimate.count_parameters(spec) for spec in specs) if d.method in EXPERT_SIDES else 0
    arguments = WorkerArguments(
        specs, stores, dataset, labels.numpy(), d, config.networks.augment, config.experts.expert_count,
        cpu_threads(config), compiles_passes(config, dataset, specs), trajectory_cache_bytes(config, specs),
        config.networks.precision, config.networks.chunk_images,
    )  # fmt: skip
    return WorkerGroupSpec(
        arguments, gradient_tasks(len(specs), d.draws_per_step), 4 * largest * (1 + d.posterior_steps)
    )
