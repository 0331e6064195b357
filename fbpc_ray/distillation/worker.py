"""The outer loop of every method: the gradients of all architectures, summed, move the pseudocoreset (Algorithm 1).

A method's gradient is a pure function of (images, seed, step, architecture): the same bits on any worker, in any order,
as often as it is asked. `update` sums them in the order of the architectures. Nothing here knows where they run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core import cache
from fbpc_ray.core.allocator import keep_freed_memory
from fbpc_ray.core.config import Distillation
from fbpc_ray.core.errors import UserError
from fbpc_ray.data.datasets import Dataset, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation import warm_start
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.methods import bpc, fbpc
from fbpc_ray.distillation.methods.common import ExpertSide, Gradient, GradientContext, Method, Stats
from fbpc_ray.distillation.trajectory_cache import TrajectoryCache
from fbpc_ray.distillation.warm_start import Solutions
from fbpc_ray.inference.solution import SolverStatus
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import Passes

METHODS: dict[str, Method] = {
    "fbpc": fbpc.gradient,
    "fbpc-isotropic": fbpc.gradient,
    "bpc-fkl": bpc.forward,
    "bpc-rkl": bpc.reverse,
    "bpc-w": bpc.distance,
}
"""What `--method` may be, beside `random`, which learns nothing."""

EXPERT_SIDES: dict[str, ExpertSide] = {"fbpc": fbpc.expert_side}
"""Methods whose gradient has a costly part that doesn't depend on u; it takes the result as its last argument."""


class GradientTask(NamedTuple):
    """One gradient of a step."""

    architecture: int
    """Its place among the run's."""
    draw: int
    """Which of the architecture's M independent draws."""


def gradient_tasks(architectures: int, draws: int) -> list[GradientTask]:
    """The gradients of a step in the order in which they are summed."""
    return [GradientTask(architecture, draw) for architecture in range(architectures) for draw in range(draws)]


class State(NamedTuple):
    """All that the driver holds between two steps."""

    step: int
    """Updates done."""
    images: Tensor
    """u: (m, c, h, w) float32, normalised, on the CPU."""
    velocity: Tensor
    """Momentum of the pixels' SGD, of the shape of `images`."""
    inner_lr: float
    """Learning rate of the SGD steps on u that weight-space methods take; bpc-w learns it."""
    inner_velocity: float = 0.0
    """Its momentum."""
    solutions: Solutions = {}  # noqa: RUF012  a Mapping: nobody changes it
    """MAP solutions that later ones begin at (`--map-init warm`)."""


def combine(units: Sequence[GradientTask], gradients: Sequence[Gradient | None]) -> list[Gradient]:
    """One gradient for each architecture that has any, in order: the mean over its draws that are there.

    Where an architecture has none (its workers were too slow, and skipping was asked for), the others stand in for it:
    they are scaled such that their sum still estimates the sum over all.
    """
    parts: dict[int, list[Gradient]] = {unit.architecture: [] for unit in units}
    for unit, gradient in zip(units, gradients, strict=True):
        if gradient is not None:
            parts[unit.architecture].append(gradient)
    there = [each for each in parts.values() if each]
    if not there:
        raise ValueError("a step needs at least one gradient")
    share = len(parts) / len(there)
    return [_scaled(each, share / len(each)) for each in there]


def _scaled(gradients: list[Gradient], factor: float) -> Gradient:
    """Their sum times a factor; a single one times 1 keeps its bits."""
    total = gradients[0].value
    for each in gradients[1:]:
        total = total + each.value
    return Gradient(total * factor, {}, sum(each.inner_lr for each in gradients) * factor)


def update(state: State, gradients: Sequence[Gradient], *, alpha: float, momentum: float, inner_alpha: float) -> State:
    """Algorithm 1's last line: g = sum_a g^(a) in the given order, then SGD with momentum on the pixels.

    The inner learning rate moves alike, with the learning rate `inner_alpha`; its gradient is 0 where it isn't learned.
    """
    total = torch.zeros_like(state.images)
    for part in gradients:
        total = total + part.value
    velocity = momentum * state.velocity + total
    inner = momentum * state.inner_velocity + sum(part.inner_lr for part in gradients)
    return state._replace(
        step=state.step + 1, images=state.images - alpha * velocity, velocity=velocity,
        inner_lr=state.inner_lr - inner_alpha * inner, inner_velocity=inner,
    )  # fmt: skip


def map_start(state: State, unit: GradientTask, settings: Distillation) -> np.ndarray | None:
    """Where the unit's MAP solve begins in the next step; None for the prior."""
    if settings.map_init == "prior":
        return None
    found = warm_start.begun_at(state.solutions, *unit, state.step, settings.warm_pool_size, settings.warm_pool_uses)
    return None if found is None else found.numpy()


