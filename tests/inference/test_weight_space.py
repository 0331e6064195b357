"""Eqs. 5-7 on a conjugate model, where the exact gradient of the divergence is known, and W by finite differences."""

import math
from typing import NamedTuple

import pytest
import torch
from support import oracles
from torch import Tensor
from torch.nn.functional import softplus

from fbpc_ray.core.types import Batch
from fbpc_ray.inference.weight_space import forward_kl, perturb, reverse_kl, unrolled_sgd, wasserstein

DRAWS = 4000


def gaussian_forward(params, inputs):
    """A linear model whose one logit is its mean: (b, p) -> (b,)."""
    return inputs @ params["theta"]


def gaussian_loss(means, targets):
    """Mean of -log N(y | mean, 1), without its constant."""
    return 0.5 * (means - targets).square().mean()


def same(images):
    return images


class Conjugate(NamedTuple):
    """Two data sets of the model y ~ N(x . theta, 1), theta ~ N(0, I), with posteriors N(mu, s^2 I) of one s.

    Columns are orthogonal with squared norm c, so that (I + X^T X)^-1 = I / (1 + c): the isotropic q of Eq. 6 is then
    the exact posterior, and the estimators must give the exact gradient of the KL between the true posteriors.
    """

    u: Tensor
    y: Tensor
    x: Tensor
    t: Tensor

    @property
    def scale(self):
        return 1 / math.sqrt(1 + self.u[:, 0].square().sum().item())


@pytest.fixture
def conjugate():
    source = torch.Generator().manual_seed(0)

    def orthogonal(rows):
        return 2 * torch.linalg.qr(torch.randn(rows, 2, generator=source, dtype=torch.float64)).Q

    u, x = orthogonal(4), orthogonal(12)
    return Conjugate(u, torch.randn(4, generator=source).double(), x, torch.randn(12, generator=source).double())


def means(c):
    """mu_x and mu_u as parameters."""
    return [{"theta": oracles.conjugate_posterior(*data).mean} for data in ((c.x, c.t), (c.u, c.y))]


