"""FBPC and FBPC-isotropic: one architecture's part of a step of Algorithm 1."""

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice

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
    coreset_batches,
    draw_expert,
    expert_epochs,
)
from fbpc_ray.distillation.trajectory_cache import TrajectoryKey
from fbpc_ray.inference.divergence import forward_kl
from fbpc_ray.inference.map_solve import map_solve
from fbpc_ray.inference.posterior import function_posterior, sgd_trajectory

EXPERT_SIDE_FORMAT = 1
"""To be raised with every change of what the K steps of theta_x compute, or draw: what is on disk is then made anew."""


def expert_side(problem: GradientContext, step: int) -> np.ndarray:
    """(1 + K, P) float32: theta_x and its K steps on real images, each as one vector. They don't depend on u."""
    expert, epoch = _expert(problem, step)
    found = _kept(problem, expert, epoch)
    return np.stack(list(_rows(problem, expert, epoch))) if found is None else found


def gradient(
    problem: GradientContext,
    step: int,
    images: Tensor,
    inner_lr: float,
    expert_side: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> Gradient:
    """Eq. 17 for one architecture at the pseudocoreset `images`. `inner_lr` is not used; `expert_side`, where it was
    computed ahead, changes no bit. `start` (P,) is where the MAP solve begins (`--map-init warm`); None: at the prior.

    Its stats: the two terms of Eq. 17 and their difference, nats an image; the means of diag Psi, squared logits; the
    MAP solve; which expert; seconds for theta_x with its K steps, for the MAP solve, for the K steps on u, for Eq. 17.
    """
    network, labels, settings, augment = problem.network, problem.labels, problem.settings, problem.augment
    forward, loss_and_grad, logits = network.forward, problem.passes.loss_and_grad, problem.passes.logits
    size, rng = settings.batch_size, problem.rng
    clock = Clock(network.device)
    u = images.detach().requires_grad_()
    chosen = problem.batch(step)
    augmented = AUGMENTATIONS[augment](len(chosen), rng(step, "augment"))(u[chosen])
    isotropic = settings.method == "fbpc-isotropic"

    # theta_x: a snapshot of a random expert; its K steps on real images.
    expert, epoch = _expert(problem, step)
    if expert_side is None and not isotropic:
        expert_side = _kept(problem, expert, epoch)
    samples_x: Iterable[Params]
    if expert_side is None:
        theta_x = _theta_x(problem, expert, epoch)
        samples_x = _k_steps(problem, expert, epoch, theta_x)
    else:
        theta_x, samples_x = _params(problem, expert_side[0]), (_params(problem, row) for row in expert_side[1:])
    posterior_x = function_posterior(forward, theta_x, None if isotropic else samples_x, augmented, logits)
    seconds_x = clock.lap()

    # theta_u: the MAP solution of the pseudocoreset, from a draw of the prior unless told otherwise.
    solution = map_solve(
        loss_and_grad,
        network.init(rng(step, "prior")) if start is None else _params(problem, start),
        coreset_batches(u.detach(), labels, size, augment, rng(step, "map")),
        threshold=settings.gamma,
        learning_rate=settings.map_lr,
        max_steps=settings.map_max_steps,
        batches_per_pass=math.ceil(len(labels) / size),
    )
    seconds_map = clock.lap()

    # Its K steps on the pseudocoreset.
    batches = coreset_batches(u.detach(), labels, size, augment, rng(step, "coreset"))
    samples_u = islice(
        sgd_trajectory(loss_and_grad, solution.value, batches, settings.lambda_u), settings.posterior_steps
    )
    posterior_u = function_posterior(forward, solution.value, None if isotropic else samples_u, augmented, logits)
    seconds_u = clock.lap()

    divergence = forward_kl(posterior_x, posterior_u, labels[chosen], settings.mc_samples, rng(step, "monte-carlo"))
    (value,) = torch.autograd.grad(divergence.value, u)
    value = value.cpu()
    return Gradient(
        value,
        {
            "loss": divergence.value.item(),
            "expected_x": divergence.expected_x.item(),
            "expected_u": divergence.expected_u.item(),
            "psi_x": posterior_x.variance.mean().item(),
            "psi_u": posterior_u.variance.mean().item(),
            "gradient_norm": value.norm().item(),
            "map_steps": solution.stats.steps,
            "map_ending": str(solution.status),
            "map_loss": solution.stats.loss,
            "expert": expert,
            "expert_epoch": epoch,
            "seconds_x": seconds_x,
            "seconds_map": seconds_map,
            "seconds_u": seconds_u,
            "seconds_gradient": clock.lap(),
        },
        solution=_vector(solution.value).cpu() if settings.map_init == "warm" else None,
    )


def _expert(problem: GradientContext, step: int) -> tuple[int, int]:
    """The step's trajectory and epoch."""
    s = problem.settings
    epochs = expert_epochs(s.start_epoch, s.start_rule, problem.store.recipe.epochs)
    return draw_expert(problem.expert_count, epochs, problem.rng(step, "expert"))


def _theta_x(problem: GradientContext, expert: int, epoch: int) -> Params:
    return problem.network.parameters_of(problem.store.read(expert, epoch))


def _k_steps(problem: GradientContext, expert: int, epoch: int, theta_x: Params) -> Iterable[Params]:
    """theta_x^(1..K), Eq. 16 on the x side. A snapshot has one such trajectory: its real images and their augmentation
    are drawn by the snapshot's name, so that every step, run and seed that meets it can share the work."""
    s, recipe = problem.settings, problem.store.recipe
    source = generator(recipe.seed, "x-side", problem.network.spec.architecture, expert, epoch)
    batches = problem.real.stream(s.real_batch_size, problem.augment, source)
    return islice(sgd_trajectory(problem.passes.loss_and_grad, theta_x, batches, s.lambda_x), s.posterior_steps)


def _rows(problem: GradientContext, expert: int, epoch: int) -> Iterator[Tensor]:
    theta_x = _theta_x(problem, expert, epoch)
    for params in chain([theta_x], _k_steps(problem, expert, epoch, theta_x)):
        yield _vector(params).cpu()


def _kept(problem: GradientContext, expert: int, epoch: int) -> np.ndarray | None:
    """The rows from the cache, made where they aren't there; None where there is no cache for them."""
    if problem.trajectory_cache is None:
        return None
    shape = 1 + problem.settings.posterior_steps, sum(size.numel() for size in problem.network.shapes.values())
    key = trajectory_key(problem, expert, epoch).digest()
    return problem.trajectory_cache.block(key, shape, lambda: _rows(problem, expert, epoch))


def trajectory_key(problem: GradientContext, expert: int, epoch: int) -> TrajectoryKey:
    """Name all that the bits of theta_x and its K steps depend on."""
    s, device = problem.settings, problem.network.device
    return TrajectoryKey(
        EXPERT_SIDE_FORMAT, problem.store.recipe, expert, problem.store.checksum(expert), epoch,
        s.lambda_x, s.real_batch_size, s.posterior_steps, problem.augment,
        torch.__version__, torch.get_num_threads(), problem.passes.folder is not None,
        torch.backends.cpu.get_cpu_capability(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )  # fmt: skip


def _vector(params: Params) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def _params(problem: GradientContext, row: np.ndarray) -> Params:
    """The inverse of `_vector`, on the device. Each tensor has memory of its own: kernels may sum in another order
    where memory is aligned otherwise."""
    shapes = problem.network.shapes
    ends = list(accumulate(shape.numel() for shape in shapes.values()))
    parts = zip(shapes.items(), [0, *ends], ends)  # noqa: B905  the starts have one more
    return {name: torch.tensor(row[a:b], device=problem.network.device).view(shape) for (name, shape), a, b in parts}
