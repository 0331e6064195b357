"""Score the predictions of posterior samples: accuracy, NLL, Brier score, ECE, and uncertainty."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fbpc_ray.core.types import Params
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.evaluation.ensemble import batch_size, logits_of, statistics_of
from fbpc_ray.inference.metrics import PredictiveStats, log_mixture, log_probabilities, predictive_stats, sample_losses
from fbpc_ray.inference.uncertainty import Uncertainty, uncertainty_of
from fbpc_ray.models.passes import Passes


class Scored(NamedTuple):
    """The predictions of S samples for n images, scored."""

    stats: PredictiveStats
    losses: Tensor
    """(S, n) -log p_s(y_i | x_i) of each sample by itself, float64, in the order of the images."""
    uncertainty: Uncertainty

    @property
    def finite(self) -> bool:
        """Return whether all predictions are numbers: finite parameters may overflow in a pass."""
        return all(bool(values.isfinite().all()) for values in (self.losses, *self.uncertainty))


Logits = Callable[[Tensor], Tensor]
"""Images (b, c, h, w) -> logits (S, b, d), whose mean softmax is the prediction."""


def average_of(passes: Passes, samples: list[Params], coreset: Tensor) -> Logits:
    """Return the predictions of `samples`; BatchNorm's statistics come from `coreset` (m, c, h, w)."""
    network = passes.network
    statistics = statistics_of(network, samples, coreset)

    def logits(images: Tensor) -> Tensor:
        whole = len(images) == batch_size(images.shape)  # a last, smaller batch is not worth compiling for
        return logits_of(passes.predict if whole else network.predict, samples, statistics, images)

    return logits


def score(predictions: Logits, test: DeviceDataset) -> Scored:
    """Score `predictions` for `test`: the one place where scores are computed."""
    parts: list[Scored] = []
    for index in torch.arange(len(test)).split(batch_size(test.images.shape)):
        batch = test.batch(index)
        log_probs = log_probabilities(predictions(batch.images))
        mean = log_mixture(log_probs)
        stats = predictive_stats(mean, batch.labels)
        parts.append(Scored(stats, sample_losses(log_probs, batch.labels), uncertainty_of(log_probs, mean)))
    stats, unsure = parts[0].stats, parts[0].uncertainty
    for part in parts[1:]:
        stats, unsure = stats + part.stats, unsure + part.uncertainty
    return Scored(stats, torch.cat([part.losses for part in parts], 1), unsure)
