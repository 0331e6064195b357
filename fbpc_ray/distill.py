"""The outer loop of every method: the gradients of all architectures, summed, move the pseudocoreset (Algorithm 1).

A method's gradient is a pure function of (images, seed, step, architecture): the same bits on any worker, in any order,
as often as it is asked. `update` sums them in the order of the architectures. Nothing here knows where they run.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.allocator import keep_freed_memory
from fbpc_ray.config import Distillation
from fbpc_ray.errors import UserError
from fbpc_ray.experts import ExpertStore
from fbpc_ray.inference.map_solve import Ending
from fbpc_ray.methods import function_space, weight_space
from fbpc_ray.methods.common import Gradient, Method, Problem, Stats
from fbpc_ray.vision.datasets import Dataset, tensors
from fbpc_ray.vision.realdata import RealData
from fbpc_ray.vision.zoo import Network, Spec

METHODS: dict[str, Method] = {
    "fbpc": function_space.gradient,
    "fbpc-isotropic": function_space.gradient,
    "bpc-fkl": weight_space.forward,
    "bpc-rkl": weight_space.reverse,
    "bpc-w": weight_space.distance,
}
"""What `--method` may be, beside `random`, which learns nothing."""


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


def update(state: State, gradients: Sequence[Gradient], *, alpha: float, momentum: float, inner_alpha: float) -> State:
    """Algorithm 1's last line: g = sum_a g^(a) in the given order, then SGD with momentum on the pixels.

    The inner learning rate moves alike, with the learning rate `inner_alpha`; its gradient is 0 where it isn't learned.
    """
    total = torch.zeros_like(state.images)
    for part in gradients:
        total = total + part.value
    velocity = momentum * state.velocity + total
    inner = momentum * state.inner_velocity + sum(part.inner_lr for part in gradients)
    return State(state.step + 1, state.images - alpha * velocity, velocity, state.inner_lr - inner_alpha * inner, inner)


def check_finite(architectures: Sequence[str], gradients: Sequence[Gradient], step: int) -> None:
    """Raise UserError where a gradient can't be used."""
    for name, part in zip(architectures, gradients, strict=True):
        ending = part.stats.get("map_ending")
        if ending == Ending.NONFINITE or not torch.isfinite(part.value).all() or not math.isfinite(part.inner_lr):
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
    """Computes the gradients of one architecture: holds its network, experts and real images, and no random state."""

    def __init__(
        self,
        spec: Spec,
        store: ExpertStore,
        dataset: Dataset,
        labels: np.ndarray,
        settings: Distillation,
        augment: str,
        expert_count: int,
        *,
        device: str,
        threads: int,
    ):
        torch.set_num_threads(threads)
        keep_freed_memory()
        network = Network(spec, device)
        real = RealData(*tensors(dataset.train, device), dataset.mean, dataset.std)
        self.problem = Problem(
            network, store, real, torch.tensor(labels, device=device), settings, augment, expert_count
        )

    def ready(self) -> None:
        """Answers once the worker stands."""

    def gradient(self, step: int, images: np.ndarray, inner_lr: float) -> tuple[np.ndarray, Stats, float]:
        """A `Gradient`'s parts, in numpy, which travels between processes without a copy."""
        p = self.problem
        value, stats, of_inner_lr = METHODS[p.settings.method](
            p, step, torch.tensor(images, device=p.network.device), inner_lr
        )
        return value.numpy(), stats, of_inner_lr
