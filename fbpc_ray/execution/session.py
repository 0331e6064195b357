"""A session: a configuration with its data set, networks, expert stores and steps."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log
from fbpc_ray.core.provenance import home
from fbpc_ray.core.storage import Place, place
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data import coreset_reader, sources
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.coreset_reader import Loaded
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.data.resize import SeveralSizes
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.expert_format import Recipe
from fbpc_ray.distillation.expert_store import ExpertStore, open_store
from fbpc_ray.distillation.expert_training import train_missing_experts
from fbpc_ray.distillation.loop import Step, distill_steps
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import (
    State,
    begin_as,
    coreset_images,
    initial_state,
    scale_of_confidence,
    with_soft_labels,
)
from fbpc_ray.distillation.worker import Backend, WorkerGroupSpec
from fbpc_ray.execution import memory_budget, memory_estimate
from fbpc_ray.execution.coreset_settings import coreset_settings
from fbpc_ray.execution.worker_group import worker_group
from fbpc_ray.models import checks, functional
from fbpc_ray.models.functional import Spec


@dataclass(frozen=True)
class Session:
    """A configuration with its data set, networks and expert stores."""

    config: Config
    dataset: Dataset
    specs: list[Spec]
    stores: list[ExpertStore]
    """The experts of each network; none for a method without experts."""
    given: Coreset | None = None
    """What --initial-coreset names, where Python gives a coreset in the place of a path."""
    coresets: dict[str, Coreset] = field(default_factory=dict)
    """By name, what an evaluation of other coresets than this session's scores; the random one first."""
    restored: State | None = None
    """The checkpoint that a resumed run goes on from, which needs no --initial-coreset."""
    experts_alone: bool = False
    """Whether the command trains experts and nothing else."""

    @property
    def scored(self) -> list[str]:
        """Names of the coresets that the evaluation scores."""
        return list(self.coresets) or list(dict.fromkeys(("random", self.config.distillation.method)))

    @property
    def num_steps(self) -> int:
        """Steps of the distillation; 0 for a method that learns nothing."""
        return num_steps(self.config)

    @cached_property
    def initial(self) -> tuple[State, Tensor]:
        """The state before step 1, and the labels (m,). Raises UserError for a wrong --initial-coreset."""
        state, labels = self.real
        if self.initial_coreset is not None:
            state = begin_as(state, labels, self.initial_coreset.coreset, self.dataset)
        return state, labels

    @property
    def current(self) -> State:
        """The state before the next step: the checkpoint's, else the initial one. Raises UserError as `initial`."""
        return self.restored or self.initial[0]

    @cached_property
    def initial_coreset(self) -> Loaded | None:
        """What --initial-coreset names; None for real images. Raises UserError."""
        if self.given is not None:
            return coreset_reader.fit(self.given, self.dataset, "--initial-coreset")
        path = self.config.distillation.initial_coreset
        return coreset_reader.load(place(path), self.dataset) if path else None

    @cached_property
    def real(self) -> tuple[State, Tensor]:
        """Real images as a state, with the soft labels that a method begins with, and their labels (m,).

        Algorithm 1 begins with them, and results are compared with them.
        """
        d = self.config.distillation
        state, labels = initial_state(self.dataset, d.ipc, d.seed, d.inner_lr)
        if d.method in network_pool.METHODS:
            state = with_soft_labels(state, labels, len(self.dataset.classes), d.label_scale)
        elif d.learn_labels:
            scale = scale_of_confidence(d.label_confidence, len(self.dataset.classes))
            state = with_soft_labels(state, labels, len(self.dataset.classes), scale)
        return state, labels

    @property
    def labels(self) -> Tensor:
        return self.real[1]

    def coreset(self, state: State) -> Coreset:
        """Return the pseudocoreset of `state`."""
        data = self.dataset
        facts = {
            "method": self.config.distillation.method, "data": data.name, "step": str(state.step),
            "fingerprint": data.fingerprint, "settings": json.dumps(coreset_settings(self.config)),
        }  # fmt: skip
        return Coreset(coreset_images(state), self.labels, data.mean, data.std, data.classes, state.soft_labels, facts)

    def start(self, run: RunDirectory) -> tuple[State, list[dict[str, Any]]]:
        """Return the state and the metrics of the checkpoint in `run`; before the first one, `initial` and no metrics.

        Raises UserError for a damaged checkpoint, and as `initial`.
        """
        return run.restore(self.labels, self.dataset.image_shape) or (self.initial[0], [])

    def train_experts(self, workers: TaskRunner, log: Log) -> None:
        """Train the trajectories that are missing; none for a method without experts."""
        if not self.stores:
            return
        root = expert_root(self.config)
        if isinstance(root, Path) and workers.uses_other_machines:
            log(shared_folder_note(root, "--experts"))
        count = self.config.experts.expert_count
        train_missing_experts(self.stores, self.specs, count, self.dataset, workers, log)

    def worker_group(self) -> WorkerGroupSpec:
        """Describe the workers of the distillation."""
        return worker_group(self.config, self.dataset, self.labels, self.specs, self.stores)

    def steps(self, state: State, workers: Backend) -> Iterator[Step]:
        """Start the workers, yield the steps from `state` to the last one, and stop the workers."""
        if state.step >= self.num_steps:
            return
        workers.start_workers(self.worker_group())
        yield from distill_steps(self.config.distillation, self.config.networks.architectures, state, workers)
        workers.stop_workers()


