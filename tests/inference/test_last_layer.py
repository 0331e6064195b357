"""The closed-form last layer against other ways to the same numbers: dense algebra, sampling, finite differences."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from fbpc_ray.inference.last_layer import (
    PROBIT,
    kl_to_prior,
    mean_field_logits,
    one_hot_targets,
    posterior,
    predictive,
    relative_ridge,
    squared_loss,
)

RHO, SIGMA2 = 2.5, 0.3
RIDGE = RHO * SIGMA2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Bayesian linear regression in weight space: V = (rho I + Phi^T Phi / sigma^2)^-1, M = V Phi^T Y / sigma^2."""
    covariance = torch.linalg.inv(RHO * torch.eye(phi.shape[1], dtype=phi.dtype) + phi.T @ phi / SIGMA2)
    return covariance, covariance @ phi.T @ y / SIGMA2


@pytest.fixture(params=[(5, 9), (9, 5), (6, 6)], ids=["n < h", "n > h", "n = h"])
def problem(request) -> tuple[Tensor, Tensor, Tensor]:
    """Features and targets of the coreset, and features to predict at."""
    n, h = request.param
    return draw(n, h), draw(n, 3, seed=1), draw(7, h, seed=2)


def test_mean_and_variance_are_those_of_bayesian_linear_regression(problem):
    phi, y, at = problem
    covariance, weights = dense(phi, y)
    mean, variance = predictive(posterior(phi, y, ridge=RIDGE, precision=RHO), at)
    torch.testing.assert_close(mean, at @ weights, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, torch.einsum("bi,ij,bj->b", at, covariance, at), rtol=1e-10, atol=1e-12)


def test_one_observation_by_hand():
    """phi = 2, y = 3, rho = 1, sigma^2 = 1/2: V = 1/(1 + 8) and m = 1/9 * 2 * 3 / (1/2) = 4/3; at phi = 3: 4 and 1."""
    layer = posterior(torch.tensor([[2.0]]), torch.tensor([[3.0]]), ridge=0.5)
    mean, variance = predictive(layer, torch.tensor([[3.0]]))
    assert mean.item() == pytest.approx(4)
    assert variance.item() == pytest.approx(1)


def test_the_kl_is_that_of_torch_distributions(problem):
    phi, y, _ = problem
    covariance, weights = dense(phi, y)
    h = phi.shape[1]
    prior = MultivariateNormal(torch.zeros(h, dtype=phi.dtype), torch.eye(h, dtype=phi.dtype) / RHO)
    expected = sum(kl_divergence(MultivariateNormal(m, covariance), prior) for m in weights.T)
    value = kl_to_prior(posterior(phi, y, ridge=RIDGE, precision=RHO))
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-9, atol=1e-10)


def test_the_evidence_bound_is_tight():
    """At the exact posterior E_q[log p(Y | W)] - KL(q || prior) is log p(Y) = log N(Y_k | 0, K / rho + sigma^2 I)."""
    phi, y = draw(5, 9), draw(5, 3, seed=1)
    layer = posterior(phi, y, ridge=RIDGE, precision=RHO)
    mean, variance = predictive(layer, phi)
    expected_squares = (y - mean).square().sum() + 3 * variance.sum()
    likelihood = -0.5 * expected_squares / SIGMA2 - 0.5 * y.numel() * math.log(2 * math.pi * SIGMA2)
    marginal = MultivariateNormal(
        torch.zeros(5, dtype=phi.dtype), phi @ phi.T / RHO + SIGMA2 * torch.eye(5, dtype=phi.dtype)
    )
    evidence = sum(marginal.log_prob(column) for column in y.T)
    torch.testing.assert_close(likelihood - kl_to_prior(layer), torch.as_tensor(evidence), rtol=1e-9, atol=1e-9)


def test_gradients_of_every_part_by_features_and_targets():
    phi, y, at = draw(4, 6), draw(4, 3, seed=1), draw(5, 6, seed=2)

    def parts(phi: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        layer = posterior(phi, y, ridge=0.1, precision=RHO)
        mean, variance = predictive(layer, at)
        return mean_field_logits(mean, variance).log_softmax(1), kl_to_prior(layer)

    assert torch.autograd.gradcheck(parts, (phi.requires_grad_(), y.requires_grad_()))


def test_a_ridge_below_the_rounding_of_float32_keeps_its_digits():
    """Two nearly equal images, ridge 1e-9: in float32 A is singular. Halfway between them the mean is their mean."""
    phi = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])
    y = torch.tensor([[1.0], [2.0]])
    mean, variance = predictive(posterior(phi, y, ridge=1e-9), torch.tensor([[1.0, 5e-4]]))
    assert mean.item() == pytest.approx(1.5, abs=1e-2)
    assert 0 <= variance.item() < 1e-8


def test_features_that_are_not_finite_give_nan_not_an_exception():
    mean, _ = predictive(posterior(torch.tensor([[torch.nan, 1.0]]), torch.ones(1, 2), ridge=0.1), torch.ones(1, 2))
    assert mean.isnan().all()


@pytest.mark.parametrize("features", [[[0.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]]], ids=["first", "second"])
def test_a_matrix_that_is_not_positive_definite_gives_nan(features):
    """Without a ridge, at the first minor of A that is 0 and at the second one."""
    layer = posterior(torch.tensor(features), torch.ones(2, 1), ridge=0.0)
    assert layer.factor.isnan().all()


def test_rounding_makes_no_variance_negative():
    """At the images themselves it is nearly lambda, here below the rounding of |phi|^2."""
    phi = 100 * draw(40, 60).float()
    _, variance = predictive(posterior(phi, torch.ones(40, 1), ridge=1e-12), phi)
    assert (variance >= 0).all() and variance.max() < 1e-6


def test_without_variance_the_mean_field_softmax_is_the_softmax():
    mean = draw(4, 3)
    torch.testing.assert_close(mean_field_logits(mean, torch.zeros(4)), mean)


def test_a_variance_of_8_over_pi_divides_logits_by_the_root_of_2():
    """sigmoid(x) and Phi(sqrt(pi / 8) x) have the slope 1/4 at 0."""
    mean = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    scaled = mean_field_logits(mean, torch.tensor([8 / math.pi], dtype=torch.float64))
    torch.testing.assert_close(scaled, mean / math.sqrt(2.0))
    assert math.sqrt(PROBIT) / math.sqrt(2 * math.pi) == pytest.approx(1 / 4)


def test_the_mean_field_softmax_is_near_the_expected_softmax():
    """By 200,000 samples, variance 1/2: within .02 of E[softmax(f)], and closer than the plain softmax by half."""
    mean, variance = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    sampled = (mean + math.sqrt(0.5) * draw(200_000, 3, seed=3)).softmax(1).mean(0)
    error = (mean_field_logits(mean, variance).softmax(1) - sampled).abs().max()
    assert error < 0.02
    assert error < (mean.softmax(1) - sampled).abs().max() / 2


def test_relative_ridge_scales_with_the_features():
    phi = draw(5, 9)
    assert relative_ridge(3 * phi, 1e-3).item() == pytest.approx(9e-3 * (phi @ phi.T).trace().item() / 5)


def test_targets_and_their_loss():
    targets = one_hot_targets(torch.tensor([1, 0]), 4, 2.0)
    assert targets.tolist() == [[-0.5, 1.5, -0.5, -0.5], [1.5, -0.5, -0.5, -0.5]]
    assert squared_loss(torch.zeros(2, 4), targets).item() == pytest.approx((3 * 0.25 + 2.25) / 2)
