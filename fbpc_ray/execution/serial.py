"""Where work runs: the seam between the driver and its workers, and the backend that needs nothing but this process."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from fbpc_ray.core.allocator import keep_freed_memory
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation.methods.common import Gradient, Stats
from fbpc_ray.distillation.worker import GradientTask, State, Worker, map_start, threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerGroupSpec(NamedTuple):
    """What the workers of a distillation are made of, and what each step asks of them."""

    arguments: dict[str, Any]
    """Of `distill.Worker`, but for the device."""
    units: list[GradientTask]
    expert_side_bytes: int = 0
    """Of the largest part of a gradient that can be computed ahead; 0 where there is none."""


def gradient_of(answer: tuple[np.ndarray, Stats, float, np.ndarray | None]) -> Gradient:
    """What `Worker.gradient` returned."""
    value, stats, inner_lr, solution = answer
    return Gradient(torch.from_numpy(value), stats, inner_lr, None if solution is None else torch.from_numpy(solution))


class Backend(Protocol):
    """Two kinds of work: independent tasks, and the gradients of one step."""

    device: str
    """cpu or cuda."""

    def map(
        self, function: Callable[[Any, Item, str], Result], shared: Any, items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, function(shared, item, device)) as they are done, each on one CPU thread."""
        ...

    def start_workers(self, crew: WorkerGroupSpec) -> None:
        """Workers for the gradients of `crew`. From here on, `map` is their work too."""
        ...

    def gradients(self, state: State) -> list[Gradient | None]:
        """The gradient of every unit of the crew at `state`, in order; None for one that was skipped as too slow."""
        ...

    def stop_workers(self) -> None:
        """Free what `start_workers` took."""
        ...

    def describe(self) -> str:
        """Device and place in words."""
        ...

    def close(self) -> None: ...


class Serial:
    """All work in this process, one piece after the other."""

    def __init__(self, device: str, interruption: Interruption):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but torch finds no CUDA device here: use --device cpu")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.interruption = interruption
        keep_freed_memory()
        self.worker: Worker | None = None
        self.units: list[GradientTask] = []

    def map(self, function, shared, items):
        for index, item in enumerate(items):
            with self.interruption.at_once(), threads(1):
                result = function(shared, item, self.device)
            yield index, result

    def start_workers(self, crew):
        self.worker, self.units = Worker(**crew.arguments, device=self.device), crew.units

    def gradients(self, state):
        assert self.worker is not None
        gradients: list[Gradient | None] = []
        for unit in self.units:
            start = map_start(state, unit, self.worker.settings)
            answer = self.worker.gradient(unit, state.step, state.images.numpy(), state.inner_lr, start=start)
            gradients.append(gradient_of(answer))
        return gradients

    def stop_workers(self):
        self.worker = None

    def describe(self):
        return f"{device_name(self.device)}, in this process"

    def close(self):
        self.stop_workers()


def device_name(device: str) -> str:
    """The device in words: the GPU's name, or the processor's and its number of cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
