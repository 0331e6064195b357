"""Expert training (App. C.1): plain SGD on the whole training set, a snapshot after every epoch."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbpc_ray.core.progress import Log, progress, set_part
from fbpc_ray.core.rng import generator
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data.datasets import Dataset, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.expert_format import Recipe
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.models import compiler
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import Passes, count_macs
from fbpc_ray.models.precision import autocast, require


def train_expert(
    network: Network,
    data: DeviceDataset,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    augment: str,
    seed: int,
    index: int,
    precision: str = "fp32",
    folder: Path | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the module's state (parameters and buffers, on the CPU) at epochs 0 (the initialisation) to `epochs`.

    A trajectory depends on `seed`, `index` and the arguments alone. The tensors yielded may be those that the next
    epoch changes: copy what is kept.

    Args:
        precision: of the passes; the parameters, and what is yielded, are float32.
        folder: of compiled functions. With it, passes of whole batches are compiled; not for a network with buffers.
    """
    name = network.spec.architecture
    module = network.module(generator(seed, "expert", name, index, "init"))
    parameters, passes = list(module.parameters()), Passes(network, folder, precision) if folder else None
    yield _state(module)
    for epoch in range(1, epochs + 1):
        for batch in data.epoch(batch_size, augment, generator(seed, "expert", name, index, "epoch", epoch)):
            if passes is not None and len(batch.labels) == batch_size:
                gradients = passes.loss_and_grad(dict(module.named_parameters()), batch)[1].values()
            else:
                with autocast(precision, network.device.type):
                    logits = module(batch.images).float()
                gradients = torch.autograd.grad(cross_entropy(logits, batch.labels), parameters)
            with torch.no_grad():  # SGD by hand: torch.optim has each process import torch's compiler, for seconds
                for value, gradient in zip(parameters, gradients, strict=True):
                    value.add_(gradient, alpha=-learning_rate)
        yield _state(module)


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


class ExpertTask(NamedTuple):
    """One trajectory to train."""

    spec: Spec
    store: ExpertStore
    number: int


CPU_FLOPS = 3e10
"""Floating-point operations a second of one CPU core in a training pass, to within a factor of two."""
COMPILE_FROM = 3e12
"""Floating-point operations of a trajectory, two minutes of CPU time, from which its bf16 passes are compiled."""
MAX_ACCURACY_IMAGES = 1000
"""Training images, spread over all, on which the accuracy of an expert is measured."""
MIN_SGD_STEPS = 100
"""SGD steps below which an expert learns little."""


def run_expert_task(dataset: Dataset, task: ExpertTask, device: str) -> float:
    """Train a trajectory and write it, unless another run has; return its last epoch's accuracy on training images."""
    recipe, network = task.store.recipe, Network(task.spec, device)
    data = DeviceDataset(*tensors(dataset.train, device), dataset.mean, dataset.std)
    require(recipe.precision, device)
    compiled = compiles_training(recipe, network, len(data))
    if not task.store.is_complete(task.number):
        snapshots = train_expert(
            network, data, epochs=recipe.epochs, learning_rate=recipe.lr, batch_size=recipe.batch_size,
            augment=recipe.augment, seed=recipe.seed, index=task.number,
            precision=recipe.precision, folder=compiler.folder() if compiled else None,
        )  # fmt: skip
        task.store.write(task.number, _counted(snapshots, recipe.epochs))
    snapshot = task.store.read(task.number, recipe.epochs)
    buffers = {name: snapshot[name].to(device) for name in network.buffer_names}
    params = network.parameters_of(snapshot)
    index = torch.linspace(0, len(data) - 1, min(MAX_ACCURACY_IMAGES, len(data))).long()
    correct = 0
    for batch in map(data.batch, index.split(100)):
        correct += int((network.predict(params, buffers, batch.images).argmax(1) == batch.labels).sum())
    return correct / len(index)


def _counted(snapshots: Iterator[dict[str, Tensor]], epochs: int) -> Iterator[dict[str, Tensor]]:
    """Pass on the snapshots of epochs 0 to `epochs`, and report the share of the trajectory."""
    for epoch, snapshot in enumerate(snapshots):
        set_part(epoch, epochs)
        yield snapshot


def compiles_training(recipe: Recipe, network: Network, images: int) -> bool:
    """Return whether the passes of training are compiled: bf16 on a CPU, where eager bf16 is slower than fp32.

    The answer depends on the recipe and the data alone, so that every command trains the same bits.
    """
    if recipe.precision == "fp32" or network.device.type != "cpu" or network.buffer_names:
        return False
    return 6.0 * count_macs(network) * recipe.epochs * images >= COMPILE_FROM


def train_missing_experts(
    stores: Sequence[ExpertStore], specs: Sequence[Spec], count: int, dataset: Dataset, workers: TaskRunner, log: Log
) -> None:
    """Train what each store lacks of its first `count` trajectories; one store for each network of `specs`."""
    for store in stores:
        store.claim()
    # Trajectory by trajectory over the architectures, so that an interrupted training leaves a little of each.
    tasks = sorted(
        (ExpertTask(spec, store, n) for spec, store in zip(specs, stores, strict=True) for n in store.missing(count)),
        key=lambda task: task.number,
    )
    total = count * len(stores)
    line = f"experts: {total - len(tasks)} of {total} trajectories are there"
    if tasks:
        line += f", training {len(tasks)}"
        hours = training_flops(tasks, len(dataset.train.labels)) / CPU_FLOPS / 3600
        if workers.device == "cpu" and hours >= 1:
            line += f", which takes something like {hours:,.0f} hours of a CPU core (fewer: --expert-count, --width)"
    log(line)
    if not tasks:
        return
    for note in {short_training_note(store.recipe, len(dataset.train.labels)) for store in stores} - {""}:
        log(note)
    accuracies: dict[str, list[float]] = {}
    with progress("experts", len(tasks), "trajectory", log=log) as bar:
        for index, accuracy in workers.map(run_expert_task, dataset, tasks):
            accuracies.setdefault(tasks[index].spec.architecture, []).append(accuracy)
            bar.update()
    for name, values in accuracies.items():
        log(f"experts of {name}: {100 * statistics.fmean(values):.0f} % of training images right after the last epoch")


def training_flops(tasks: Sequence[ExpertTask], images: int) -> float:
    """Count the floating-point operations of the tasks' training on `images` images; builds each network once."""
    macs = {spec: count_macs(Network(spec)) for spec in dict.fromkeys(task.spec for task in tasks)}
    return sum(6.0 * macs[task.spec] * task.store.recipe.epochs * images for task in tasks)


def short_training_note(recipe: Recipe, images: int) -> str:
    """Return a note on training on `images` images that is too short to learn from; empty if it is long enough."""
    steps = -(-images // recipe.batch_size) * recipe.epochs
    if steps >= MIN_SGD_STEPS:
        return ""
    epochs, size = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}", max(1, min(32, images // 10))
    flags = [f"--expert-batch-size {size}"] * (recipe.batch_size > size) + ["--expert-lr 0.05"] * (recipe.lr < 0.05)
    return (
        f"note: each expert gets only {steps} SGD steps ({images} images in batches of {recipe.batch_size}, {epochs}), "
        f"too few to learn: try {' '.join(flags)}{', or ' if flags else ''}more --expert-epochs"
    )
