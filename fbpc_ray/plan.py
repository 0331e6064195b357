"""What a configuration means: checked values, the data set, networks, stores and the backend. Nothing runs here."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fbpc_ray import experts as expert_files
from fbpc_ray.backend import Backend, Serial
from fbpc_ray.config import Config
from fbpc_ray.distill import expert_epochs
from fbpc_ray.errors import UserError
from fbpc_ray.experts import ExpertStore, Recipe
from fbpc_ray.provenance import home
from fbpc_ray.signals import Interruption
from fbpc_ray.vision import datasets
from fbpc_ray.vision.convnet import default_depth
from fbpc_ray.vision.datasets import Dataset
from fbpc_ray.vision.zoo import Network, Spec

Log = Callable[[str], None]


def check(config: Config) -> None:
    """Raise UserError for values that no run can use."""
    flat = config.flat()
    for name in (
        "ipc steps batch_size map_max_steps posterior_steps real_batch_size mc_samples checkpoint_every width "
        "expert_count expert_epochs expert_batch_size eval_seeds chain_steps chain_every chain_batch_size"
    ).split():
        if flat[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {flat[name]}: it must be 1 or more")
    for name in "alpha gamma map_lr lambda_x lambda_u expert_lr chain_eta".split():
        if not 0 < flat[name] < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {flat[name]}: it must be above 0")
    for name in "threads depth cpus_per_actor gpus_per_actor chain_d chain_weight_decay".split():
        if flat[name] < 0:
            raise UserError(f"--{name.replace('_', '-')} is {flat[name]}: it must be 0 or more")
    for name in ("momentum", "chain_friction"):
        if not 0 <= flat[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {flat[name]}: it must be from 0 to below 1")
    if flat["chain_every"] > flat["chain_steps"]:
        raise UserError("--chain-every is above --chain-steps: no posterior sample would be taken; lower it")
    names = config.networks.architectures
    if not names or len(set(names)) < len(names):
        raise UserError(f"--architectures {' '.join(names)}: name each network once")
    if config.distillation.method != "random":
        expert_epochs(flat["start_epoch"], flat["start_rule"], flat["expert_epochs"])


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


def specs(config: Config, dataset: Dataset) -> list[Spec]:
    """One network an architecture, each built once so that what can't be built is said here. Raises UserError."""
    n = config.networks
    depth = n.depth or default_depth(dataset.image_shape[1])
    found = [Spec(name, dataset.image_shape, len(dataset.classes), n.width, depth) for name in n.architectures]
    for spec in found:
        Network(spec)
    return found


def store(config: Config, dataset: Dataset, spec: Spec) -> ExpertStore:
    """The experts of one network. Raises UserError where the folder holds others."""
    e = config.experts
    recipe = Recipe(
        data=dataset.name, fingerprint=dataset.fingerprint, image_shape=dataset.image_shape, classes=spec.classes,
        architecture=spec.architecture, width=spec.width, depth=spec.depth, epochs=e.expert_epochs, lr=e.expert_lr,
        batch_size=e.expert_batch_size, augment=config.networks.augment, dtype=e.expert_dtype, seed=e.expert_seed,
    )  # fmt: skip
    root = Path(e.experts).expanduser() if e.experts else home() / "experts"
    return ExpertStore(expert_files.folder(root.absolute(), recipe), recipe)


def threads(config: Config) -> int:
    """CPU threads of a gradient."""
    return config.execution.threads or max(1, (os.cpu_count() or 1) // len(config.networks.architectures))


@contextmanager
def backend(config: Config, interruption: Interruption, log: Log, **ray_options: Any) -> Iterator[Backend]:
    """The backend of a configuration, closed at the end; signals are caught from here on. Raises UserError."""
    x = config.execution
    if x.backend == "serial":
        opened: Backend = Serial(x.device, interruption)
    else:
        try:
            from fbpc_ray.cluster.backend import RayBackend
        except ImportError as error:
            raise UserError(
                f"ray is not installed ({error}): pip install 'ray[default]', or use --backend serial"
            ) from None
        opened = RayBackend(
            address=x.address, device=x.device, gpus_per_actor=x.gpus_per_actor, cpus_per_actor=x.cpus_per_actor,
            interruption=interruption, log=log, **ray_options,
        )  # fmt: skip
    interruption.install()
    try:
        yield opened
    finally:
        opened.close()
