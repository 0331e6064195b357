"""Ways of an outer step that jobs/benchmark.py times: the reference, the floor, warm starts, training, a first run."""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import reference

from fbpc_ray.core.config import Config
from fbpc_ray.core.numerics import numerics
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.types import Batch
from fbpc_ray.data.datasets import Dataset, Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.expert_training import train_expert
from fbpc_ray.distillation.state import GradientTask, gradient_tasks, initial_state
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.worker_group import worker_group
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import Passes

EVERY = 10
"""Steps of a first run of which the reference takes one."""


class Case(NamedTuple):
    """What every way of a case begins with."""

    config: Config
    dataset: Dataset
    specs: list[Spec]
    stores: list[ExpertStore]
    images: np.ndarray
    labels: Tensor


def write_untrained(store: ExpertStore, spec: Spec, numbers: Sequence[int]) -> None:
    """Write trajectories of fresh draws: no time depends on the values of an expert's weights."""
    network, epochs = Network(spec), range(store.recipe.epochs + 1)
    for number in numbers:
        store.write(number, (network.module(generator(number, "benchmark", e)).state_dict() for e in epochs))


def worker(case: Case, config: Config, **more: Any) -> Worker:
    arguments = worker_group(config, case.dataset, case.labels, case.specs, case.stores).worker._asdict() | more
    return Worker(**arguments, device=config.workers.device)


def timed(way: Callable[[int], None], steps: Sequence[int], device: str) -> float:
    """Return the seconds of one of `steps`."""
    began = time.perf_counter()
    for step in steps:
        way(step)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(steps)


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "all": values}