def remember(
    state: State, step: int, units: Sequence[GradientTask], gradients: Sequence[Gradient | None], settings: Distillation
) -> State:
    """`state` with the MAP solutions that the gradients of `step` found, where later solves begin at them."""
    if settings.map_init == "prior":
        return state
    found = [
        (warm_start.name(*unit, step, settings.warm_pool_size), gradient.solution if gradient else None)
        for unit, gradient in zip(units, gradients, strict=True)
    ]
    return state._replace(solutions=warm_start.remembered(state.solutions, found))


def check_finite(architectures: Sequence[str], gradients: Sequence[Gradient], step: int) -> None:
    """Raise UserError where a gradient can't be used."""
    for name, part in zip(architectures, gradients, strict=True):
        ending = part.stats.get("map_ending")
        if ending == SolverStatus.NONFINITE or not torch.isfinite(part.value).all() or not math.isfinite(part.inner_lr):
            how = f" (MAP {ending}, loss {part.stats['map_loss']:g})" if ending else ""
            mend = "--alpha, --lambda-x or --lambda-u" if ending else "--alpha or --inner-lr"
            raise UserError(
                f"non-finite loss at step {step + 1} on {name}{how}: lower {mend}; the last checkpoint is kept"
            )


def check_updated(state: State) -> None:
    """Raise UserError where an update left the values that the next step can start from."""
    if not torch.isfinite(state.images).all():
        raise UserError(f"non-finite pixels after step {state.step}: lower --alpha; the last checkpoint is kept")
    if state.inner_velocity and not state.inner_lr > 0:
        raise UserError(
            f"the learned inner learning rate is {state.inner_lr:g} after step {state.step}: lower --inner-alpha; "
            "the last checkpoint is kept"
        )


class Worker:
    """Computes gradients of any of a run's architectures: holds the networks it was asked for, their experts and the
    real images, and no random state."""

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
    ):
        """`compiled`: run compiled passes (passes.py). `trajectory_cache_bytes`: of this node's disk for what
        trajectory_cache.py keeps; 0 keeps nothing."""
        keep_freed_memory()
        self.specs, self.stores, self.settings = specs, stores, settings
        self.augment, self.expert_count = augment, expert_count
        self.device, self.threads = device, threads
        self.real = DeviceDataset(*tensors(dataset.train, device), dataset.mean, dataset.std)
        self.labels = torch.tensor(labels, device=device)
        self.compiled = compiling.folder() if compiled and device == "cpu" else None
        self.trajectory_cache = (
            TrajectoryCache(cache.folder() / "x-sides", trajectory_cache_bytes) if trajectory_cache_bytes else None
        )
        self.passes: dict[int, Passes] = {}

    def gradient(
        self,
        unit: GradientTask,
        step: int,
        images: np.ndarray,
        inner_lr: float,
        expert_side: np.ndarray | None = None,
        start: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Stats, float, np.ndarray | None]:
        """Return the parts of a `Gradient` as numpy arrays, which travel between processes without a copy.
        `expert_side`: from the method of that name, where it was computed ahead; `start`: from `map_start`."""
        given = {"expert_side": expert_side, "start": start}
        with threads(self.threads):
            value, stats, inner_lr_gradient, solution = METHODS[self.settings.method](
                self._problem(unit), step, torch.tensor(images, device=self.device), inner_lr,
                **{name: each for name, each in given.items() if each is not None},
            )  # fmt: skip
        return value.numpy(), stats, inner_lr_gradient, None if solution is None else solution.numpy()

    def expert_side(self, unit: GradientTask, step: int) -> tuple[None, np.ndarray]:
        """What `gradient` will need for `unit` at `step` whatever the images are then. Comes second, so that a caller
        can ask for the first, which costs nothing to fetch, to know that it is there."""
        with threads(self.threads):
            return None, EXPERT_SIDES[self.settings.method](self._problem(unit), step)

    def call(self, function: Callable[[Any, Any, str], Any], shared: Any, item: Any) -> Any:
        """Another task, on this worker's device and one CPU thread."""
        with threads(1):
            return function(shared, item, self.device)

    def _problem(self, unit: GradientTask) -> GradientContext:
        index = unit.architecture
        if index not in self.passes:
            self.passes[index] = Passes(Network(self.specs[index], self.device), self.compiled)
        return GradientContext(
            self.passes[index], self.stores[index], self.real, self.labels, self.settings, self.augment,
            self.expert_count, unit.draw, self.trajectory_cache,
        )  # fmt: skip


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's CPU threads inside the block: part of the bits of what is computed there."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
