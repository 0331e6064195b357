"""FBPC and FBPC-isotropic: one architecture's part of a step of Algorithm 1."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Params
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.distillation.methods.common import (
    Clock,
    CoresetLabels,
    Gradient,
    GradientContext,
    GradientStats,
    coreset_batches,
    coreset_labels,
    draw_expert,
    expert_epochs,
)
from fbpc_ray.distillation.trajectory_cache import TrajectoryKey
from fbpc_ray.inference.divergence import forward_kl
from fbpc_ray.inference.map_solve import SolveStats, map_solve
from fbpc_ray.inference.posterior import FunctionPosterior, posterior_at, sgd_trajectory, variances
from fbpc_ray.inference.solution import Solution
from fbpc_ray.inference.vectors import flatten, unflatten

EXPERT_SIDE_FORMAT = 1
"""To be raised with every change of what the K steps of theta_x compute, or draw: what is on disk is then made anew."""


def expert_side(context: GradientContext, step: int) -> np.ndarray:
    """Return theta_x and its K steps on real images as (1 + K, P) float32. They do not depend on u."""
    expert, epoch = _expert(context, step)
    side = _read_cached(context, expert, epoch)
    return np.stack(list(_rows(context, expert, epoch))) if side is None else side


def gradient(
    context: GradientContext,
    step: int,
    images: Tensor,
    inner_lr: float,
    expert_side: np.ndarray | None = None,
    start: np.ndarray | None = None,
    soft_labels: Tensor | None = None,
) -> Gradient:
    """Differentiate Eq. 17 for one architecture by u, `images` (m, c, h, w), averaged over V augmentations.

    `inner_lr` is not used; `expert_side`, where it was computed ahead, changes no bit. `start` (P,) is where the MAP
    solve begins (`--map-init warm`); None: at the prior.

    With `soft_labels` (m, d) the MAP solve, the K steps on u and Eq. 17 take their softmax as labels, gamma is what the
    solve's loss may be above their entropy, and the gradient by them is that of inference/divergence.py.

    Its stats: the two terms of Eq. 17 and their difference, nats per image; the means of diag Psi, squared logits; the
    MAP solve; which expert; seconds for theta_x with its K steps, for the MAP solve, for the K steps on u, for Eq. 17.
    """
    settings, clock = context.settings, Clock(context.network.device)
    labels = coreset_labels(context.labels, soft_labels)
    batch = _batch_of(context, step, images.detach().requires_grad_(), labels)
    with torch.no_grad():
        view_images = list(batch.views())

    expert, epoch = _expert(context, step)
    x = _side_x(context, expert, epoch, expert_side, view_images)
    seconds_x = clock.lap()

    solution = _map_solution(context, step, batch, start)
    seconds_map = clock.lap()

    u = _side_u(context, step, batch, solution.value, view_images)
    seconds_u = clock.lap()

    (value, *by_labels), terms = _differentiate(context, step, batch, x, u)
    value = value.cpu()
    stats = GradientStats(
        **terms._asdict(),
        gradient_norm=value.norm().item(),
        map_steps=solution.stats.steps,
        map_status=str(solution.status),
        map_loss=solution.stats.loss - labels.entropy(),
        expert=expert,
        expert_epoch=epoch,
        seconds_x=seconds_x,
        seconds_map=seconds_map,
        seconds_u=seconds_u,
        seconds_gradient=clock.lap(),
    )
    return Gradient(
        value, stats, solution=flatten(solution.value).cpu() if settings.map_init == "warm" else None,
        soft_labels=labels.by_logits(by_labels[0]) if by_labels else None,
    )  # fmt: skip


class _Batch(NamedTuple):
    """The step's batch of u under V augmentations, which both sides of Eq. 17 share."""

    u: Tensor
    """(m, c, h, w), a leaf."""
    labels: CoresetLabels
    chosen: Tensor
    """(b,) indices of the batch."""
    augmentations: list[Callable[[Tensor], Tensor]]

    def views(self) -> Iterator[Tensor]:
        """Yield the batch (b, c, h, w) under each augmentation, differentiable in u."""
        for augmentation in self.augmentations:
            yield augmentation(self.u[self.chosen])


class _Side(NamedTuple):
    """One side of Eq. 17: a network, and Psi (b, d) of Eq. 16 for each view; None for FBPC-isotropic."""

    theta: Params
    variances: list[Tensor] | None

    def posterior(self, context: GradientContext, images: Tensor, view: int) -> FunctionPosterior:
        """Return Eq. 15's posterior at `images`, those of the view number `view`."""
        variance = self.variances[view] if self.variances else None
        return posterior_at(context.passes.forward, self.theta, images, variance)


def _batch_of(context: GradientContext, step: int, u: Tensor, labels: CoresetLabels) -> _Batch:
    chosen, draws = context.batch(step), context.rng(step, "augment")
    count = context.settings.views or 1
    return _Batch(u, labels, chosen, [AUGMENTATIONS[context.augment](len(chosen), draws) for _ in range(count)])


def _is_isotropic(context: GradientContext) -> bool:
    return context.settings.method == "fbpc-isotropic"


def _side_x(
    context: GradientContext, expert: int, epoch: int, rows: np.ndarray | None, view_images: list[Tensor]
) -> _Side:
    """Return the side of the expert: a snapshot, and its K steps on real images; `rows` are those of `expert_side`."""
    if rows is None and not _is_isotropic(context):
        rows = _read_cached(context, expert, epoch)
    samples: Iterable[Params]
    if rows is None:
        theta = _theta_x(context, expert, epoch)
        samples = _k_steps(context, expert, epoch, theta)
    else:
        theta, samples = _params(context, rows[0]), (_params(context, row) for row in rows[1:])
    return _Side(theta, None if _is_isotropic(context) else variances(context.passes.logits, samples, view_images))


