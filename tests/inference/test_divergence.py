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
    assert not divergence.expected_x.requires_grad and not divergence.expected_u.requires_grad


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


# ---- soft labels


def cross_entropy_of(p: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return -(p * f.log_softmax(-1)).sum(-1)


def test_the_gradient_by_soft_labels_is_that_of_the_exact_kl():
    """Three classes, one image, nu_0 = N(0, I) on a grid: KL(nu_x | nu_u), its normaliser included, by finite
    differences in float64, against the gradient of Eq. 17's two terms under nu_x and nu_u."""
    axis = torch.linspace(-5, 5, 31, dtype=torch.float64)
    f = torch.cartesian_prod(axis, axis, axis)
    prior = -0.5 * f.square().sum(1)
    nu_x = (-0.5 * ((f - torch.tensor([1.0, -0.5, 0.3])) / 0.8).square().sum(1)).softmax(0)

    def log_nu_u(z: torch.Tensor) -> torch.Tensor:
        return (prior - cross_entropy_of(z.softmax(0), f)).log_softmax(0)

    def kl(z: torch.Tensor) -> float:
        return float((nu_x * (nu_x.log() - log_nu_u(z))).sum())

    z, step = torch.tensor([0.7, -0.2, -0.5], dtype=torch.float64), 1e-5
    numeric = [(kl(z + step * e) - kl(z - step * e)) / (2 * step) for e in torch.eye(3, dtype=torch.float64)]

    def by_labels(weights: torch.Tensor) -> torch.Tensor:
        """The gradient of the implementation's term, every point of the grid being an image, weighted."""
        rows = z.expand(len(f), 3).clone().requires_grad_()
        at = FunctionPosterior(f, torch.zeros_like(f))
        value = expected_cross_entropy(at, rows.softmax(1), 1, rng())
        return (len(f) * weights[:, None] * torch.autograd.grad(value, rows)[0]).sum(0)

    gradient = by_labels(nu_x) - by_labels(log_nu_u(z).exp())
    assert gradient.abs().max() > 0.02
    torch.testing.assert_close(gradient, torch.tensor(numeric, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_soft_labels_have_the_expected_cross_entropy_of_their_classes():
    """One-hot probabilities are hard labels; others give the mean of the classes' terms over the same draws."""
    posterior, labels = random_posterior(3), torch.tensor([0, 1, 2, 3, 0, 1])
    hard = expected_cross_entropy(posterior, labels, 7, rng())
    onehot = torch.eye(4, dtype=torch.float64)[labels]
    torch.testing.assert_close(expected_cross_entropy(posterior, onehot, 7, rng()), hard)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).expand(6, 4)
    each = [expected_cross_entropy(posterior, torch.full((6,), c), 7, rng()) for c in range(4)]
    expected = sum(weight * value for weight, value in zip((0.1, 0.2, 0.3, 0.4), each, strict=True))
    torch.testing.assert_close(expected_cross_entropy(posterior, p, 7, rng()), torch.as_tensor(expected))