def open_session(config: Config, log: Log, dataset: Dataset | None = None, *, experts_alone: bool = False) -> Session:
    """Load the data set, unless given, build the networks and open the stores. Writes nothing but a download.

    With `experts_alone` only the training of experts must fit into memory.

    Raises UserError for data that can't be read, a network that can't be built, or a damaged store.
    """
    dataset = load_data(config, log) if dataset is None else dataset
    specs = network_specs(config, dataset)
    images, m = len(dataset.train.labels), config.distillation.ipc * len(dataset.classes)
    if not experts_alone:
        config = memory_budget.with_chunks(config, specs, images=images, coreset=m, distils=num_steps(config) > 0)
    check_memory(config, dataset, specs, ["experts"] if experts_alone else phases_of(config))
    stores = [expert_store(config, dataset, spec) for spec in specs] if uses_experts(config) else []
    return Session(config, dataset, specs, stores, experts_alone=experts_alone)


def check_memory(config: Config, dataset: Dataset, specs: Sequence[Spec], phases: Sequence[str] | None = None) -> None:
    """Raise UserError if `phases`, by default those of a run, cannot fit into this machine's memory."""
    images, m = len(dataset.train.labels), config.distillation.ipc * len(dataset.classes)
    phases = phases_of(config) if phases is None else phases
    memory_estimate.check(config, specs, phases, images=images, coreset=min(m, images))


def phases_of(config: Config) -> list[str]:
    """Return the phases of a run, names of `memory_estimate.PHASES`."""
    return ["experts"] * uses_experts(config) + ["distillation"] * bool(num_steps(config)) + ["evaluation"]


def num_steps(config: Config) -> int:
    """Return the steps of a distillation; 0 for a method that learns nothing."""
    return 0 if config.distillation.method == "random" else config.distillation.steps


def uses_experts(config: Config) -> bool:
    """Return whether the method compares u with experts."""
    return config.distillation.method not in ("random", *network_pool.METHODS)


def load_data(config: Config, log: Log) -> Dataset:
    """Load the data set of a configuration. Raises UserError."""
    d = config.data
    dataset = sources.load(d.data, d.test, d.validation, None, d)
    for note in dataset.notes:
        log(f"note: {note}")
    return dataset


FLAGS_OF_READERS = (
    (r", such as by --image-size \d+", ""),
    (r"name (the|another) column with --(?:image|label)-column", r"rename \1 column"),
    (r"; --resize stretch takes it", ""),
)
"""(advice with a flag of readers, the same without it)."""


def load_as_it_is(config: Config, log: Log, more: str = "") -> Dataset:
    """Load data that the command has no flags to read otherwise: errors say what to change in the files.

    `more` ends the error on images of several sizes. Raises UserError as `load_data`.
    """
    try:
        return load_data(config, log)
    except UserError as error:
        message = str(error)
        for flag, fix in FLAGS_OF_READERS:
            message = re.sub(flag, fix, message)
        if isinstance(error, SeveralSizes):
            message += more
        raise type(error)(message, error.code) from error.__cause__


def load_ood(config: Config, name: str, dataset: Dataset, resize: bool, log: Log) -> Dataset:
    """Load the data set of --ood, whose columns, splits and normalisation are its own.

    With `resize`, images of several sizes are resized to the square images of `dataset` as --image-size does; images of
    one size stay for `ood_split`. Raises UserError.
    """
    own = config.updated(data=name, normalisation="auto", label_column="", image_column="", test=0.0)
    try:
        return load_as_it_is(own, log, "" if resize else ", or add --ood-resize")
    except SeveralSizes:
        _, height, width = dataset.image_shape
        if not resize or height != width:
            raise
        return load_as_it_is(own.updated(image_size=height), log)


def network_specs(config: Config, dataset: Dataset | Coreset) -> list[Spec]:
    """Specify one network per architecture, for the images and classes of `dataset`.

    Builds each network once. Raises UserError for one that can't be built, or doesn't fit into this machine's memory.
    """
    n = config.networks
    shape, classes = dataset.image_shape, len(dataset.classes)
    specs = [functional.specify(name, shape, classes, n.width, n.depth) for name in n.architectures]
    memory_estimate.check(config, specs, [])
    for spec in specs:
        checks.check(spec)
    return specs


def expert_store(config: Config, dataset: Dataset, spec: Spec) -> ExpertStore:
    """Open the experts of one network; experts of another recipe lie beside them. Raises UserError for damage."""
    e = config.experts
    recipe = Recipe(
        data=dataset.name, fingerprint=dataset.fingerprint, image_shape=dataset.image_shape, classes=spec.classes,
        architecture=spec.architecture, width=spec.width, depth=spec.depth, epochs=e.expert_epochs, lr=e.expert_lr,
        batch_size=e.expert_batch_size, augment=config.networks.augment, dtype=e.expert_dtype, seed=e.expert_seed,
        precision=config.networks.precision,
    )  # fmt: skip
    return open_store(expert_root(config), recipe)


def expert_root(config: Config) -> Place:
    """Return the folder that holds the experts of all recipes, absolute."""
    experts = config.experts.experts
    return (place(experts) if experts else home() / "experts").absolute()


def shared_folder_note(folder: Path, flag: str) -> str:
    """Return the note on a local folder that processes on several machines read and write."""
    return f"note: all nodes must see {folder}; where they don't share it (NFS), give {flag} s3://BUCKET/PREFIX"
