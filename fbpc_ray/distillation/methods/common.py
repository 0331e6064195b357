"""Arguments, results and first draws that the gradients of all methods share."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.config import Distillation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.trajectory_cache import TrajectoryCache
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes


@dataclass(frozen=True)
class GradientStats:
    """What one gradient reports of itself; None where a method has no such quantity."""

    loss: float
    """expected_x - expected_u for fbpc, bpc-fkl and bpc-rkl: nats per image, no value of a KL, whose gradient alone is
    estimated. bpc-w: its ratio; vbpc, frepo: what is differentiated."""
    expected_x: float | None = None
    """Nats per image. vbpc, frepo: the loss of the real images, without what is added to it."""
    expected_u: float | None = None
    psi_x: float | None = None
    psi_u: float | None = None
    """Means of diag Psi, squared logits."""
    gradient_norm: float | None = None
    inner_lr: float | None = None
    map_steps: int | None = None
    map_status: str | None = None
    """A `SolverStatus`; the column `map_ending` on disk."""
    map_loss: float | None = None
    expert: int | None = None
    expert_epoch: int | None = None
    seconds_x: float | None = None
    """theta_x with its K steps."""
    seconds_map: float | None = None
    seconds_u: float | None = None
    """The K steps, or `syn_steps`, on u."""
    seconds_gradient: float | None = None
    others: Mapping[str, float | str] = field(default_factory=dict)
    """Quantities of a method of one's own, by column."""

    def row(self) -> dict[str, int | float | str]:
        """Return the columns of metrics.parquet."""
        values = {("map_ending" if f.name == "map_status" else f.name): getattr(self, f.name) for f in fields(self)}
        del values["others"]
        return {name: value for name, value in values.items() if value is not None} | dict(self.others)


class GradientContext(NamedTuple):
    """What a worker holds between two steps: one architecture, its experts, the data and the settings."""

    passes: Passes
    experts: ExpertStore | None
    """None for a method that has none."""
    real: DeviceDataset
    labels: Tensor
    """(m,) int64: the classes of the pseudocoreset, fixed."""
    settings: Distillation
    augment: str
    expert_count: int
    draw: int = 0
    """Which of the step's independent draws of (theta_x, theta_u)."""
    trajectory_cache: TrajectoryCache | None = None
    """Where theta_x and its K steps are kept."""

    @property
    def network(self) -> Network:
        return self.passes.network

    @property
    def store(self) -> ExpertStore:
        assert self.experts is not None, "this method has no experts"
        return self.experts

    def rng(self, step: int, purpose: str) -> torch.Generator:
        """Return the random stream of a purpose, for this step, architecture and draw."""
        more = (self.draw,) if self.draw else ()
        return generator(self.settings.seed, "step", step, self.network.spec.architecture, purpose, *more)

    def batch(self, step: int) -> Tensor:
        """Draw the step's batch of B indices, the same for every architecture; all of u if m <= B."""
        source = generator(self.settings.seed, "step", step, "batch")
        return torch.randperm(len(self.labels), generator=source)[: self.settings.batch_size].sort().values


class Gradient(NamedTuple):
    """The gradient of a method's divergence for one architecture."""

    value: Tensor
    """(m, c, h, w) float32, on the CPU; zero for images outside the step's batch."""
    stats: GradientStats
    inner_lr: float = 0.0
    """With respect to the inner learning rate, where the method learns it (bpc-w)."""
    solution: Tensor | None = None
    """(P,) float32, on the CPU: theta_u as one vector, where later solves begin at it (`--map-init warm`); vbpc, frepo:
    the network of the pool (network_pool.dump)."""
    soft_labels: Tensor | None = None
    """(m, d) float32, on the CPU: with respect to the soft labels, where the method learns them."""


class CoresetLabels(NamedTuple):
    """Labels of the pseudocoreset as cross-entropy takes them."""

    targets: Tensor
    """(m,) int64; or (m, d) float32 probabilities, a leaf whose gradient is that of the soft labels."""

    @property
    def fixed(self) -> Tensor:
        """Return the labels without a graph."""
        return self.targets.detach()

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """Return the labels that have a gradient, beside the images: the probabilities, or none."""
        return (self.targets,) if self.targets.requires_grad else ()

    def entropy(self) -> float:
        """Return the lowest possible mean cross-entropy, nats per image."""
        return torch.special.entr(self.fixed).sum(1).mean().item() if self.learned else 0.0

    def by_logits(self, by_probabilities: Tensor) -> Tensor:
        """Return the gradient by the logits z, on the CPU, from that by p = softmax(z): p (g - sum_c p_c g_c)."""
        weighted = self.fixed * by_probabilities
        return (weighted - self.fixed * weighted.sum(1, keepdim=True)).cpu()


def coreset_labels(labels: Tensor, soft_labels: Tensor | None) -> CoresetLabels:
    """Return `labels` (m,), or the probabilities of `soft_labels` (m, d) where labels are learned."""
    return CoresetLabels(labels if soft_labels is None else soft_labels.detach().softmax(1).requires_grad_())


Method = Callable[..., Gradient]
"""(context, step, images (m, c, h, w) on the device, inner learning rate, and what was made before) -> Gradient.
Pure."""

ExpertSide = Callable[[GradientContext, int], np.ndarray]
"""(context, step) -> what a method's gradient needs that does not depend on u, to be computed ahead of it. Pure."""


def expert_epochs(start: int, rule: str, epochs: int, ahead: int = 0) -> range:
    """Return the epochs from which an expert's snapshot is drawn, each followed by `ahead` more.

    With T = `start` and the rule `from` they are T..`epochs` (App. C.2: "from T epoch onwards"), with `before` 0..T-1.
    Raises UserError where there is none.
    """
    last = epochs - ahead
    chosen = range(start, last + 1) if rule == "from" else range(min(start, last + 1))
    if not chosen or start < 0:
        follow = f", {ahead} of which must follow" if ahead else ""
        fix = "raise --start-epoch or --expert-epochs" if rule == "before" else "lower it or raise --expert-epochs"
        raise UserError(
            f"--start-epoch {start} ({rule}) leaves no snapshot of experts with epochs 0 to {epochs}{follow}: {fix}"
        )
    return chosen


def draw_expert(count: int, epochs: range, source: torch.Generator) -> tuple[int, int]:
    """Draw a trajectory and an epoch, uniform over both: Algorithm 1's theta_x in E^(a)."""
    trajectory = int(torch.randint(count, (), generator=source))
    return trajectory, epochs[int(torch.randint(len(epochs), (), generator=source))]


def coreset_batches(
    images: Tensor, labels: Tensor, size: int, augment: str, source: torch.Generator
) -> Iterator[Batch]:
    """Yield endless freshly augmented batches of u: all of it if m <= size, else minibatches, each pass shuffled.

    u is sorted by class: minibatches in its order would have images of few classes each.
    """
    m = len(labels)
    while True:
        order = torch.arange(m) if m <= size else torch.randperm(m, generator=source)
        for index in order.split(size):
            drawn = AUGMENTATIONS[augment](len(index), source)
            yield Batch(drawn(images[index]), labels[index])


class Clock:
    """Seconds between laps, the device's queue emptied."""

    def __init__(self, device: torch.device):
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds
