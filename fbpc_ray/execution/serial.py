"""`Serial`: the backend that runs all work in this process."""

import os
import platform
from pathlib import Path

import torch

from fbpc_ray.core.allocator import keep_freed_memory
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.numerics import numerics
from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation.methods.common import Gradient
from fbpc_ray.distillation.state import GradientTask, State, labels_of, map_start
from fbpc_ray.distillation.worker import GradientArrays, Worker, WorkerGroupSpec


def gradient_of(answer: GradientArrays) -> Gradient:
    """Rebuild the `Gradient` that `Worker.gradient` returned as arrays."""
    solution, soft_labels = (
        None if array is None else torch.from_numpy(array) for array in (answer.solution, answer.soft_labels)
    )
    value = torch.from_numpy(answer.value)
    if answer.rows is not None:
        value = value.new_zeros(answer.num_images, *value.shape[1:]).index_copy(0, torch.tensor(answer.rows), value)
    return Gradient(value, answer.stats, answer.inner_lr, solution, soft_labels)


class Serial:
    """Runs all work in this process, one piece after the other. A `Backend`."""

    uses_other_machines = False

    def __init__(self, device: str, interruption: Interruption):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but torch finds no CUDA device here: use --device cpu")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.interruption = interruption
        keep_freed_memory()
        self.worker: Worker | None = None
        self.tasks: list[GradientTask] = []

    def map(self, function, shared, items):
        for index, item in enumerate(items):
            with self.interruption.at_once(), numerics(1, self.device):
                result = function(shared, item, self.device)
            yield index, result

    def start_workers(self, group: WorkerGroupSpec) -> None:
        self.worker, self.tasks = Worker(**group.worker._asdict(), device=self.device), group.tasks

    def gradients(self, state: State) -> list[Gradient | None]:
        assert self.worker is not None
        gradients: list[Gradient | None] = []
        for task in self.tasks:
            start = map_start(state, task, self.worker.settings)
            answer = self.worker.gradient(
                task, state.step, state.images.numpy(), state.inner_lr, start=start, soft_labels=labels_of(state)
            )
            gradients.append(gradient_of(answer))
        return gradients

    def stop_workers(self):
        self.worker = None

    def describe(self):
        return f"{device_name(self.device)}, in this process"

    def close(self):
        self.stop_workers()


def device_name(device: str) -> str:
    """Describe the device: the GPU's name, or the processor's and its number of cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
