"""Eq. 27 against its stationary distribution, and the readings of its noise."""

from itertools import islice, repeat

import pytest
import torch
from support import oracles

from fbpc_ray.core.types import Batch
from fbpc_ray.inference.posterior import loss_and_grad
from fbpc_ray.inference.sghmc import NOISE_READINGS, noise_variance, sghmc

NOTHING = Batch(torch.zeros(1), torch.zeros(1, dtype=torch.long))


def quadratic(curvature):
    """curvature / 2 |w|^2, whose value nobody asks for, and its gradient."""
    return lambda params, batch: (torch.zeros(()), {"w": curvature * params["w"]})


def chain(curvature=1.0, width=1, steps=10, start=0.0, **settings):
    defaults = {"eta": 0.03, "alpha": 0.1, "variance": 0.0, "source": torch.Generator().manual_seed(0)}
    params = {"w": torch.full((width,), start, dtype=torch.float64)}
    return islice(sghmc(quadratic(curvature), params, repeat(NOTHING), **(defaults | settings)), steps)


def test_without_noise_it_is_sgd_with_momentum_one_minus_alpha():
    """d = 0: v <- .9 v - eta grad, theta <- theta + v is torch's SGD with momentum .9 and learning rate eta."""
    w = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([w], lr=0.03, momentum=0.9)
    for sample in chain(curvature=1.7, width=3, steps=50, start=2.0):
        optimiser.zero_grad()
        (0.5 * 1.7 * w.square().sum()).backward()
        optimiser.step()
        torch.testing.assert_close(sample["w"], w.detach(), rtol=1e-12, atol=1e-14)


def test_noise_readings_by_their_formulas():
    """consistent 2 alpha eta d, gradient eta^2 2d, literal 2d, at the paper's constants for ten images."""
    by_name = {name: noise_variance(name, eta=0.03, alpha=0.1, d=0.001) for name in NOISE_READINGS}
    assert by_name == pytest.approx({"consistent": 6e-6, "gradient": 1.8e-6, "literal": 2e-3})


def test_the_consistent_reading_has_temperature_d():
    """Var(theta) h -> d as eta -> 0: the friction and the noise balance at temperature d, whatever alpha is."""
    for alpha in (0.05, 0.3):
        noise = noise_variance("consistent", eta=1e-6, alpha=alpha, d=0.01)
        assert oracles.sghmc_variance(noise, 1e-6, alpha, curvature=2.0) * 2.0 == pytest.approx(0.01, rel=1e-4)


def test_samples_stay_as_they_were_and_the_start_too():
    start = {"w": torch.ones(3, dtype=torch.float64)}
    samples, copies = [], []
    for sample in islice(
        sghmc(quadratic(1.0), start, repeat(NOTHING), eta=0.1, alpha=0.1, variance=0.1, source=torch.Generator()), 5
    ):
        samples.append(sample["w"])
        copies.append(sample["w"].clone())
    assert all(torch.equal(a, b) for a, b in zip(samples, copies, strict=True))
    assert torch.equal(start["w"], torch.ones(3, dtype=torch.float64))


def test_noise_comes_from_the_generator_and_is_fresh_each_step():
    same = [
        [s["w"].item() for s in chain(variance=0.1, source=torch.Generator().manual_seed(seed))] for seed in (1, 1, 2)
    ]
    assert same[0] == same[1] != same[2]
    free = list(chain(curvature=0.0, width=5000, steps=2, alpha=0.999999, variance=1.0))
    first, second = free[0]["w"], free[1]["w"] - free[0]["w"]
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.06


def test_the_gradient_is_that_of_mean_cross_entropy_plus_half_the_decay_times_the_squared_norm():
    """Of a hidden layer, in float64, by autograd through the oracle's U: the first step from rest is -eta grad U."""
    source = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=source).double() for name, shape in (("v", (3, 4)), ("w", (4, 5)))}
    batch = Batch(torch.randn(7, 3, generator=source).double(), torch.arange(7) % 5)

    def forward(p, x):
        return (x @ p["v"]).tanh() @ p["w"]

    steps = sghmc(
        loss_and_grad(forward), params, repeat(batch), eta=0.5, alpha=0.1, variance=0.0, source=source, weight_decay=0.1
    )
    first = next(steps)
    expected = torch.func.grad(oracles.cross_entropy_potential(forward, 0.1))(params, batch)
    assert first.keys() == expected.keys()
    for name, value in first.items():
        torch.testing.assert_close((params[name] - value) / 0.5, expected[name], rtol=1e-12, atol=1e-14)


def test_a_step_on_vectors_is_that_of_each_parameter_by_itself_to_the_bit():
    """Eq. 27 as it is printed, one parameter after the other, each with noise of its own: 7 steps of float32."""
    shapes = {"a": (33, 3), "b": (5,), "c": (2, 3, 4), "d": ()}
    start = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in shapes.items()}
    eta, alpha, variance, decay = 0.03, 0.1, 2e-6, 0.005

    def gradient(params, batch):
        return torch.zeros(()), {name: (3 * value).sin() for name, value in reversed(params.items())}

    steps = sghmc(
        gradient, start, repeat(NOTHING), eta=eta, alpha=alpha, variance=variance, weight_decay=decay,
        source=torch.Generator().manual_seed(2),
    )  # fmt: skip
    source, theta, v = torch.Generator().manual_seed(2), dict(start), {k: torch.zeros(s) for k, s in shapes.items()}
    for sample in islice(steps, 7):
        _, gradients = gradient(theta, NOTHING)
        for name in shapes:
            grad_u = gradients[name] + decay * theta[name]
            noise = torch.randn(shapes[name], generator=source)
            v[name] = (1 - alpha) * v[name] - eta * grad_u + variance**0.5 * noise
            theta[name] = theta[name] + v[name]
        assert list(sample) == list(shapes)
        assert all(torch.equal(sample[name], theta[name]) for name in shapes)
