"""Eqs. 15-16 against closed forms: the SGD trajectory, the empirical variance, and where gradient flows."""

from itertools import islice, repeat

import pytest
import torch
from support import oracles
from torch.nn.functional import cross_entropy

from fbpc_ray.core.types import Batch
from fbpc_ray.inference.posterior import empirical_variance, loss_and_grad, posterior_at, sgd_trajectory, variances


def linear(params, images):
    return images.flatten(1) @ params["w"] + params["b"]


def linear_params(seed=0, features=6, classes=3, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(features, classes, generator=source, dtype=dtype),
        "b": torch.randn(classes, generator=source, dtype=dtype),
    }


def some_batch(seed=1, count=8, classes=3, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 2, 3, generator=source, dtype=dtype)
    return Batch(images, torch.randint(classes, (count,), generator=source))


def function_posterior(forward, params, samples, images):
    """The posterior of Eqs. 15-16 at `images`, put together as `fbpc.gradient` does."""
    return posterior_at(forward, params, images, variances(forward, samples, [images.detach()])[0])


def test_trajectory_is_plain_sgd_on_the_softmax_gradient():
    """For logits x W + b the gradient of the mean cross-entropy is x^T (p - onehot) / n, written out by hand here."""
    params, batch, lr = linear_params(), some_batch(), 0.3
    expected = {name: value.clone() for name, value in params.items()}
    x, onehot = batch.images.flatten(1), torch.eye(3, dtype=torch.float64)[batch.labels]
    for sample in islice(sgd_trajectory(loss_and_grad(linear), params, repeat(batch), lr), 5):
        error = ((x @ expected["w"] + expected["b"]).softmax(1) - onehot) / len(x)
        expected = {"w": expected["w"] - lr * x.T @ error, "b": expected["b"] - lr * error.sum(0)}
        torch.testing.assert_close(sample["w"], expected["w"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sample["b"], expected["b"], rtol=1e-12, atol=1e-12)


def test_trajectory_starts_after_the_first_step_and_uses_each_batch_once():
    """Eq. 16's samples are k = 1..K: theta^(0) is not among them, and step k sees batch k."""
    params = linear_params()
    batches = [some_batch(seed) for seed in range(4)]
    samples = list(sgd_trajectory(loss_and_grad(linear), params, batches, 0.1))
    assert len(samples) == 4
    assert not torch.equal(samples[0]["w"], params["w"])
    last = next(sgd_trajectory(loss_and_grad(linear), samples[2], [batches[3]], 0.1))
    assert torch.equal(last["w"], samples[3]["w"])


def test_trajectory_leaves_its_start_alone_and_yields_values_that_stay():
    params, before = linear_params(), linear_params()
    copies = [
        (s, {n: v.clone() for n, v in s.items()})
        for s in islice(sgd_trajectory(loss_and_grad(linear), params, repeat(some_batch()), 0.5), 4)
    ]
    for sample, copy in copies:
        assert all(torch.equal(sample[name], copy[name]) and not sample[name].requires_grad for name in sample)
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_variance_divides_by_k_and_is_elementwise():
    """1/K sum g^2 - (1/K sum g)^2 of (0, 4) and of (1, 1) are 4 and 0; with 1/(K-1) the first would be 8."""
    values = [torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0, 1.0]])]
    assert torch.equal(empirical_variance(values), torch.tensor([[4.0, 0.0]]))


def test_variance_of_one_sample_is_zero_and_of_none_an_error():
    assert torch.equal(empirical_variance([torch.ones(2, 3)]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="K >= 1"):
        empirical_variance([])


def test_variance_does_not_cancel_in_float32():
    """Logits near 30 with spread 1e-3: E[g^2] - E[g]^2 as printed is mostly rounding; the float64 value is exact."""
    source = torch.Generator().manual_seed(0)
    samples = 30 + 1e-3 * torch.randn(30, 200, 10, generator=source)
    exact = samples.double().var(0, unbiased=False)
    printed = samples.square().mean(0) - samples.mean(0).square()
    assert (printed < 0).float().mean() > 0.2  # the trap is real on these numbers
    measured = empirical_variance(iter(samples))
    assert (measured >= 0).all()
    torch.testing.assert_close(measured.double(), exact, rtol=1e-2, atol=0)


def test_mean_is_at_theta_zero_and_carries_gradient_to_the_images_alone():
    params = {name: value.requires_grad_() for name, value in linear_params().items()}
    batch = some_batch()
    images = batch.images.clone().requires_grad_()
    samples = islice(sgd_trajectory(loss_and_grad(linear), params, repeat(batch), 0.5), 3)
    posterior = function_posterior(linear, params, samples, images)
    assert torch.equal(posterior.mean, linear(params, images))
    assert not posterior.variance.requires_grad
    gradient_image, gradient_w = torch.autograd.grad(posterior.mean.sum(), [images, params["w"]], allow_unused=True)
    assert gradient_w is None
    expected = params["w"].detach().sum(1).view(1, 1, 2, 3).expand_as(images)
    torch.testing.assert_close(gradient_image, expected)


def test_variance_is_of_the_logits_at_the_images_given():
    """Psi by hand: K = 3 forward passes at `images`, not at the images of the SGD batches."""
    params, batch, images = linear_params(), some_batch(1), some_batch(2).images
    samples = list(islice(sgd_trajectory(loss_and_grad(linear), params, repeat(batch), 0.5), 3))
    logits = torch.stack([linear(sample, images) for sample in samples])
    posterior = function_posterior(linear, params, iter(samples), images)
    torch.testing.assert_close(posterior.variance, (logits - logits.mean(0)).square().mean(0))


def test_isotropic_variance_is_one():
    """FBPC-isotropic: Psi = I on both sides."""
    posterior = posterior_at(linear, linear_params(), some_batch().images, None)
    assert torch.equal(posterior.variance, torch.ones(8, 3, dtype=torch.float64))


def test_lazy_samples_are_trained_although_psi_takes_no_gradient():
    """The K steps need autograd inside, even while Psi is computed under stop-gradient."""
    params, batch = linear_params(), some_batch()
    lazy = function_posterior(
        linear, params, islice(sgd_trajectory(loss_and_grad(linear), params, repeat(batch), 0.5), 4), batch.images
    )
    loss = [
        cross_entropy(linear(s, batch.images), batch.labels)
        for s in islice(sgd_trajectory(loss_and_grad(linear), params, repeat(batch), 0.5), 4)
    ]
    assert loss[-1] < loss[0]
    assert (lazy.variance > 0).all()


def test_empirical_variance_is_the_jacobian_gaussian_of_a_linear_model():
    """Eqs. 12-13: for logits linear in theta the linearised network is the network, and Eq. 16 is diag(J Sigma J^T)."""
    params, images = linear_params(), some_batch(seed=9).images
    samples = list(sgd_trajectory(loss_and_grad(linear), params, [some_batch(seed) for seed in range(6)], 0.3))
    mean, variance = oracles.jacobian_gaussian(linear, params, samples, images)
    result = function_posterior(linear, params, samples, images)
    torch.testing.assert_close(result.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.variance, variance, rtol=1e-10, atol=1e-12)
    assert variance.min() > 1e-6


def test_empirical_variance_approaches_the_jacobian_gaussian_of_a_network():
    """Eq. 16 against Eqs. 12-13 on a two-layer network: K steps of lr/2 reach half as far, so curvature matters half as
    much, and the relative difference of the two variances falls with lr, to below one per cent."""

    def forward(params, images):
        return (images.flatten(1) @ params["first"]).tanh() @ params["second"]

    source = torch.Generator().manual_seed(5)
    params = {
        name: torch.randn(shape, generator=source, dtype=torch.float64)
        for name, shape in {"first": (6, 7), "second": (7, 3)}.items()
    }
    images, batches = some_batch(seed=9).images, [some_batch(seed) for seed in range(10)]

    def difference(lr):
        samples = list(sgd_trajectory(loss_and_grad(forward), params, batches, lr))
        mean, variance = oracles.jacobian_gaussian(forward, params, samples, images)
        result = function_posterior(forward, params, samples, images)
        torch.testing.assert_close(result.mean, mean)
        return ((result.variance - variance).norm() / variance.norm()).item()

    coarse, half, fine = difference(0.05), difference(0.025), difference(0.001)
    assert 1.5 < coarse / half < 3
    assert fine < 0.01 < coarse
