"""Computes gradients: a worker per architecture and draw, wherever it runs.

A method's gradient is a pure function of (images, seed, step, architecture): the same bits on any worker, in any order,
as often as a backend asks for it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fbpc_ray.core import cache
from fbpc_ray.core.allocator import keep_freed_memory
from fbpc_ray.core.config import Distillation
from fbpc_ray.core.numerics import gpu_memory, numerics
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data.datasets import Dataset, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.methods import bpc, fbpc, vbpc
from fbpc_ray.distillation.methods.common import ExpertSide, Gradient, GradientContext, GradientStats, Method
from fbpc_ray.distillation.state import GradientTask, State
from fbpc_ray.distillation.trajectory_cache import TrajectoryCache
from fbpc_ray.models import compiler
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import Passes
from fbpc_ray.models.precision import require

METHODS: dict[str, Method] = {
    "fbpc": fbpc.gradient,
    "fbpc-isotropic": fbpc.gradient,
    "bpc-fkl": bpc.forward,
    "bpc-rkl": bpc.reverse,
    "bpc-w": bpc.distance,
    "vbpc": vbpc.gradient,
    "frepo": vbpc.gradient,
}
"""Values of `--method`, beside `random`, which learns nothing."""

EXPERT_SIDES: dict[str, ExpertSide] = {"fbpc": fbpc.expert_side}
"""Methods whose gradient has a costly part that does not depend on u; the gradient takes it as `expert_side`."""


class GradientArrays(NamedTuple):
    """A `Gradient` with numpy arrays."""

    value: np.ndarray
    """(m, c, h, w), or its rows that are not zero, (b, c, h, w): a batch of a large coreset travels as a batch."""
    stats: GradientStats
    inner_lr: float = 0.0
    solution: np.ndarray | None = None
    soft_labels: np.ndarray | None = None
    rows: np.ndarray | None = None
    """(b,) int64: the indices of `value` among the m images; None where `value` has them all."""
    num_images: int = 0
    """m, where `value` has not all of them."""


class WorkerArguments(NamedTuple):
    """Arguments of `Worker`, but for the device. Plain data."""

    specs: Sequence[Spec]
    stores: Sequence[ExpertStore]
    """The experts of each network."""
    dataset: Dataset
    labels: np.ndarray
    """(m,) int64: the pseudocoreset's."""
    settings: Distillation
    augment: str
    expert_count: int
    threads: int
    """CPU threads of a gradient."""
    compiled: bool = False
    """Run compiled passes (models/passes.py)."""
    trajectory_cache_bytes: float = 0.0
    """Bytes of the node's disk for the trajectory cache; 0: no cache."""
    precision: str = "fp32"
    """Number format of the MAP solve and of the SGD steps."""
    chunk_images: int = 0
    """Most images of one pass; 0: a batch is passed at once."""


class WorkerGroupSpec(NamedTuple):
    """The workers of a distillation and the gradients of each of its steps."""

    worker: WorkerArguments
    tasks: list[GradientTask]
    expert_side_bytes: int = 0
    """Size of the largest part of a gradient that can be computed ahead; 0 where no part can."""


class Backend(TaskRunner, Protocol):
    """Where work runs: independent tasks, and the gradients of one step."""

    def start_workers(self, group: WorkerGroupSpec) -> None:
        """Start the workers of `group`. From here on, they run the tasks of `map` too."""
        ...

    def gradients(self, state: State) -> list[Gradient | None]:
        """Return the gradient of every task of the group at `state`, in order; None for a skipped straggler."""
        ...

    def stop_workers(self) -> None:
        """Free what `start_workers` took."""
        ...

    def describe(self) -> str:
        """Name the device and its place in words."""
        ...

    def close(self) -> None: ...


class Worker:
    """Computes gradients for any architecture of a run; holds networks, experts and real images, no random state."""

    def __init__(
        self,
        specs: Sequence[Spec],
        stores: Sequence[ExpertStore],
        dataset: Dataset,
        labels: np.ndarray,
        settings: Distillation,
        augment: str,
        expert_count: int,
        *,
        device: str,
        threads: int,
        compiled: bool = False,
        trajectory_cache_bytes: float = 0.0,
        precision: str = "fp32",
        chunk_images: int = 0,
    ):
        """See `WorkerArguments`."""
        keep_freed_memory()
        self.specs, self.stores, self.settings = specs, stores, settings
        self.augment, self.expert_count = augment, expert_count
        self.device, self.threads, self.precision, self.chunk_images = device, threads, precision, chunk_images
        with gpu_memory():
            self.real = DeviceDataset(*tensors(dataset.train, device), dataset.mean, dataset.std)
        self.labels = torch.tensor(labels, device=device)
        self.compiled = compiler.folder() if compiled and device == "cpu" else None
        self.trajectory_cache = (
            TrajectoryCache(cache.folder() / "x-sides", trajectory_cache_bytes) if trajectory_cache_bytes else None
        )
        self.passes: dict[int, Passes] = {}

    def gradient(
        self,
        task: GradientTask,
        step: int,
        images: np.ndarray,
        inner_lr: float,
        expert_side: np.ndarray | None = None,
        start: np.ndarray | None = None,
        soft_labels: np.ndarray | None = None,
    ) -> GradientArrays:
        """Return a `Gradient` as numpy arrays, which travel between processes without a copy.

        Args:
            expert_side: the block that `expert_side` returned, if it was computed ahead.
            start: (P,) of `state.map_start`; None: a draw of the prior.
            soft_labels: (m, d), if the method learns them.
        """
        labels = None if soft_labels is None else torch.tensor(soft_labels, device=self.device)
        optional = {"expert_side": expert_side, "start": start, "soft_labels": labels}
        with numerics(self.threads, self.device):
            gradient = METHODS[self.settings.method](
                self._context(task), step, torch.tensor(images, device=self.device), inner_lr,
                **{name: value for name, value in optional.items() if value is not None},
            )  # fmt: skip
        value, rows = _without_zero_rows(gradient.value.numpy())
        return GradientArrays(
            value, gradient.stats, gradient.inner_lr, _array(gradient.solution), _array(gradient.soft_labels), rows,
            len(images),
        )  # fmt: skip

    def expert_side(self, task: GradientTask, step: int) -> tuple[None, np.ndarray]:
        """Compute what `gradient` needs for `task` at `step` whatever the images are.

        Returns (None, block): a caller fetches the first, which costs nothing, to know that the second is ready."""
        with numerics(self.threads, self.device):
            return None, EXPERT_SIDES[self.settings.method](self._context(task), step)

    def call(self, function: Callable[[Any, Any, str], Any], shared: Any, item: Any) -> Any:
        """Run another task on this worker's device and one CPU thread."""
        with numerics(1, self.device):
            return function(shared, item, self.device)

    def _context(self, task: GradientTask) -> GradientContext:
        index = task.architecture
        if index not in self.passes:
            require(self.precision, self.device)
            network = Network(self.specs[index], self.device)
            self.passes[index] = Passes(network, self.compiled, self.precision, self.chunk_images)
        return GradientContext(
            self.passes[index], self.stores[index] if self.stores else None, self.real, self.labels, self.settings,
            self.augment, self.expert_count, task.draw, self.trajectory_cache,
        )  # fmt: skip


def _without_zero_rows(value: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the rows of `value` that are not zero, with their indices; all of it, and None, where most are not."""
    rows = np.flatnonzero(value.reshape(len(value), -1).any(1))
    return (value[rows], rows) if 2 * len(rows) <= len(value) else (value, None)


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()
