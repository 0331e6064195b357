"""Every solver and sampler on every problem with a closed form. A new method, noise reading or problem is one row."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from itertools import islice, repeat
from typing import Any

import pytest
import torch
from support import oracles
from support.problems import PROBLEMS, Problem
from torch import Tensor

import fbpc_ray.inference
from fbpc_ray.core.types import Batch, Params
from fbpc_ray.inference.map_solve import SolveStats, map_solve
from fbpc_ray.inference.posterior import empirical_variance, loss_and_grad, sgd_trajectory
from fbpc_ray.inference.sghmc import NOISE_READINGS, noise_variance, sghmc
from fbpc_ray.inference.solution import Solution, SolverStatus
from fbpc_ray.inference.weight_space import unrolled_sgd

RATE, STEPS = 0.04, 25
CHAINS = 1000
ETA, ALPHA, D = 0.03, 0.1, 0.02
NOISE = {"consistent": 2 * ALPHA * ETA * D, "gradient": ETA**2 * 2 * D, "literal": 2 * D}
"""Variance of the noise of a step by reading, by hand."""


def whole(problem: Problem) -> Batch:
    return Batch(problem.images, problem.labels)


def solve_by_adam(problem: Problem) -> None:
    """map_solve ends at the first loss at or below gamma; below the floor it takes all its steps, and is at z*."""
    gamma = problem.floor + 1e-4

    def solve(start: Params, gamma: float, max_steps: int) -> Solution[Params, SolveStats]:
        return map_solve(
            loss_and_grad(problem.forward), start, repeat(whole(problem)), threshold=gamma, learning_rate=0.1,
            max_steps=max_steps,
        )  # fmt: skip

    value, status, stats = solve(problem.start, gamma, 600)
    assert status == SolverStatus.CONVERGED
    assert problem.excess(value) <= 1e-4
    assert stats.loss == pytest.approx(problem.floor + problem.excess(value), rel=1e-9)
    before = solve(problem.start, gamma, stats.steps - 1)
    assert (before.status, before.stats.steps) == (SolverStatus.MAX_STEPS, stats.steps - 1)
    assert problem.excess(before.value) > 1e-4
    never = solve(problem.start, problem.floor - 0.01, 600)
    assert (never.status, never.stats.steps) == (SolverStatus.MAX_STEPS, 600)
    torch.testing.assert_close(problem.flat(never.value), problem.optimum, rtol=0, atol=1e-9)
    lost = {name: torch.full_like(value, torch.nan) for name, value in problem.start.items()}
    assert solve(lost, gamma, 600).status == SolverStatus.NONFINITE


def walk_by_sgd(problem: Problem) -> None:
    """sgd_trajectory is z* + (I - lr H)^k (z_0 - z*) at each step, and Eq. 16's variance that of these points."""
    samples = sgd_trajectory(loss_and_grad(problem.forward), problem.start, repeat(whole(problem)), RATE)
    walked = torch.stack([problem.flat(sample) for sample in islice(samples, STEPS)])
    start = problem.flat(problem.start)
    closed = torch.stack(oracles.sgd_on_quadratic(start, problem.optimum, problem.hessian, RATE, STEPS))
    torch.testing.assert_close(walked, closed, rtol=1e-10, atol=1e-12)
    expected = (closed - closed.mean(0)).square().sum(0) / STEPS
    torch.testing.assert_close(empirical_variance(iter(walked)), expected, rtol=1e-9, atol=1e-13)


def unroll_sgd(problem: Problem) -> None:
    """unrolled_sgd ends where SGD does, with the derivatives of that by the learning rate and by each target."""
    images = problem.images.clone().requires_grad_()
    rate = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    batches = islice(repeat(Batch(images, problem.labels)), STEPS)
    end = problem.flat(unrolled_sgd(problem.forward, problem.start, batches, rate))
    arguments = problem.flat(problem.start), problem.optimum, problem.hessian, RATE, STEPS
    torch.testing.assert_close(end, oracles.sgd_on_quadratic(*arguments)[-1], rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(one, (images, rate), retain_graph=True) for one in end]
    by_target = torch.stack([gradient.flatten(1)[:, -1] for gradient, _ in gradients])
    expected = oracles.sgd_target_derivative(problem.hessian, problem.slope, RATE, STEPS)
    torch.testing.assert_close(by_target, expected, rtol=1e-8, atol=1e-11)
    by_rate = torch.stack([gradient for _, gradient in gradients])
    torch.testing.assert_close(by_rate, oracles.sgd_rate_derivative(*arguments), rtol=1e-8, atol=1e-11)


def assert_stationary(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Draws (..., n, p) have this mean and covariance: whitened, 0 and I, to 5 standard errors of n draws."""
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (draws - mean).flatten(0, -2).T, upper=False
    )
    count = white.shape[1]
    assert white.mean(1).abs().max() < 5 / count**0.5
    assert (white @ white.T / count - torch.eye(len(mean))).abs().max() < 5 * (2 / count) ** 0.5


def sample(weight_decay: float) -> Callable[[Problem], None]:
    def check(problem: Problem) -> None:
        """SGHMC's stationary mean and covariance, those of U = L + weight_decay / 2 |z|^2."""

        def of_each_chain(params: Params, batch: Batch) -> tuple[Tensor, Params]:
            loss, gradients = loss_and_grad(problem.forward)(params, batch)  # the mean over chains, too
            return loss, {name: CHAINS * value for name, value in gradients.items()}

        batch = Batch(problem.images, problem.labels.repeat(CHAINS))
        start = {name: value.expand(CHAINS, *value.shape) for name, value in problem.start.items()}
        variance = NOISE["consistent"]
        chain = sghmc(
            of_each_chain, start, repeat(batch), eta=ETA, alpha=ALPHA, variance=variance,
            source=torch.Generator().manual_seed(1), weight_decay=weight_decay,
        )  # fmt: skip
        hessian = problem.hessian + weight_decay * torch.eye(len(problem.optimum), dtype=torch.float64)
        draws = torch.stack([problem.flat(params) for params in islice(chain, 300, 601, 150)])
        mean = torch.linalg.solve(hessian, problem.hessian @ problem.optimum)
        assert_stationary(draws, mean, oracles.sghmc_covariance(variance, ETA, ALPHA, hessian))

    return check


def descend(problem: Problem) -> None:
    """SGHMC without noise is at rest at z*."""
    chain = sghmc(
        loss_and_grad(problem.forward), problem.start, repeat(whole(problem)), eta=ETA, alpha=ALPHA, variance=0.0,
        source=torch.Generator(),
    )  # fmt: skip
    end = problem.flat(next(islice(chain, 1000, None)))
    torch.testing.assert_close(end, problem.optimum, rtol=0, atol=1e-9)


METHODS: dict[str, tuple[Callable[..., Any], Callable[[Problem], None]]] = {
    "map_solve": (map_solve, solve_by_adam),
    "sgd_trajectory": (sgd_trajectory, walk_by_sgd),
    "unrolled_sgd": (unrolled_sgd, unroll_sgd),
    "sghmc without noise": (sghmc, descend),
    "sghmc": (sghmc, sample(0.0)),
    "sghmc with a prior": (sghmc, sample(0.7)),
}
"""Name -> (what is tested, its check)."""


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("method", METHODS)
def test_method_on_problem(method, problem):
    METHODS[method][1](problem)


def test_no_solver_or_sampler_is_missing():
    """Each function of `fbpc_ray.inference` with an argument `batches` takes steps."""
    names = [module.name for module in pkgutil.iter_modules(fbpc_ray.inference.__path__)]
    modules = [importlib.import_module(f"{fbpc_ray.inference.__name__}.{name}") for name in names]
    functions = {
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isfunction(value) and "batches" in inspect.signature(value).parameters
    }
    assert functions == {function for function, _ in METHODS.values()}


def test_readings_of_the_noise_are_variances():
    """All that a chain knows of a reading is the variance of its noise."""
    assert {name: noise_variance(name, eta=ETA, alpha=ALPHA, d=D) for name in NOISE_READINGS} == pytest.approx(NOISE)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_closed_forms_of_a_problem_are_its_own(problem):
    """H, z* and the floor against autograd: the gradient at z* is 0, the Hessian is H, and CE is the loss."""

    def loss(z: Tensor) -> Tensor:
        sizes = [value.numel() for value in problem.start.values()]
        params = dict(zip(problem.start, z.split(sizes), strict=True))
        return torch.nn.functional.cross_entropy(problem.forward(params, problem.images), problem.labels)

    z = problem.optimum
    assert loss(z).item() == pytest.approx(problem.floor, rel=1e-12)
    assert torch.autograd.functional.jacobian(loss, z).abs().max() < 1e-12
    hessian = torch.autograd.functional.hessian(loss, z)
    torch.testing.assert_close(hessian, problem.hessian, rtol=1e-9, atol=1e-12)