def ratios_of(seconds: dict[str, list[float]], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return {"a / b": spread of the ratios within each repeat} for the pairs of which both were timed."""
    return {
        f"{a} / {b}": spread([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])
        for a, b in pairs
        if a in seconds and b in seconds
    }


def pool_of(case: Case, device: str, size: int, repeats: int, map_steps: list[int]) -> Callable[[int], None]:
    """Return a function that takes a step of a `--map-init warm` distillation whose solutions all were used twice."""
    config = case.config.updated(map_init="warm", warm_pool_size=size)
    d, backend = config.distillation, Serial(device, Interruption())
    backend.start_workers(worker_group(config, case.dataset, case.labels, case.specs, case.stores))
    state, _ = initial_state(case.dataset, d.ipc, d.seed)
    before = 2 * d.warm_pool_size
    assert backend.worker is not None
    for number in range(before + d.warm_pool_size * repeats):
        for unit in backend.tasks:
            backend.worker.expert_side(unit, number)

    def go_on(_: int) -> None:
        nonlocal state
        done = loop.take_step(config.distillation, config.networks.architectures, state, backend)
        state = done.state
        map_steps.extend(gradient.stats.map_steps or 0 for _, _, gradient in done.gradients)

    for number in range(before):
        go_on(number)
    map_steps.clear()
    return go_on


def training(case: Case, device: str, threads: int, repeats: int) -> dict[str, Any]:
    """Time a batch of 256 images of expert training, and of a bare loop: one fixed batch, no augmentation."""
    size, batches, network = 256, 4, Network(case.specs[0], device)
    split = case.dataset.train
    few = Split(split.images[: size * batches], split.labels[: size * batches])
    data = DeviceDataset(*tensors(few, device), case.dataset.mean, case.dataset.std)
    fixed, module = data.batch(torch.arange(min(size, len(data)))), network.module(generator(0, "benchmark"))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)

    def train_epoch(number: int) -> None:
        for _ in train_expert(
            network, data, epochs=1, learning_rate=0.01, batch_size=size, augment="dsa", seed=0, index=number
        ):
            pass

    def bare(_: int) -> None:
        for _ in range(batches):
            optimiser.zero_grad(set_to_none=True)
            cross_entropy(module(fixed.images), fixed.labels).backward()
            optimiser.step()

    with numerics(threads, device):
        pairs = [[timed(way, [n], device) / batches for way in (train_epoch, bare)] for n in range(repeats)]
    ours, alone = ([pair[side] for pair in pairs] for side in (0, 1))
    return {"ours": spread(ours), "bare loop": spread(alone), "ratio": spread([a / b for a, b in pairs])}


def first_run(case: Case, steps: int, threads: int, folder: Path, elsewhere: Executor) -> dict[str, Any]:
    """Time the first `steps` of a run: 30 snapshots, `--compiled auto`, both caches empty.

    The reference takes every tenth of these steps.
    """
    config = case.config.updated(
        steps=steps, compiled="auto", expert_count=5, expert_epochs=6, experts=str(folder / "first-experts")
    )
    stores = [session.expert_store(config, case.dataset, spec) for spec in case.specs]
    for spec, store in zip(case.specs, stores, strict=True):
        write_untrained(store, spec, store.missing(5))
    flat, seconds = json.dumps(config.flat()), {"reference": 0.0, "ours": 0.0}
    elsewhere.submit(reference_seconds, flat, threads, [0]).result()
    before = os.environ["FBPC_CACHE"]
    with tempfile.TemporaryDirectory(prefix="cache-", dir=folder) as empty:
        os.environ["FBPC_CACHE"] = empty
        try:
            began = time.perf_counter()
            fresh = worker(case._replace(stores=stores), config)
            seconds["ours"] += time.perf_counter() - began
            for step in range(steps):
                for unit in gradient_tasks(len(case.specs), 1):
                    began = time.perf_counter()
                    fresh.gradient(unit, step, case.images, 0.0)
                    seconds["ours"] += time.perf_counter() - began
                if step % EVERY == 0:
                    took = elsewhere.submit(reference_seconds, flat, threads, [step]).result()
                    seconds["reference"] += took * min(EVERY, steps - step)
        finally:
            os.environ["FBPC_CACHE"] = before
    return {
        "steps": steps, "compiled": fresh.compiled is not None, "seconds": seconds,
        "reference / ours": seconds["reference"] / seconds["ours"],
    }  # fmt: skip


@cache
def _reference_of(flat: str) -> tuple[Any, ...]:
    """Load what the reference needs, once a process."""
    config = Config().updated(**json.loads(flat))
    dataset = session.load_data(config, print)
    networks = []
    for spec in session.network_specs(config, dataset):
        store = session.expert_store(config, dataset, spec)
        networks.append((spec, [store.read(0, epoch) for epoch in range(config.experts.expert_epochs + 1)]))
    state, labels = initial_state(dataset, config.distillation.ipc, config.distillation.seed)
    real = DeviceDataset(*tensors(dataset.train, "cpu"), dataset.mean, dataset.std)
    return networks, real, state.images, labels, config.distillation


def reference_seconds(flat: str, threads: int, steps: list[int]) -> float:
    """Time a step of the reference on the CPU, in a process without our settings of the allocator."""
    networks, real, images, labels, settings = _reference_of(flat)
    torch.set_num_threads(threads)
    began = time.perf_counter()
    for number in steps:
        for spec, snapshots in networks:
            reference.gradient(spec, snapshots, real, images, labels, number, settings)
    return (time.perf_counter() - began) / len(steps)


def floor_of(
    ours: Worker,
    case: Case,
    unit: GradientTask,
    map_steps: dict[tuple[GradientTask, int], int],
    device: str,
    threads: int,
) -> Callable[[int], None]:
    """Return the passes of a gradient with a cached expert side.

    These are MAP steps and K steps with their backward pass, 2 K passes for Psi, and the two of Eq. 17.
    """
    network, steps = Network(case.specs[unit.architecture], device), case.config.distillation.posterior_steps
    passes, forward = Passes(network, ours.compiled), network.forward
    params = network.init(generator(0, "benchmark"))
    images = torch.randn(len(case.labels), *case.dataset.image_shape, generator=generator(0, "images")).to(device)
    batch = Batch(images, case.labels.to(device))

    def step(number: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(map_steps[unit, number] + 1 + steps):
            passes.loss_and_grad(params, batch)
        for _ in range(2 * steps):
            passes.logits(params, images)
        for _ in range(2):
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(forward(params, leaf).sum(), leaf)

    return step
