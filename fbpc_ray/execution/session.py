"""What a configuration means: checked values, the data set, networks, stores and the backend. Nothing runs here."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import home
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import place
from fbpc_ray.data import datasets
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import expert_store as expert_files
from fbpc_ray.distillation.expert_store import ExpertStore, Recipe
from fbpc_ray.distillation.methods.bpc import AHEAD
from fbpc_ray.distillation.methods.common import expert_epochs
from fbpc_ray.distillation.worker import EXPERT_SIDES, gradient_tasks
from fbpc_ray.execution.serial import Backend, Serial, WorkerGroupSpec
from fbpc_ray.models import checks, functional
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import count_macs

Log = Callable[[str], None]


_COUNT = ("1 or more", lambda value: value >= 1)
_POSITIVE = ("above 0 and finite", lambda value: 0 < value < float("inf"))
_NOT_NEGATIVE = ("0 or more", lambda value: 0 <= value < float("inf"))
_FRACTION = ("from 0 to below 1", lambda value: 0 <= value < 1)
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "ipc": _COUNT, "steps": _COUNT, "batch_size": _COUNT, "posterior_steps": _COUNT, "mc_samples": _COUNT,
    "real_batch_size": _COUNT, "map_max_steps": _COUNT, "checkpoint_every": _COUNT, "width": _COUNT,
    "expert_count": _COUNT, "expert_epochs": _COUNT, "expert_batch_size": _COUNT, "num_chains": _COUNT,
    "warm_pool_size": _COUNT, "warm_pool_uses": _COUNT,
    "chain_epochs": _COUNT, "syn_steps": _COUNT, "chain_every": _COUNT, "chain_batch_size": _COUNT,
    "alpha": _POSITIVE, "gamma": _POSITIVE, "map_lr": _POSITIVE, "lambda_x": _POSITIVE, "lambda_u": _POSITIVE,
    "expert_lr": _POSITIVE, "inner_lr": _POSITIVE, "chain_eta": _POSITIVE,
    "threads": _NOT_NEGATIVE, "depth": _NOT_NEGATIVE, "cpus_per_actor": _NOT_NEGATIVE,
    "gpus_per_actor": _NOT_NEGATIVE, "placement_timeout": _POSITIVE, "prefetch": _NOT_NEGATIVE,
    "trajectory_cache_gb": _NOT_NEGATIVE, "val_every": _NOT_NEGATIVE,
    "step_deadline": _NOT_NEGATIVE, "skip_stragglers": _NOT_NEGATIVE, "draws_per_step": _COUNT,
    "chain_d": _NOT_NEGATIVE, "chain_weight_decay": _NOT_NEGATIVE,
    "inner_alpha": _NOT_NEGATIVE, "weight_noise": _NOT_NEGATIVE,
    "chain_full_batch": _NOT_NEGATIVE, "momentum": _FRACTION, "chain_friction": _FRACTION, "validation": _FRACTION,
}  # fmt: skip
"""What each flag may be."""


def canonical(config: Config) -> Config:
    """The configuration with each network under its one name, so that equal ones are equal. Raises UserError."""
    names = config.networks.architectures
    found = tuple(functional.canonical(name) for name in names)
    if not found:
        raise UserError("--architectures is empty: name a network")
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise UserError(f"--architectures {' '.join(names)}: {twice[0]} is there twice; name each network once")
    return config.updated(architectures=found)


def check(config: Config) -> None:
    """Raise UserError for values that no run can use."""
    flat = config.flat()
    for name, (allowed, holds) in RANGES.items():
        if not holds(flat[name]):
            raise UserError(f"--{name.replace('_', '-')} is {flat[name]}: it must be {allowed}")
    if flat["chain_every"] > flat["chain_epochs"]:
        raise UserError("--chain-every is above --chain-epochs: no posterior sample would be taken; lower it")
    if flat["val_every"] and not flat["validation"]:
        raise UserError(f"--val-every {flat['val_every']} looks at the validation split: add --validation 0.1")
    canonical(config)
    method = config.distillation.method
    if method != "random":
        expert_epochs(flat["start_epoch"], flat["start_rule"], flat["expert_epochs"], AHEAD.get(method, 0))
    if method == "bpc-rkl" and flat["mc_samples"] < 2:
        raise UserError("--mc-samples is 1: the covariance of bpc-rkl needs 2 or more draws")


def load_data(config: Config, log: Log) -> Dataset:
    """The data set of a configuration. Raises UserError."""
    d = config.data
    dataset = datasets.load(
        d.data, root=d.data_root, download=d.download, normalisation=d.normalisation,
        validation=d.validation, seed=d.data_seed,
    )  # fmt: skip
    for note in dataset.notes:
        log(f"note: {note}")
    return dataset


def specs(config: Config, dataset: Dataset | Coreset) -> list[Spec]:
    """One network an architecture, for the images and classes of `dataset`, each built once so that what can't be built
    is said here. Raises UserError."""
    n = config.networks
    shape, classes = dataset.image_shape, len(dataset.classes)
    found = [functional.specify(name, shape, classes, n.width, n.depth) for name in n.architectures]
    for spec in found:
        checks.check(spec)
    return found


def store(config: Config, dataset: Dataset, spec: Spec) -> ExpertStore:
    """The experts of one network; those of another recipe lie beside them. Raises UserError for a damaged store."""
    e = config.experts
    recipe = Recipe(
        data=dataset.name, fingerprint=dataset.fingerprint, image_shape=dataset.image_shape, classes=spec.classes,
        architecture=spec.architecture, width=spec.width, depth=spec.depth, epochs=e.expert_epochs, lr=e.expert_lr,
        batch_size=e.expert_batch_size, augment=config.networks.augment, dtype=e.expert_dtype, seed=e.expert_seed,
    )  # fmt: skip
    root = place(e.experts) if e.experts else home() / "experts"
    return expert_files.found(root.absolute(), recipe)


def threads(config: Config) -> int:
    """CPU threads of a gradient. By default half the cores are shared out: with all of them, whatever else runs (Ray
    itself, a browser) makes OpenMP's threads wait for each other, and a step takes ten times as long."""
    return config.workers.threads or max(1, (os.cpu_count() or 1) // 2 // len(config.networks.architectures))


RARELY = 4
"""Times the limit of the x cache from which a run doesn't use it."""
USUAL_MAP_STEPS = 100
COMPILE_FROM = 1e13
"""Floating-point operations of a run and architecture, on the way to minutes of CPU time, from which it is worth the
tens of seconds that each pass takes to compile."""


def compiled(config: Config, dataset: Dataset, chosen: Sequence[Spec], log: Log = lambda line: None) -> bool:
    """Whether the passes of a distillation are compiled."""
    d, x = config.distillation, config.workers
    if x.compiled == "off" or x.device == "cuda":
        return False
    if x.compiled == "auto":
        m = min(d.batch_size, d.ipc * len(dataset.classes))
        u_side = m * (3 * USUAL_MAP_STEPS + 5 * d.posterior_steps)  # forwards; a backward counts two
        expert_side = 3 * d.real_batch_size * d.posterior_steps
        most = max(2 * count_macs(Network(spec)) for spec in chosen)
        if most * d.steps * d.draws_per_step * (u_side + expert_side) < COMPILE_FROM:
            return False
    return compiling.possible("the passes of a step", log)


def trajectory_cache_bytes(config: Config, chosen: Sequence[Spec]) -> float:
    """What a worker may keep of theta_x and its K steps; 0 where so little of them fits that it would be met rarely."""
    d, e = config.distillation, config.experts
    if d.method not in EXPERT_SIDES:
        return 0.0
    snapshots = min(d.steps * d.draws_per_step, e.expert_count * e.expert_epochs)
    each = sum(4 * Network(spec).parameter_count * (1 + d.posterior_steps) for spec in chosen)
    limit = 1e9 * config.workers.trajectory_cache_gb
    return limit if each * snapshots <= RARELY * limit else 0.0


def crew(
    config: Config, dataset: Dataset, labels: Tensor, chosen: Sequence[Spec], stores: Sequence[ExpertStore]
) -> WorkerGroupSpec:
    """What a backend starts the workers of a distillation from."""
    d = config.distillation
    largest = max(Network(spec).parameter_count for spec in chosen) if d.method in EXPERT_SIDES else 0
    return WorkerGroupSpec(
        {
            "specs": list(chosen), "stores": list(stores), "dataset": dataset, "labels": labels.numpy(), "settings": d,
            "augment": config.networks.augment, "expert_count": config.experts.expert_count, "threads": threads(config),
            "compiled": compiled(config, dataset, chosen),
            "trajectory_cache_bytes": trajectory_cache_bytes(config, chosen),
        },
        gradient_tasks(len(chosen), d.draws_per_step),
        4 * largest * (1 + d.posterior_steps),
    )  # fmt: skip


@contextmanager
def backend(config: Config, interruption: Interruption, log: Log) -> Iterator[Backend]:
    """The backend of a configuration, closed at the end; signals are caught from here on. Raises UserError."""
    x = config.workers
    if x.backend == "serial":
        opened: Backend = Serial(x.device, interruption)
    else:
        try:
            from fbpc_ray.execution.ray.ray_backend import RayBackend
        except ImportError as error:
            raise UserError(
                f"ray is not installed ({error}): pip install 'ray[default]', or use --backend serial"
            ) from None
        opened = RayBackend(x, interruption, log)
    interruption.install()
    try:
        yield opened
    finally:
        opened.close()
