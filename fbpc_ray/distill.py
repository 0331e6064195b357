"""Algorithm 1: the gradient of one architecture, the update of the pseudocoreset, and nothing of where they run.

`gradient` is a pure function of (images, seed, step, architecture): the same bits on any worker, in any order, as often
as it is asked. `update` sums the gradients in the order of the architectures.
"""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.allocator import keep_freed_memory
from fbpc_ray.config import Distillation
from fbpc_ray.errors import UserError
from fbpc_ray.experts import ExpertStore
from fbpc_ray.inference.divergence import forward_kl
from fbpc_ray.inference.map_solve import Ending, map_solve
from fbpc_ray.inference.posterior import function_posterior, sgd_trajectory
from fbpc_ray.rng import generator
from fbpc_ray.types import Batch
from fbpc_ray.vision.augment import AUGMENTATIONS
from fbpc_ray.vision.datasets import Dataset, tensors
from fbpc_ray.vision.realdata import RealData
from fbpc_ray.vision.zoo import Network, Spec


class State(NamedTuple):
    """All that the driver holds between two steps."""

    step: int
    """Updates done."""
    images: Tensor
    """u: (m, c, h, w) float32, normalised, on the CPU."""
    velocity: Tensor
    """Momentum of the pixels' SGD, of the shape of `images`."""


class GradientStats(NamedTuple):
    """What one gradient reports, as plain numbers."""

    expected_x: float
    """Eq. 17's cross-entropy under the full-data posterior, nats an image."""
    expected_u: float
    """The same under the pseudocoreset's posterior."""
    psi_x: float
    """Mean of diag Psi_x, squared logits."""
    psi_u: float
    gradient_norm: float
    map_steps: int
    map_ending: str
    map_loss: float
    expert: int
    """Trajectory and epoch of theta_x."""
    expert_epoch: int
    seconds_x: float
    """theta_x, its K steps and their logits; then the MAP solve; the K steps on u; Eq. 17 and its backward."""
    seconds_map: float
    seconds_u: float
    seconds_gradient: float


class Gradient(NamedTuple):
    """Eq. 17's gradient for one architecture."""

    value: Tensor
    """(m, c, h, w) float32, on the CPU; zero for images outside the step's batch."""
    stats: GradientStats


def expert_epochs(start: int, rule: str, epochs: int) -> range:
    """The epochs from which theta_x is drawn. Raises UserError where there is none."""
    chosen = range(start, epochs + 1) if rule == "from" else range(min(start, epochs + 1))
    if not chosen or start < 0:
        raise UserError(
            f"--start-epoch {start} ({rule}) leaves no epoch of experts that have 0..{epochs}: "
            "lower it or raise --expert-epochs"
        )
    return chosen


def draw_expert(count: int, epochs: range, source: torch.Generator) -> tuple[int, int]:
    """Trajectory and epoch of theta_x, uniform over both."""
    trajectory = int(torch.randint(count, (), generator=source))
    return trajectory, epochs[int(torch.randint(len(epochs), (), generator=source))]


def coreset_batches(
    images: Tensor, labels: Tensor, size: int, augment: str, source: torch.Generator
) -> Iterator[Batch]:
    """Endless freshly augmented batches of the pseudocoreset: all of it where m <= size, else minibatches in turn."""
    while True:
        for index in torch.arange(len(labels)).split(size):
            drawn = AUGMENTATIONS[augment](len(index), source)
            yield Batch(drawn(images[index]), labels[index])