def agrees(estimates, exact):
    """Each entry's mean over independent estimates lies within 4.5 standard errors of the exact value."""
    stack = torch.stack(estimates)
    error = stack.std(0) / math.sqrt(len(stack))
    assert error.max() < 0.2 * exact.abs().max()  # or the test could not tell
    assert ((stack.mean(0) - exact).abs() < 4.5 * error).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_gradients_are_exact_on_a_conjugate_model(conjugate, direction):
    """Estimates without bias of the gradients of KL(pi_x | pi_u), Eq. 5, and KL(pi_u | pi_x): by u, and by its targets
    y, which enter pi_u alone. The centred covariance of the reverse one has no bias even from few draws."""
    c, (mu_x, mu_u) = conjugate, means(conjugate)
    u, y = c.u.clone().requires_grad_(), c.y.clone().requires_grad_()
    of_u, of_x = oracles.conjugate_posterior(u, y), oracles.conjugate_posterior(c.x, c.t)
    value = oracles.gaussian_kl(of_x, of_u) if direction == "forward" else oracles.gaussian_kl(of_u, of_x)
    by_images, by_targets = (part / len(y) for part in torch.autograd.grad(value, (u, y)))
    items = []
    for seed in range(20 if direction == "forward" else DRAWS // 2):
        common = {"scale": c.scale, "source": torch.Generator().manual_seed(seed), "loss": gaussian_loss}
        if direction == "forward":
            items.append(forward_kl(gaussian_forward, mu_x, mu_u, c.u, y, [same] * (DRAWS // 20), **common))
        else:
            real = Batch(c.x, c.t)
            items.append(reverse_kl(gaussian_forward, mu_u, c.u, y, same, real, len(c.x), samples=4, **common))
    agrees([item.gradient for item in items], by_images)
    agrees([item.by_labels for item in items], by_targets)


def test_the_gradient_by_images_is_the_same_where_labels_are_fixed(conjugate):
    c, (mu_x, mu_u) = conjugate, means(conjugate)

    def estimates(y):
        common = {"scale": c.scale, "source": torch.Generator().manual_seed(0), "loss": gaussian_loss}
        real = Batch(c.x, c.t)
        return (
            forward_kl(gaussian_forward, mu_x, mu_u, c.u, y, [same] * 3, **common),
            reverse_kl(gaussian_forward, mu_u, c.u, y, same, real, len(c.x), samples=4, **common),
        )

    for fixed, learned in zip(estimates(c.y), estimates(c.y.clone().requires_grad_()), strict=True):
        assert fixed.by_labels is None and learned.by_labels is not None
        torch.testing.assert_close(fixed.gradient, learned.gradient)


def test_the_potential_of_a_batch_of_u_counts_all_of_u(conjugate):
    """A batch of 2 of the 4 images, each twice in u: with m = 4 the gradient is that of all of u, whose images 1, 3 and
    2, 4 are the same, at one of each pair: twice a quarter's."""
    c, (_, mu_u) = conjugate, means(conjugate)
    twice, y = c.u[:2].repeat(2, 1), c.y[:2].repeat(2)

    def gradient(u, labels, **more):
        return reverse_kl(
            gaussian_forward, mu_u, u, labels, same, Batch(c.x, c.t), len(c.x), samples=5, scale=c.scale,
            source=torch.Generator().manual_seed(0), loss=gaussian_loss, **more,
        ).gradient  # fmt: skip

    torch.testing.assert_close(gradient(c.u[:2], c.y[:2], coreset_count=4), 2 * gradient(twice, y)[:2])


def test_the_authors_estimate_of_the_reverse_kl_is_ours_without_counts(conjugate):
    """By hand from its draws: -1/S sum (gap - mean gap) (gradient - mean gradient), the gap of mean losses."""
    c, (_, mu_u) = conjugate, means(conjugate)
    result = reverse_kl(
        gaussian_forward, mu_u, c.u, c.y, same, Batch(c.x, c.t), len(c.x), samples=3, scale=c.scale,
        source=torch.Generator().manual_seed(0), loss=gaussian_loss, scaled=False,
    )  # fmt: skip
    source, gaps, gradients = torch.Generator().manual_seed(0), [], []
    for _ in range(3):
        theta, u = perturb(mu_u, c.scale, source), c.u.clone().requires_grad_()
        loss_u = gaussian_loss(gaussian_forward(theta, u), c.y)
        gradients.append(torch.autograd.grad(loss_u, u)[0])
        gaps.append((gaussian_loss(gaussian_forward(theta, c.x), c.t) - loss_u).detach())
    gap, gradient = torch.stack(gaps), torch.stack(gradients)
    centred = (gap - gap.mean()).view(-1, *[1] * c.u.ndim) * (gradient - gradient.mean(0))
    torch.testing.assert_close(result.gradient, -centred.mean(0), rtol=1e-5, atol=1e-7)


def test_equal_posteriors_need_no_move(conjugate):
    """With mu_x = mu_u and no weight noise both terms of Eq. 7 are the same function of u: exactly zero."""
    c, (_, mu_u) = conjugate, means(conjugate)
    result = forward_kl(
        gaussian_forward, mu_u, mu_u, c.u, c.y, [same], scale=0.0, source=torch.Generator(), loss=gaussian_loss
    )
    assert result.gradient.abs().max() == 0
    assert result.expected_x == result.expected_u


def test_each_draw_has_its_view_and_its_own_noise(conjugate):
    """A view is applied once and seen by both terms; a reverse KL looks through one view alone."""
    c, (mu_x, mu_u) = conjugate, means(conjugate)
    seen = []

    def view(images):
        seen.append(len(seen))
        return images * (1 + len(seen))

    source = torch.Generator().manual_seed(0)
    forward_kl(gaussian_forward, mu_x, mu_u, c.u, c.y, [view] * 3, scale=0.1, source=source, loss=gaussian_loss)
    assert len(seen) == 3
    real = Batch(c.x, c.t)
    reverse_kl(
        gaussian_forward, mu_u, c.u, c.y, view, real, 12, samples=5, scale=0.1, source=source, loss=gaussian_loss
    )
    assert len(seen) == 4
    with pytest.raises(ValueError, match="two draws"):
        reverse_kl(gaussian_forward, mu_u, c.u, c.y, view, real, 12, samples=1, scale=0.1, source=source)


def test_the_real_potential_counts_every_image(conjugate):
    """U_x is n times the mean of a batch: the gradient is affine in n, and n matters."""
    c, (_, mu_u) = conjugate, means(conjugate)
    one, two, four = (
        reverse_kl(
            gaussian_forward, mu_u, c.u, c.y, same, Batch(c.x, c.t), n, samples=8, scale=0.3,
            source=torch.Generator().manual_seed(0), loss=gaussian_loss,
        ).gradient
        for n in (100, 200, 400)
    )  # fmt: skip
    torch.testing.assert_close(four - two, 2 * (two - one))  # affine in n
    assert (two - one).abs().max() > 1e-3


def test_perturbed_parameters_have_the_scale():
    params = {"a": torch.zeros(200, 100), "b": torch.full((3,), 7.0)}
    drawn = perturb(params, 0.01, torch.Generator().manual_seed(0))
    assert drawn["a"].std().item() == pytest.approx(0.01, rel=0.02)  # 20,000 draws: 0.5 % standard error
    assert (drawn["b"] - 7).abs().max() < 0.06


class TestUnrolled:
    """A small smooth network in float64, where central differences are good to nine digits."""

    def forward(self, params, inputs):
        return softplus(inputs @ params["first"]) @ params["second"]

    @pytest.fixture
    def problem(self):
        source = torch.Generator().manual_seed(3)
        shapes = {"first": (3, 5), "second": (5, 4)}

        def draw(scale):
            return {k: scale * torch.randn(s, generator=source, dtype=torch.float64) for k, s in shapes.items()}

        theta_0 = draw(1.0)
        mu_x = {name: value + 0.3 * draw(1.0)[name] for name, value in theta_0.items()}
        images = torch.randn(6, 3, generator=source, dtype=torch.float64)
        labels = torch.tensor([0, 1, 2, 3, 0, 1])
        return theta_0, mu_x, images, labels

    def loss(self, problem, images, rate):
        theta_0, mu_x, _, labels = problem
        halves = [Batch(images[:4], labels[:4]), Batch(images[2:], labels[2:])] * 3
        return wasserstein(unrolled_sgd(self.forward, theta_0, halves, rate), mu_x, theta_0)

    def test_gradient_is_that_of_finite_differences(self, problem):
        """W against central differences in every pixel and in the learning rate, through six unrolled steps."""
        images = problem[2].clone().requires_grad_()
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        gradients = torch.autograd.grad(self.loss(problem, images, rate), (images, rate))
        h = 1e-5
        for index in range(images.numel()):
            step = torch.zeros_like(images).flatten().index_fill(0, torch.tensor(index), h).view_as(images)
            up, down = (self.loss(problem, problem[2] + sign * step, rate).item() for sign in (1, -1))
            assert gradients[0].flatten()[index].item() == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9)
        up, down = (self.loss(problem, problem[2], rate.detach() + sign * h).item() for sign in (1, -1))
        assert gradients[1].item() == pytest.approx((up - down) / (2 * h), rel=1e-6)
        assert gradients[0].abs().max() > 1e-3 < gradients[1].abs()

    def test_the_gradient_by_soft_labels_is_that_of_finite_differences(self, problem):
        """W against central differences in the logits of six soft labels."""
        theta_0, mu_x, images, _ = problem
        logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        rate = torch.tensor(0.1, dtype=torch.float64)

        def loss(z):
            return self.loss((theta_0, mu_x, images, z.softmax(1)), images, rate)

        leaf, h = logits.clone().requires_grad_(), 1e-5
        gradient = torch.autograd.grad(loss(leaf), leaf)[0].flatten()
        assert gradient.abs().max() > 1e-3
        for index in range(logits.numel()):
            step = torch.zeros(24, dtype=torch.float64).index_fill(0, torch.tensor(index), h).view(6, 4)
            up, down = (loss(logits + sign * step).item() for sign in (1, -1))
            assert gradient[index].item() == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9)

    def test_the_distance_is_one_where_nothing_was_learned(self, problem):
        """|theta_0 - mu_x|^2 / |theta_0 - mu_x|^2 = 1, and 0 at the target; 1/4 half way."""
        theta_0, mu_x, _, _ = problem
        half = {name: (theta_0[name] + mu_x[name]) / 2 for name in mu_x}
        values = [wasserstein(at, mu_x, theta_0).item() for at in (theta_0, mu_x, half)]
        assert values == [1.0, 0.0, pytest.approx(0.25)]
