"""FBPC and FBPC-isotropic: one architecture's part of a step of Algorithm 1."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Params
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.distillation.methods.common import (
    Clock,
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
from fbpc_ray.inference.map_solve import map_solve
from fbpc_ray.inference.posterior import posterior_at, sgd_trajectory, variances
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
    network, settings, augment = context.network, context.settings, context.augment
    labels = coreset_labels(context.labels, soft_labels)
    forward, loss_and_grad, logits = context.passes.forward, context.passes.loss_and_grad, context.passes.logits
    size, rng = settings.batch_size, context.rng
    clock = Clock(network.device)
    u = images.detach().requires_grad_()
    chosen = context.batch(step)
    draws = rng(step, "augment")
    views = [AUGMENTATIONS[augment](len(chosen), draws) for _ in range(settings.views or 1)]
    with torch.no_grad():
        view_images = [view(u[chosen]) for view in views]
    isotropic = settings.method == "fbpc-isotropic"

    # theta_x: a snapshot of a random expert; its K steps on real images.
    expert, epoch = _expert(context, step)
    if expert_side is None and not isotropic:
        expert_side = _read_cached(context, expert, epoch)
    samples_x: Iterable[Params]
    if expert_side is None:
        theta_x = _theta_x(context, expert, epoch)
        samples_x = _k_steps(context, expert, epoch, theta_x)
    else:
        theta_x, samples_x = _params(context, expert_side[0]), (_params(context, row) for row in expert_side[1:])
    psi_x = None if isotropic else variances(logits, samples_x, view_images)
    seconds_x = clock.lap()

    # theta_u: the MAP solution of the pseudocoreset, from a draw of the prior unless told otherwise.
    solution = map_solve(
        loss_and_grad,
        network.init(rng(step, "prior")) if start is None else _params(context, start),
        coreset_batches(u.detach(), labels.fixed, size, augment, rng(step, "map")),
        threshold=settings.gamma + labels.entropy(size),
        learning_rate=settings.map_lr,
        max_steps=settings.map_max_steps,
        batches_per_pass=settings.gamma_window * math.ceil(len(labels.targets) / size),
    )
    seconds_map = clock.lap()

    # Its K steps on the pseudocoreset.
    batches = coreset_batches(u.detach(), labels.fixed, size, augment, rng(step, "coreset"))
    samples_u = islice(
        sgd_trajectory(loss_and_grad, solution.value, batches, settings.lambda_u), settings.posterior_steps
    )
    psi_u = None if isotropic else variances(logits, samples_u, view_images)
    seconds_u = clock.lap()

    noise, parts = rng(step, "monte-carlo"), list[tuple[float, float, float, float, float]]()
    learned = (u, *labels.learned)
    totals = [torch.zeros_like(part) for part in learned]
    for number, view in enumerate(views):  # the graph of one view at a time
        augmented = view(u[chosen])
        posterior_x = posterior_at(forward, theta_x, augmented, psi_x[number] if psi_x else None)
        posterior_u = posterior_at(forward, solution.value, augmented, psi_u[number] if psi_u else None)
        divergence = forward_kl(posterior_x, posterior_u, labels.targets[chosen], settings.mc_samples, noise)
        gradients = torch.autograd.grad(divergence.value, learned)
        totals = [total + part for total, part in zip(totals, gradients, strict=True)]
        terms = (*divergence, posterior_x.variance.mean(), posterior_u.variance.mean())
        parts.append(tuple(term.item() for term in terms))  # type: ignore[arg-type]
    value, *by_labels = (total / len(views) for total in totals)
    value = value.cpu()
    loss, expected_x, expected_u, mean_psi_x, mean_psi_u = (sum(part) / len(views) for part in zip(*parts, strict=True))
    stats = GradientStats(
        loss=loss,
        expected_x=expected_x,
        expected_u=expected_u,
        psi_x=mean_psi_x,
        psi_u=mean_psi_u,
        gradient_norm=value.norm().item(),
        map_steps=solution.stats.steps,
        map_status=str(solution.status),
        map_loss=solution.stats.loss - labels.entropy(size),
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
