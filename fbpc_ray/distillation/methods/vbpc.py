"""VBPC and FRePo: one architecture's gradient, through a closed-form last layer on pool features.

    features of u and of its mirror images -> posterior of the last layer -> predictions for a batch of real images
    VBPC    mean -log p(y | x) + kl_weight / N KL(q || prior)                      N: the number of real images
    FRePo   mean |f(x) - y|^2 / 2 - mean_j min(margin of the soft label j, 1/d)

differentiated by the images u and their soft labels; only the network is held fixed. A network that has been used
before takes one training step on u first.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbpc_ray.core.config import Distillation
from fbpc_ray.core.types import Batch
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.methods.common import Clock, Gradient, GradientContext, GradientStats
from fbpc_ray.inference import last_layer
from fbpc_ray.inference.last_layer import LastLayer
from fbpc_ray.inference.vectors import unflatten
from fbpc_ray.models.last_layer import Targets, posterior, scaled, train_step

Terms = tuple[Tensor, Tensor, dict[str, float]]
"""What is differentiated, (); its term of the real images, (); other quantities to report."""


def gradient(
    context: GradientContext,
    step: int,
    images: Tensor,
    inner_lr: float,
    soft_labels: Tensor,
    start: np.ndarray | None = None,
) -> Gradient:
    """Differentiate the loss by images (m, c, h, w) and `soft_labels` (m, d). `inner_lr` is not used.

    Args:
        start: the network in the step's slot of the pool, as one vector; None for a slot that was never used.
    """
    settings, network, clock = context.settings, context.network, Clock(context.network.device)
    u, y = images.detach().requires_grad_(), soft_labels.detach().requires_grad_()
    slot = network_pool.slot(settings, step, context.draw)
    member = network_pool.load(start, lambda: network.init(context.rng(step, "prior")), slot, settings, network.device)
    if start is not None and member.uses:
        data = _regression_data(u.detach(), y.detach(), settings)
        member = member._replace(adam=train_step(context.passes, member.adam, data, settings.pool_lr))
    seconds_u = clock.lap()

    params = unflatten(member.adam.value, network.shapes)
    real = _real_batch(context, step)
    with torch.no_grad():
        real_features = scaled(context.passes.features(params, real.images))
    data = _regression_data(u, y, settings)
    features = scaled(context.passes.features(params, data.images))
    relative = settings.method == "frepo"
    layer = posterior(features, data.targets, settings.ridge, settings.prior_precision, relative=relative)
    loss, expected, others = LOSSES[settings.method](layer, real_features, real.labels, y, settings, len(context.real))
    by_images, by_labels = (value.cpu() for value in torch.autograd.grad(loss, (u, y)))
    stats = GradientStats(
        loss=loss.item(), expected_x=expected.item(), gradient_norm=by_images.norm().item(), seconds_u=seconds_u,
        seconds_gradient=clock.lap(), others={**others, "pool_uses": member.uses},
    )  # fmt: skip
    used = member._replace(uses=member.uses + 1)
    return Gradient(by_images, stats, solution=network_pool.dump(used), soft_labels=by_labels)


def _regression_data(images: Tensor, labels: Tensor, settings: Distillation) -> Targets:
    """Return u and, with `--mirror`, its mirror images, with the targets Y of the last layer's regression."""
    data = Targets(images, labels)
    return data.with_mirror_images() if settings.mirror else data


def _real_batch(context: GradientContext, step: int) -> Batch:
    """Draw the step's real images without replacement, each mirrored with probability 1/2 if u is mirrored."""
    source, size = context.rng(step, "real"), min(context.settings.real_batch_size, len(context.real))
    batch = context.real.batch(torch.randperm(len(context.real), generator=source)[:size])
    if not context.settings.mirror:
        return batch
    flipped = (torch.rand(size, generator=source) < 0.5).to(batch.images.device)
    return batch._replace(images=torch.where(flipped.view(-1, 1, 1, 1), batch.images.flip(3), batch.images))


def vbpc_loss(
    layer: LastLayer, features: Tensor, labels: Tensor, soft_labels: Tensor, settings: Distillation, count: int
) -> Terms:
    """Return the negative evidence bound of `count` real images, nats per image, by a batch of them."""
    mean, variance = last_layer.predictive(layer, features)
    expected = cross_entropy(last_layer.mean_field_logits(mean, variance), labels)
    kl = last_layer.kl_to_prior(layer)
    others = {"kl": kl.item(), "predictive_variance": variance.mean().item()}
    return expected + settings.kl_weight / count * kl, expected, others


def frepo_loss(
    layer: LastLayer, features: Tensor, labels: Tensor, soft_labels: Tensor, settings: Distillation, count: int
) -> Terms:
    """Return the squared loss of the predictive mean, less the margins of the soft labels, each at most 1/d."""
    classes = soft_labels.shape[1]
    mean, _ = last_layer.predictive(layer, features)
    expected = last_layer.squared_loss(mean, last_layer.one_hot_targets(labels, classes, settings.label_scale))
    first, second = soft_labels.topk(2, dim=1).values.unbind(1)
    margin = (first - second).clamp(max=1 / classes).mean()
    return expected - margin, expected, {"label_margin": margin.item()}


LOSSES: dict[str, Callable[[LastLayer, Tensor, Tensor, Tensor, Distillation, int], Terms]] = {
    "vbpc": vbpc_loss,
    "frepo": frepo_loss,
}
