"""Where work runs: the seam between the driver and its workers, and the backend that needs nothing but this process."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fbpc_ray.allocator import keep_freed_memory
from fbpc_ray.distill import State, Worker
from fbpc_ray.errors import UserError
from fbpc_ray.methods.common import Gradient
from fbpc_ray.signals import Interruption

Item = TypeVar("Item")
Result = TypeVar("Result")


class Backend(Protocol):
    """Two kinds of work: independent tasks, and the gradients of one step."""

    def map(
        self, function: Callable[[Any, Item, str], Result], shared: Any, items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, function(shared, item, device)) as they are done, each on one CPU thread."""
        ...

    def start_workers(self, shared: dict[str, Any], each: Sequence[dict[str, Any]], threads: int) -> None:
        """One `distill.Worker` for each dict of its own arguments, beside those that all share."""
        ...

    def gradients(self, state: State) -> list[Gradient]:
        """The gradient of every worker at `state`, in the order of the workers."""
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
        self.workers: list[Worker] = []

    def map(self, function, shared, items):
        torch.set_num_threads(1)
        for index, item in enumerate(items):
            with self.interruption.at_once():
                result = function(shared, item, self.device)
            yield index, result

    def start_workers(self, shared, each, threads):
        self.workers = [Worker(**shared, **own, device=self.device, threads=threads) for own in each]

    def gradients(self, state):
        gradients = []
        for worker in self.workers:
            value, stats, inner_lr = worker.gradient(state.step, state.images.numpy(), state.inner_lr)
            gradients.append(Gradient(torch.from_numpy(value), stats, inner_lr))
        return gradients

    def stop_workers(self):
        self.workers = []

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
