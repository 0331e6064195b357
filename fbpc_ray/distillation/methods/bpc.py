"""BPC-fKL, BPC-rKL and BPC-W: one architecture's gradient in a step (Eqs. 5-7).

All begin at theta_0, a snapshot of a random expert. mu_x is a later snapshot of the same expert; mu_u is theta_0 after
`syn_steps` SGD steps on the pseudocoreset with fresh augmentation.
"""

from collections import deque
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

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
from fbpc_ray.inference.posterior import sgd_trajectory
from fbpc_ray.inference.weight_space import WeightDivergence, forward_kl, reverse_kl, unrolled_sgd, wasserstein

AHEAD = {"bpc-fkl": 1, "bpc-rkl": 0, "bpc-w": 2}
"""Epochs from theta_0 to mu_x. The rKL has no mu_x: it asks for the potential of the real data itself."""


class _Start(NamedTuple):
    theta_0: Params
    expert: int
    epoch: int


def reverse(
    context: GradientContext, step: int, images: Tensor, inner_lr: float, soft_labels: Tensor | None = None
) -> Gradient:
    """Differentiate BPC-rKL: the covariance of the potentials under q_u."""
    settings, clock = context.settings, Clock(context.network.device)
    start, labels = _start(context, step), coreset_labels(context.labels, soft_labels)
    mu_u = _mu_u(context, step, images, labels.fixed, start.theta_0, inner_lr)
    seconds_u, chosen = clock.lap(), context.batch(step)
    authors = settings.rkl_estimator == "authors"
    augment = "none" if authors else context.augment
    divergence = reverse_kl(
        context.passes.forward,
        mu_u,
        images[chosen],
        labels.targets[chosen],
        AUGMENTATIONS[augment](len(chosen), context.rng(step, "augment")),
        next(context.real.stream(settings.real_batch_size, augment, context.rng(step, "real"))),
        len(context.real),
        samples=settings.mc_samples,
        scale=settings.weight_noise,
        source=context.rng(step, "monte-carlo"),
        scaled=not authors,
        coreset_count=len(context.labels),
    )
    return _full_gradient(divergence, chosen, images, labels, start, seconds_u, clock)


def forward(
    context: GradientContext, step: int, images: Tensor, inner_lr: float, soft_labels: Tensor | None = None
) -> Gradient:
    """Differentiate BPC-fKL, Eq. 7."""
    settings, clock = context.settings, Clock(context.network.device)
    start, labels = _start(context, step), coreset_labels(context.labels, soft_labels)
    mu_x = _mu_x(context, start)
    mu_u = _mu_u(context, step, images, labels.fixed, start.theta_0, inner_lr)
    seconds_u, chosen = clock.lap(), context.batch(step)
    draws, count = context.rng(step, "augment"), settings.views or settings.mc_samples
    views = [AUGMENTATIONS[context.augment](len(chosen), draws) for _ in range(count)]
    divergence = forward_kl(
        context.passes.forward,
        mu_x,
        mu_u,
        images[chosen],
        labels.targets[chosen],
        [views[number % count] for number in range(max(count, settings.mc_samples))],
        scale=settings.weight_noise,
        source=context.rng(step, "monte-carlo"),
    )
    return _full_gradient(divergence, chosen, images, labels, start, seconds_u, clock)


def distance(
    context: GradientContext, step: int, images: Tensor, inner_lr: float, soft_labels: Tensor | None = None
) -> Gradient:
    """Differentiate BPC-W: the distance of the means, through unrolled steps whose learning rate is learned."""
    settings, clock = context.settings, Clock(context.network.device)
    start, labels = _start(context, step), coreset_labels(context.labels, soft_labels)
    mu_x = _mu_x(context, start)
    u, rate = images.detach().requires_grad_(), torch.tensor(inner_lr, device=images.device, requires_grad=True)
    batches = coreset_batches(u, labels.targets, settings.batch_size, context.augment, context.rng(step, "coreset"))
    mu_u = unrolled_sgd(context.network.forward, start.theta_0, islice(batches, settings.syn_steps), rate)
    seconds_u = clock.lap()
    loss = wasserstein(mu_u, mu_x, start.theta_0)
    value, rate_gradient, *by_labels = torch.autograd.grad(loss, (u, rate, *labels.learned))
    value = value.cpu()
    stats = GradientStats(
        loss=loss.item(), gradient_norm=value.norm().item(), inner_lr=inner_lr, expert=start.expert,
        expert_epoch=start.epoch, seconds_u=seconds_u, seconds_gradient=clock.lap(),
    )  # fmt: skip
    soft = labels.by_logits(by_labels[0]) if by_labels else None
    return Gradient(value, stats, rate_gradient.item(), soft_labels=soft)


def _start(context: GradientContext, step: int) -> _Start:
    """Draw theta_0, the snapshot of a random expert from which mu_x and mu_u are a few steps away."""
    s = context.settings
    epochs = expert_epochs(s.start_epoch, s.start_rule, context.store.recipe.epochs, AHEAD[s.method])
    expert, epoch = draw_expert(context.expert_count, epochs, context.rng(step, "expert"))
    return _Start(context.network.parameters_of(context.store.read(expert, epoch)), expert, epoch)


def _mu_x(context: GradientContext, start: _Start) -> Params:
    """Return mu_x of Eq. 6, the snapshot at which the expert's steps on real images from theta_0 end."""
    later = start.epoch + AHEAD[context.settings.method]
    return context.network.parameters_of(context.store.read(start.expert, later))


def _mu_u(
    context: GradientContext, step: int, images: Tensor, labels: Tensor, theta_0: Params, inner_lr: float
) -> Params:
    """Return mu_u of Eq. 6, theta_0 after `syn_steps` SGD steps on the pseudocoreset; no graph is left."""
    s = context.settings
    batches = coreset_batches(images, labels, s.batch_size, context.augment, context.rng(step, "coreset"))
    steps = islice(sgd_trajectory(context.passes.loss_and_grad, theta_0, batches, inner_lr), s.syn_steps)
    return deque(steps, maxlen=1).pop()


def _full_gradient(
    divergence: WeightDivergence, chosen: Tensor, images: Tensor, labels: CoresetLabels, start: _Start,
    seconds_u: float, clock: Clock,
) -> Gradient:  # fmt: skip
    """Put the batch's gradient at the places of its images among all m."""
    soft = None
    if divergence.by_labels is not None:
        place = torch.zeros_like(labels.fixed).index_copy(0, chosen.to(images.device), divergence.by_labels)
        soft = labels.by_logits(place)
    value = torch.zeros_like(images).index_copy(0, chosen.to(images.device), divergence.gradient).cpu()
    stats = GradientStats(
        loss=divergence.expected_x - divergence.expected_u, expected_x=divergence.expected_x,
        expected_u=divergence.expected_u, gradient_norm=value.norm().item(), expert=start.expert,
        expert_epoch=start.epoch, seconds_u=seconds_u, seconds_gradient=clock.lap(),
    )  # fmt: skip
    return Gradient(value, stats, soft_labels=soft)
