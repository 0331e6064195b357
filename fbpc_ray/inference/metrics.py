"""Scores of a predictive distribution as sums and counts: `+` merges shards, division comes last.

So neither the size, the order nor the placement of test batches can change a number.

    p(y | x) = 1/S sum_s p_s(y | x)                     (the Bayesian model average)
    NLL      = -mean_i log p(y_i | x_i), nats           (per example: the samples are mixed for each example on its own)
    Brier    = mean_i sum_c (p(c | x_i) - [c = y_i])^2
    ECE      = sum_b n_b / n |accuracy_b - confidence_b| over equal-width confidence bins

`batch_nll` is another number, kept to compare with published ones that were computed so.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15


class PredictiveStats(NamedTuple):
    """Sums over examples, in float64. Merge with `+`; read with `scores`."""

    examples: int
    correct: int
    nll: float
    brier: float
    bin_count: Tensor
    """(BINS,) examples by confidence; bin b holds (b / BINS, (b + 1) / BINS]."""
    bin_correct: Tensor
    bin_confidence: Tensor

    def __add__(self, other: "PredictiveStats") -> "PredictiveStats":  # type: ignore[override]
        return PredictiveStats._make(a + b for a, b in zip(self, other, strict=True))


class Scores(NamedTuple):
    """What `PredictiveStats` say: accuracy in [0, 1], nll in nats, ece in [0, 1], brier in [0, 2]."""

    accuracy: float
    nll: float
    ece: float
    brier: float


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log p_s(y | x) of each sample, in float64, from S samples' logits (S, b, d)."""
    return logits.double().log_softmax(-1)


def log_mixture(log_probabilities: Tensor) -> Tensor:
    """Return log p(y | x) (b, d) of the model average, from `log_probabilities` (S, b, d) of the samples."""
    return log_probabilities.logsumexp(0) - math.log(len(log_probabilities))


def sample_losses(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return -log p_s(y_i | x_i) (S, b), from `log_probabilities` (S, b, d) of the samples and labels (b,)."""
    return -log_probabilities.gather(-1, labels.expand(len(log_probabilities), -1)[..., None])[..., 0].cpu()


def batch_nll(losses: Tensor, size: int) -> float:
    """Return the NLL of BPC's code: losses (S, n) are averaged over each batch of `size` before they are mixed.

        sum_B n_B / n  -log mean_s exp(-mean_{i in B} loss_si)

    At size 1 it is the NLL; it grows with the size, up to the mean loss of a sample (log-mean-exp is convex), and it
    depends on the order of the images.
    """
    mixed = [
        batch.shape[1] * (math.log(len(losses)) - (-batch.mean(1)).logsumexp(0)) for batch in losses.split(size, dim=1)
    ]
    return float(sum(mixed)) / losses.shape[1]


def predictive_stats(log_probability: Tensor, labels: Tensor) -> PredictiveStats:
    """Sum over a batch of log predictive probabilities (b, d) and labels (b,)."""
    log_probability, labels = log_probability.double().cpu(), labels.cpu()
    probability = log_probability.exp()
    confidence, prediction = probability.max(-1)
    correct = (prediction == labels).double()
    of_label = torch.zeros_like(probability).scatter_(1, labels[:, None], 1.0)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1

    def by_bin(values: Tensor) -> Tensor:
        return torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, values)

    return PredictiveStats(
        examples=len(labels),
        correct=int(correct.sum()),
        nll=float(-log_probability.gather(1, labels[:, None]).sum()),
        brier=float((probability - of_label).square().sum()),
        bin_count=by_bin(torch.ones_like(confidence)),
        bin_correct=by_bin(correct),
        bin_confidence=by_bin(confidence),
    )


def scores(stats: PredictiveStats) -> Scores:
    """Divide the sums by the number of images. Raises ValueError for no image."""
    if stats.examples == 0:
        raise ValueError("no example was scored")
    gaps = (stats.bin_correct - stats.bin_confidence).abs().sum()
    return Scores(
        accuracy=stats.correct / stats.examples,
        nll=stats.nll / stats.examples,
        ece=float(gaps) / stats.examples,
        brier=stats.brier / stats.examples,
    )