def _map_solution(
    context: GradientContext, step: int, batch: _Batch, start: np.ndarray | None
) -> Solution[Params, SolveStats]:
    """Return theta_u: the MAP solution of the pseudocoreset, from `start` or a draw of the prior."""
    s, labels, rng = context.settings, batch.labels, context.rng
    return map_solve(
        context.passes.loss_and_grad,
        context.network.init(rng(step, "prior")) if start is None else _params(context, start),
        coreset_batches(batch.u.detach(), labels.fixed, s.batch_size, context.augment, rng(step, "map")),
        threshold=s.gamma + labels.entropy(),
        learning_rate=s.map_lr,
        max_steps=s.map_max_steps,
        batches_per_pass=s.gamma_window * math.ceil(len(labels.targets) / s.batch_size),
    )


def _side_u(context: GradientContext, step: int, batch: _Batch, theta: Params, view_images: list[Tensor]) -> _Side:
    """Return the side of the pseudocoreset: theta_u, and its K steps on u."""
    if _is_isotropic(context):
        return _Side(theta, None)
    s = context.settings
    source = context.rng(step, "coreset")
    batches = coreset_batches(batch.u.detach(), batch.labels.fixed, s.batch_size, context.augment, source)
    samples = islice(sgd_trajectory(context.passes.loss_and_grad, theta, batches, s.lambda_u), s.posterior_steps)
    return _Side(theta, variances(context.passes.logits, samples, view_images))


class _Terms(NamedTuple):
    """The columns of `GradientStats` that Eq. 17 gives."""

    loss: float
    expected_x: float
    expected_u: float
    psi_x: float
    psi_u: float


def _differentiate(
    context: GradientContext, step: int, batch: _Batch, x: _Side, u: _Side
) -> tuple[list[Tensor], _Terms]:
    """Differentiate Eq. 17 by images and learned labels; return the gradients and the terms, means over the views."""
    noise, learned = context.rng(step, "monte-carlo"), (batch.u, *batch.labels.learned)
    totals, parts = [torch.zeros_like(part) for part in learned], list[_Terms]()
    for number, augmented in enumerate(batch.views()):  # the graph of one view at a time
        posterior_x, posterior_u = (side.posterior(context, augmented, number) for side in (x, u))
        targets = batch.labels.targets[batch.chosen]
        divergence = forward_kl(posterior_x, posterior_u, targets, context.settings.mc_samples, noise)
        gradients = torch.autograd.grad(divergence.value, learned)
        totals = [total + part for total, part in zip(totals, gradients, strict=True)]
        terms = torch.stack([*divergence, posterior_x.variance.mean(), posterior_u.variance.mean()])
        parts.append(_Terms._make(terms.tolist()))
    count = len(parts)
    return [total / count for total in totals], _Terms._make(sum(part) / count for part in zip(*parts, strict=True))


def _expert(context: GradientContext, step: int) -> tuple[int, int]:
    """Draw the step's trajectory and epoch."""
    s = context.settings
    epochs = expert_epochs(s.start_epoch, s.start_rule, context.store.recipe.epochs)
    return draw_expert(context.expert_count, epochs, context.rng(step, "expert"))


def _theta_x(context: GradientContext, expert: int, epoch: int) -> Params:
    return context.network.parameters_of(context.store.read(expert, epoch))


def _k_steps(context: GradientContext, expert: int, epoch: int, theta_x: Params) -> Iterable[Params]:
    """Yield theta_x^(1..K) of Eq. 16's expert side.

    A snapshot has one such trajectory: its real images and their augmentation are drawn by the snapshot's name, so that
    all steps, runs and seeds that draw the snapshot share the work.
    """
    s, recipe = context.settings, context.store.recipe
    source = generator(recipe.seed, "x-side", context.network.spec.architecture, expert, epoch)
    batches = context.real.stream(s.real_batch_size, context.augment, source)
    return islice(sgd_trajectory(context.passes.loss_and_grad, theta_x, batches, s.lambda_x), s.posterior_steps)


def _rows(context: GradientContext, expert: int, epoch: int) -> Iterator[Tensor]:
    theta_x = _theta_x(context, expert, epoch)
    for params in chain([theta_x], _k_steps(context, expert, epoch, theta_x)):
        yield flatten(params).cpu()


def _read_cached(context: GradientContext, expert: int, epoch: int) -> np.ndarray | None:
    """Return the rows from the trajectory cache, computed if missing; None without a cache for them."""
    if context.trajectory_cache is None:
        return None
    shape = 1 + context.settings.posterior_steps, sum(size.numel() for size in context.network.shapes.values())
    key = trajectory_key(context, expert, epoch).digest()
    return context.trajectory_cache.block(key, shape, lambda: _rows(context, expert, epoch))


def trajectory_key(context: GradientContext, expert: int, epoch: int) -> TrajectoryKey:
    """Name all that the bits of theta_x and its K steps depend on."""
    s, device = context.settings, context.network.device
    return TrajectoryKey(
        EXPERT_SIDE_FORMAT, context.store.recipe, expert, context.store.checksum(expert), epoch,
        s.lambda_x, s.real_batch_size, s.posterior_steps, context.augment,
        torch.__version__, torch.get_num_threads(), context.passes.folder is not None,
        torch.backends.cpu.get_cpu_capability(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, context.passes.precision,
        context.passes.chunk_images if 0 < context.passes.chunk_images < s.real_batch_size else 0,
    )  # fmt: skip


def _params(context: GradientContext, row: np.ndarray) -> Params:
    """Return the parameters in a row of `_rows`, on the device."""
    return unflatten(torch.tensor(row, device=context.network.device), context.network.shapes)
