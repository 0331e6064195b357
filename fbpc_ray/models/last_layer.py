"""Network as features and a linear last layer: closed-form posterior, training by squared loss.

BatchNorm: while distilling, the features of u use the statistics of u, those of real images the statistics of their
batch; in evaluation both use the statistics of u (`Network.statistics`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fbpc_ray.core.types import Batch, Params
from fbpc_ray.inference import last_layer
from fbpc_ray.inference.adam import AdamState, adam_step
from fbpc_ray.inference.last_layer import LastLayer
from fbpc_ray.inference.vectors import flatten, unflatten
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import PARTS, Passes


class Targets(NamedTuple):
    """Images and regression targets."""

    images: Tensor
    """(n, c, h, w) float32, normalised."""
    targets: Tensor
    """(n, d) float32."""

    def with_mirror_images(self) -> "Targets":
        """Return twice as many: the images, then each mirrored left and right, with the same targets."""
        return Targets(torch.cat([self.images, self.images.flip(3)]), torch.cat([self.targets, self.targets]))


def scaled(features: Tensor) -> Tensor:
    """Divide features (n, h) by sqrt h: the kernel phi . phi' is then of order 1 for a network of any width."""
    return features / math.sqrt(features.shape[1])


def scaled_features(network: Network, params: Params, statistics: Params, images: Tensor) -> Tensor:
    """Return scaled features (n, h) of images (n, c, h, w), each image on its own, in parts of `PARTS`."""
    parts = images.split(PARTS[network.device.type])
    return scaled(torch.cat([network.predict_features(params, statistics, part)[0] for part in parts]))


def closed_form_logits(
    network: Network, params: Params, statistics: Params, layer: LastLayer, images: Tensor
) -> Tensor:
    """Return logits (1, n, d) of images (n, c, h, w) by the last layer's posterior on the network's features."""
    features = scaled_features(network, params, statistics, images)
    return last_layer.mean_field_logits(*last_layer.predictive(layer, features))[None]


def posterior(features: Tensor, targets: Tensor, ridge: float, precision: float, relative: bool = False) -> LastLayer:
    """Return the last layer's posterior given scaled features (n, h); `relative`: the ridge is a share of tr K / n."""
    value = last_layer.relative_ridge(features, ridge) if relative else ridge
    return last_layer.posterior(features, targets, ridge=value, precision=precision)


def train_step(passes: Passes, state: AdamState, data: Targets, learning_rate: float) -> AdamState:
    """Take one Adam step on the squared loss of the network's own outputs; `state.value` is its parameters (P,)."""
    params = unflatten(state.value, passes.network.shapes)
    _, gradients = passes.squared_loss_and_grad(params, Batch(data.images, data.targets))
    return adam_step(state, flatten({name: gradients[name] for name in params}), learning_rate)