def gradient(
    network: Network,
    store: ExpertStore,
    real: RealData,
    images: Tensor,
    labels: Tensor,
    *,
    step: int,
    settings: Distillation,
    augment: str,
    expert_count: int,
    expert_epoch_count: int,
) -> Gradient:
    """One architecture's part of step `step` of Algorithm 1, at the pseudocoreset (images, labels) on the device."""
    forward, m, size = network.forward, len(labels), settings.batch_size

    def rng(purpose: str) -> torch.Generator:
        return generator(settings.seed, "step", step, network.spec.architecture, purpose)

    clock = _Clock(network.device)
    u = images.detach().requires_grad_()
    # One batch a step, the same for every architecture; all of u where m <= B.
    chosen = torch.randperm(m, generator=generator(settings.seed, "step", step, "batch"))[:size].sort().values
    augmented = AUGMENTATIONS[augment](len(chosen), rng("augment"))(u[chosen])
    isotropic = settings.method == "fbpc-isotropic"

    # theta_x: a snapshot of a random expert; its K steps on real images.
    epochs = expert_epochs(settings.start_epoch, settings.start_rule, expert_epoch_count)
    expert, epoch = draw_expert(expert_count, epochs, rng("expert"))
    theta_x = network.parameters_of(store.read(expert, epoch))
    batches = real.stream(settings.real_batch_size, augment, rng("real"))
    samples_x = islice(sgd_trajectory(forward, theta_x, batches, settings.lambda_x), settings.posterior_steps)
    posterior_x = function_posterior(forward, theta_x, None if isotropic else samples_x, augmented)
    seconds_x = clock.lap()

    # theta_u: the MAP solution of the pseudocoreset, from a draw of the prior.
    solution = map_solve(
        forward,
        network.init(rng("prior")),
        coreset_batches(u.detach(), labels, size, augment, rng("map")),
        threshold=settings.gamma,
        learning_rate=settings.map_lr,
        max_steps=settings.map_max_steps,
        batches_per_pass=math.ceil(m / size),
    )
    seconds_map = clock.lap()

    # Its K steps on the pseudocoreset.
    batches = coreset_batches(u.detach(), labels, size, augment, rng("coreset"))
    samples_u = islice(sgd_trajectory(forward, solution.params, batches, settings.lambda_u), settings.posterior_steps)
    posterior_u = function_posterior(forward, solution.params, None if isotropic else samples_u, augmented)
    seconds_u = clock.lap()

    divergence = forward_kl(posterior_x, posterior_u, labels[chosen], settings.mc_samples, rng("monte-carlo"))
    (value,) = torch.autograd.grad(divergence.value, u)
    value = value.cpu()
    stats = GradientStats(
        expected_x=divergence.expected_x.item(),
        expected_u=divergence.expected_u.item(),
        psi_x=posterior_x.variance.mean().item(),
        psi_u=posterior_u.variance.mean().item(),
        gradient_norm=value.norm().item(),
        map_steps=solution.steps,
        map_ending=str(solution.ending),
        map_loss=solution.loss,
        expert=expert,
        expert_epoch=epoch,
        seconds_x=seconds_x,
        seconds_map=seconds_map,
        seconds_u=seconds_u,
        seconds_gradient=clock.lap(),
    )
    return Gradient(value, stats)


def update(state: State, gradients: Sequence[Gradient], *, alpha: float, momentum: float) -> State:
    """Algorithm 1's last line: g = sum_a g^(a) in the given order, then SGD with momentum on the pixels."""
    total = torch.zeros_like(state.images)
    for part in gradients:
        total = total + part.value
    velocity = momentum * state.velocity + total
    return State(state.step + 1, state.images - alpha * velocity, velocity)


def check_finite(architectures: Sequence[str], gradients: Sequence[Gradient], step: int) -> None:
    """Raise UserError where a gradient can't be used."""
    for name, (value, stats) in zip(architectures, gradients, strict=True):
        if stats.map_ending == Ending.NONFINITE or not torch.isfinite(value).all():
            raise UserError(
                f"non-finite loss at step {step + 1} on {name} (MAP {stats.map_ending}, loss {stats.map_loss:g}): "
                "lower --alpha, --lambda-x or --lambda-u; the last checkpoint is kept"
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
        self.network = Network(spec, device)
        self.store = store
        self.real = RealData(*tensors(dataset.train, device), dataset.mean, dataset.std)
        self.labels = torch.tensor(labels, device=device)
        self.settings, self.augment, self.expert_count = settings, augment, expert_count

    def ready(self) -> None:
        """Answers once the worker stands."""

    def gradient(self, step: int, images: np.ndarray) -> tuple[np.ndarray, GradientStats]:
        """`gradient` in numpy, which travels between processes without a copy."""
        value, stats = gradient(
            self.network,
            self.store,
            self.real,
            torch.tensor(images, device=self.network.device),
            self.labels,
            step=step,
            settings=self.settings,
            augment=self.augment,
            expert_count=self.expert_count,
            expert_epoch_count=self.store.recipe.epochs,
        )
        return value.numpy(), stats


class _Clock:
    """Seconds between laps, the device's queue emptied."""

    def __init__(self, device: torch.device):
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds
