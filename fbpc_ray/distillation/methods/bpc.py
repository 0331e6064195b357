"""BPC-fKL, BPC-rKL and BPC-W: one architecture's part of a step of the weight-space baselines (Eqs. 5-7).

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
    Gradient,
    GradientContext,
    Stats,
    coreset_batches,
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


def reverse(problem: GradientContext, step: int, images: Tensor, inner_lr: float) -> Gradient:
    """BPC-rKL: the covariance of the potentials under q_u."""
    settings, clock = problem.settings, Clock(problem.network.device)
    start = _start(problem, step)
    mu_u = _trained(problem, step, images, start.theta_0, inner_lr)
    seconds_u, chosen = clock.lap(), problem.batch(step)
    divergence = reverse_kl(
        problem.network.forward,
        mu_u,
        images[chosen],
        problem.labels[chosen],
        AUGMENTATIONS[problem.augment](len(chosen), problem.rng(step, "augment")),
        next(problem.real.stream(settings.real_batch_size, problem.augment, problem.rng(step, "real"))),
        len(problem.real),
        samples=settings.mc_samples,
        scale=settings.weight_noise,
        source=problem.rng(step, "monte-carlo"),
    )
    return _scattered(divergence, chosen, images, start, {"seconds_u": seconds_u, "seconds_gradient": clock.lap()})


def forward(problem: GradientContext, step: int, images: Tensor, inner_lr: float) -> Gradient:
    """BPC-fKL: Eq. 7."""
    settings, clock = problem.settings, Clock(problem.network.device)
    start = _start(problem, step)
    mu_x = _target(problem, start)
    mu_u = _trained(problem, step, images, start.theta_0, inner_lr)
    seconds_u, chosen = clock.lap(), problem.batch(step)
    draws = problem.rng(step, "augment")
    divergence = forward_kl(
        problem.network.forward,
        mu_x,
        mu_u,
        images[chosen],
        problem.labels[chosen],
        [AUGMENTATIONS[problem.augment](len(chosen), draws) for _ in range(settings.mc_samples)],
        scale=settings.weight_noise,
        source=problem.rng(step, "monte-carlo"),
    )
    return _scattered(divergence, chosen, images, start, {"seconds_u": seconds_u, "seconds_gradient": clock.lap()})


def distance(problem: GradientContext, step: int, images: Tensor, inner_lr: float) -> Gradient:
    """BPC-W: the distance of the means through the unrolled steps; their learning rate is learned with the images."""
    settings, clock = problem.settings, Clock(problem.network.device)
    start = _start(problem, step)
    mu_x = _target(problem, start)
    u, rate = images.detach().requires_grad_(), torch.tensor(inner_lr, device=images.device, requires_grad=True)
    batches = coreset_batches(u, problem.labels, settings.batch_size, problem.augment, problem.rng(step, "coreset"))
    mu_u = unrolled_sgd(problem.network.forward, start.theta_0, islice(batches, settings.syn_steps), rate)
    seconds_u = clock.lap()
    loss = wasserstein(mu_u, mu_x, start.theta_0)
    value, of_rate = torch.autograd.grad(loss, (u, rate))
    value = value.cpu()
    stats: Stats = {
        "loss": loss.item(), "gradient_norm": value.norm().item(), "inner_lr": inner_lr,
        "expert": start.expert, "expert_epoch": start.epoch,
        "seconds_u": seconds_u, "seconds_gradient": clock.lap(),
    }  # fmt: skip
    return Gradient(value, stats, of_rate.item())


def _start(problem: GradientContext, step: int) -> _Start:
    s = problem.settings
    epochs = expert_epochs(s.start_epoch, s.start_rule, problem.store.recipe.epochs, AHEAD[s.method])
    expert, epoch = draw_expert(problem.expert_count, epochs, problem.rng(step, "expert"))
    return _Start(problem.network.parameters_of(problem.store.read(expert, epoch)), expert, epoch)


def _target(problem: GradientContext, start: _Start) -> Params:
    """mu_x."""
    later = start.epoch + AHEAD[problem.settings.method]
    return problem.network.parameters_of(problem.store.read(start.expert, later))


def _trained(problem: GradientContext, step: int, images: Tensor, theta_0: Params, inner_lr: float) -> Params:
    """mu_u, without a graph."""
    s = problem.settings
    batches = coreset_batches(images, problem.labels, s.batch_size, problem.augment, problem.rng(step, "coreset"))
    steps = islice(sgd_trajectory(problem.passes.loss_and_grad, theta_0, batches, inner_lr), s.syn_steps)
    return deque(steps, maxlen=1).pop()


def _scattered(divergence: WeightDivergence, chosen: Tensor, images: Tensor, start: _Start, seconds: Stats) -> Gradient:
    """The batch's gradient at its place among all m images."""
    value = torch.zeros_like(images).index_copy(0, chosen.to(images.device), divergence.gradient).cpu()
    stats: Stats = {
        "loss": divergence.expected_x - divergence.expected_u,
        "expected_x": divergence.expected_x, "expected_u": divergence.expected_u,
        "gradient_norm": value.norm().item(), "expert": start.expert, "expert_epoch": start.epoch, **seconds,
    }  # fmt: skip
    return Gradient(value, stats)
