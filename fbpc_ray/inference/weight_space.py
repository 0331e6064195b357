"""Divergences between Gaussian posteriors in weight space (BPC, Eqs. 5-7).

    q_x = N(mu_x, s^2 I),  q_u = N(mu_u, s^2 I)                                                     (Eq. 6)
    fKL:  grad_u KL(pi_x | pi_u) ~= grad_u 1/S sum_s [ CE(u; mu_x + s eps_x) - CE(u; sg(mu_u) + s eps_u) ]  (Eq. 7)
    rKL:  grad_u KL(pi_u | pi_x)  = -Cov_{q_u}[ grad_u U_u(theta), U_x(theta) - U_u(theta) ]
    W:    |mu_u - mu_x|^2 / |theta_0 - mu_x|^2,  differentiated through the SGD steps that lead from theta_0 to mu_u

U_x and U_u are the potentials -log p(y | x, theta): n times the mean cross-entropy of n images. In the rKL the mean of
the gradient drops out with the normaliser of pi_u, d/du log Z_u = -E[grad_u U_u]: the centred covariance is left.
Losses are the *mean* over the m images, as in Eq. 17; so the rKL is divided by m too.

Labels may be probabilities p (m, d), which enter pi_u alone. All three hold for their gradient too: Eq. 5 and the rKL
are identities for any parameter of U_u, with grad_p in the place of grad_u; W is differentiated through its steps.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbpc_ray.core.types import Augment, Batch, Forward, Loss, Params
from fbpc_ray.inference.vectors import standard_normal, unflatten


class WeightDivergence(NamedTuple):
    """A divergence's gradient with respect to the images, and what it is made of. No graph is left."""

    gradient: Tensor
    """Of the shape of the images."""
    expected_x: float
    """Mean cross-entropy under q_x (fKL) or of the real images (rKL), nats per image."""
    expected_u: float
    """Mean cross-entropy of the pseudocoreset under q_u, nats per image."""
    by_labels: Tensor | None = None
    """(m, d), with respect to labels that are probabilities and require a gradient."""


def perturb(params: Params, scale: float, source: torch.Generator) -> Params:
    """Draw from N(params, scale^2 I), Eq. 6."""
    shapes = {name: value.shape for name, value in params.items()}
    draws = unflatten(standard_normal(shapes, next(iter(params.values())), source), shapes)
    return {name: value.detach() + scale * draws[name] for name, value in params.items()}


def forward_kl(
    forward: Forward,
    mu_x: Params,
    mu_u: Params,
    images: Tensor,
    labels: Tensor,
    views: Sequence[Augment],
    *,
    scale: float,
    source: torch.Generator,
    loss: Loss = cross_entropy,
) -> WeightDivergence:
    """Differentiate Eq. 7 by `images` (m, c, h, w), one draw for each of `views`, which both terms share.

    Only one draw's graph is alive at a time.
    """
    u = images.detach().requires_grad_()
    wanted = (u, labels) if labels.requires_grad else (u,)
    gradients, losses = [torch.zeros_like(value) for value in wanted], list[Tensor]()
    for view in views:
        view_images = view(u)
        loss_x = loss(forward(perturb(mu_x, scale, source), view_images), labels)
        loss_u = loss(forward(perturb(mu_u, scale, source), view_images), labels)
        parts = torch.autograd.grad(loss_x - loss_u, wanted)
        gradients = [total + part for total, part in zip(gradients, parts, strict=True)]
        losses.append(torch.stack([loss_x, loss_u]).detach())
    by_images, *by_labels = (total / len(views) for total in gradients)
    expected_x, expected_u = (sum(column) / len(views) for column in zip(*torch.stack(losses).tolist(), strict=True))
    return WeightDivergence(by_images, expected_x, expected_u, *by_labels)


def reverse_kl(
    forward: Forward,
    mu_u: Params,
    images: Tensor,
    labels: Tensor,
    view: Augment,
    real: Batch,
    real_count: int,
    *,
    samples: int,
    scale: float,
    source: torch.Generator,
    loss: Loss = cross_entropy,
    scaled: bool = True,
    coreset_count: int | None = None,
) -> WeightDivergence:
    """Estimate the rKL's gradient by S = `samples` draws of q_u, divided by m.

    One `view` of the images and one `real` batch (of `real_count` images) serve all draws: were they drawn anew for
    each, their own variation would enter the covariance. `images` may be a batch of a coreset of m = `coreset_count`,
    as `real` is of its data set: both potentials are counts times means. Unbiased (1 / (S - 1)). Without `scaled`, as
    in the authors' code: the gap of mean losses, without the numbers of images, and 1 / S. Raises ValueError for S < 2.
    """
    if samples < 2:
        raise ValueError("a covariance needs at least two draws (S >= 2)")
    u, m = images.detach().requires_grad_(), coreset_count or len(labels)
    view_images = view(u)
    wanted = (view_images, labels) if labels.requires_grad else (view_images,)
    mean_gap, sum_x, sum_u = 0.0, 0.0, 0.0
    means, covariances = ([torch.zeros_like(value) for value in wanted] for _ in range(2))
    for count in range(1, samples + 1):
        theta = perturb(mu_u, scale, source)
        with torch.no_grad():
            loss_x = loss(forward(theta, real.images), real.labels).item()
        leaves = [value.detach().requires_grad_() for value in wanted]
        loss_u = loss(forward(theta, leaves[0]), leaves[1] if len(leaves) > 1 else labels)
        gradients = torch.autograd.grad(loss_u, leaves)  # of U_u / m
        gap = (real_count if scaled else 1) * loss_x - (m if scaled else 1) * loss_u.item()
        # Welford's recurrence: the gap's mean is orders of magnitude above its spread.
        deviation = gap - mean_gap
        mean_gap += deviation / count
        means = [mean + (part - mean) / count for mean, part in zip(means, gradients, strict=True)]
        covariances = [
            total + deviation * (part - mean)
            for total, part, mean in zip(covariances, gradients, means, strict=True)
        ]  # fmt: skip
        sum_x, sum_u = sum_x + loss_x, sum_u + loss_u.item()
    by_view, *by_labels = (-total / (samples - 1 if scaled else samples) for total in covariances)
    (value,) = torch.autograd.grad(view_images, u, by_view)
    return WeightDivergence(value, sum_x / samples, sum_u / samples, *by_labels)


def unrolled_sgd(forward: Forward, params: Params, batches: Iterable[Batch], learning_rate: Tensor) -> Params:
    """Return mu_u after one plain SGD step a batch, differentiable by the batches and `learning_rate` ()."""
    params = {name: value.detach().requires_grad_() for name, value in params.items()}
    for batch in batches:
        value = cross_entropy(forward(params, batch.images), batch.labels)
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=True)
        params = {
            name: value - learning_rate * gradient
            for (name, value), gradient in zip(params.items(), gradients, strict=True)
        }
    return params


def wasserstein(mu_u: Params, mu_x: Params, theta_0: Params) -> Tensor:
    """Return |mu_u - mu_x|^2 / |theta_0 - mu_x|^2, a scalar. Gradient flows through mu_u.

    With equal covariances this is the squared 2-Wasserstein distance, in units of what SGD on the real data moved.
    """
    distance = sum((mu_u[name] - target).square().sum() for name, target in mu_x.items())
    scale = sum((theta_0[name] - target).square().sum() for name, target in mu_x.items())
    return torch.as_tensor(distance) / scale
