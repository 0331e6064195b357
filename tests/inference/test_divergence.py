"""Eq. 17 against Gauss-Hermite quadrature, its symmetries, and the direction of its gradient."""

import numpy as np
import pytest
import torch

from fbpc_ray.inference.divergence import expected_cross_entropy, forward_kl
from fbpc_ray.inference.posterior import FunctionPosterior


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_posterior(seed, m=6, d=4, spread=0.5):
    source = rng(seed)
    mean = torch.randn(m, d, generator=source, dtype=torch.float64)
    return FunctionPosterior(mean, spread * torch.rand(m, d, generator=source, dtype=torch.float64))


def test_two_classes_agree_with_quadrature():
    """For d = 2, -log p(0 | f) = log(1 + exp(f_1 - f_0)), and f_1 - f_0 ~ N(mu_1 - mu_0, psi_0 + psi_1)."""
    posterior = FunctionPosterior(torch.tensor([[0.3, -0.4]]).double(), torch.tensor([[0.7, 1.9]]).double())
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    gap = (-0.4 - 0.3) + np.sqrt(0.7 + 1.9) * nodes
    exact = float((weights * np.log1p(np.exp(gap))).sum() / np.sqrt(2 * np.pi))
    estimate = expected_cross_entropy(posterior, torch.tensor([0]), 400_000, rng())
    assert estimate.item() == pytest.approx(exact, abs=4 * 1.6 / np.sqrt(400_000))


def test_variance_enters_by_its_square_root():
    """At variance 4 the draws are mean + 2 eps: with the same generator, a slow loop gives the same number."""
    posterior = FunctionPosterior(torch.zeros(3, 2), torch.full((3, 2), 4.0))
    labels = torch.tensor([0, 1, 1])
    noise = torch.randn(5, 3, 2, generator=rng(7))
    slow = sum(-(2 * noise[s, i]).log_softmax(0)[labels[i]].item() for s in range(5) for i in range(3)) / 15
    assert expected_cross_entropy(posterior, labels, 5, rng(7)).item() == pytest.approx(slow, rel=1e-6)


def test_value_is_the_x_term_minus_the_u_term():
    x, u, labels = random_posterior(1), random_posterior(2), torch.tensor([0, 1, 2, 3, 0, 1])
    divergence = forward_kl(x, u, labels, 20_000, rng())
    assert divergence.value.item() == pytest.approx((divergence.expected_x - divergence.expected_u).item(), abs=1e-12)
    assert divergence.expected_x.item() == pytest.approx(
        expected_cross_entropy(x, labels, 20_000, rng(5)).item(), abs=0.02
    )
    assert divergence.expected_u.item() == pytest.approx(
        expected_cross_entropy(u, labels, 20_000, rng(6)).item(), abs=0.02
    )


def test_identical_posteriors_without_variance_give_exactly_zero():
    mean = random_posterior(3).mean.requires_grad_()
    same = FunctionPosterior(mean, torch.zeros_like(mean))
    divergence = forward_kl(same, same, torch.tensor([0, 1, 2, 3, 0, 1]), 3, rng())
    assert divergence.value.item() == 0.0
    (gradient,) = torch.autograd.grad(divergence.value, mean)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_two_sides_draw_their_own_noise():
    """eps_x and eps_u are independent: equal posteriors differ in a finite sample, by a mean-zero amount."""
    same, labels = random_posterior(4, spread=2.0), torch.tensor([0, 1, 2, 3, 0, 1])
    values = torch.stack([forward_kl(same, same, labels, 1, rng(seed)).value for seed in range(400)])
    assert values.std() > 0.05
    assert abs(values.mean()) < 4 * values.std() / 20


def test_gradient_without_variance_is_the_softmax_error_over_m():
    """d CE / d mean = (softmax - onehot) / m on the x side and minus that on the u side: a mean, not a sum."""
    x, u = random_posterior(5), random_posterior(6)
    mean_x, mean_u = x.mean.requires_grad_(), u.mean.requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    zero = torch.zeros_like(mean_x)
    value = forward_kl(FunctionPosterior(mean_x, zero), FunctionPosterior(mean_u, zero), labels, 7, rng()).value
    gradient_x, gradient_u = torch.autograd.grad(value, [mean_x, mean_u])
    onehot = torch.eye(4, dtype=torch.float64)[labels]
    torch.testing.assert_close(gradient_x, (mean_x.detach().softmax(1) - onehot) / 6)
    torch.testing.assert_close(gradient_u, -(mean_u.detach().softmax(1) - onehot) / 6)


def test_gradient_is_unbiased_for_the_expectation():
    """Monte-Carlo gradient of the two-class term against the derivative of its quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    gap = -0.7 + np.sqrt(2.6) * nodes
    exact = -float((weights / (1 + np.exp(-gap))).sum() / np.sqrt(2 * np.pi))  # d/d mu_0 of E log(1 + exp(gap))
    mean = torch.tensor([[0.3, -0.4]]).double().requires_grad_()
    posterior = FunctionPosterior(mean, torch.tensor([[0.7, 1.9]]).double())
    (gradient,) = torch.autograd.grad(expected_cross_entropy(posterior, torch.tensor([0]), 400_000, rng()), mean)
    assert gradient[0, 0].item() == pytest.approx(exact, abs=4 * 0.5 / np.sqrt(400_000))
    assert gradient[0, 1].item() == pytest.approx(-exact, abs=4 * 0.5 / np.sqrt(400_000))


def test_more_images_of_the_same_kind_do_not_change_the_value():
    """The mean over images: repeating every image leaves the variance-free value as it is."""
    x, u, labels = random_posterior(7, spread=0.0), random_posterior(8, spread=0.0), torch.tensor([0, 1, 2, 3, 0, 1])
    x2, u2 = (FunctionPosterior(p.mean.repeat(2, 1), p.variance.repeat(2, 1)) for p in (x, u))
    once = forward_kl(x, u, labels, 2, rng()).value
    torch.testing.assert_close(forward_kl(x2, u2, labels.repeat(2), 2, rng()).value, once)
