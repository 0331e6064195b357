"""Uncertainty of predictions, and how well it separates out-of-distribution images (AUROC).

H  = entropy of p(y | x) = 1/S sum_s p_s(y | x)             total uncertainty, nats
E  = 1/S sum_s entropy of p_s(y | x)                        what every sample says by itself
MI = H - E = 1/S sum_s KL(p_s || p)                         what the samples disagree about, 0 or more

AUROC = P(OOD score > in-distribution score) + P(equal) / 2   (Mann-Whitney's U, exact with ties)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Uncertainty(NamedTuple):
    """Of n images, in float64 nats. Merge with `+`, which puts the images of one after those of the other."""

    entropy: Tensor
    """(n,) H."""
    mutual_information: Tensor
    """(n,) MI."""

    def __add__(self, other: "Uncertainty") -> "Uncertainty":  # type: ignore[override]
        return Uncertainty._make(torch.cat(pair) for pair in zip(self, other, strict=True))


def uncertainty_of(log_probs: Tensor, mean: Tensor) -> Uncertainty:
    """Return the uncertainty of images from log p_s(y | x) (S, b, d) of each sample and log p(y | x) (b, d)."""
    entropy = torch.special.entr(mean.exp()).sum(-1)
    # As a divergence rather than H - E: where the samples agree it is 0 to the last bits of its own terms.
    divergence = (log_probs.exp() * (log_probs - mean)).sum(-1).mean(0)
    return Uncertainty(entropy.cpu(), divergence.clamp(min=0).cpu())


def auroc(in_distribution: Any, out_of_distribution: Any) -> float:
    """Return the AUROC of scores (n,) and (k,): 1 if all out-of-distribution ones are higher, 1/2 by chance.

    Args:
        in_distribution: numbers, as a tensor, an array or a list.
        out_of_distribution: as `in_distribution`.

    Raises ValueError where either is empty, is not (n,), or has NaN.
    """
    inside = _scores("in_distribution", in_distribution)
    outside = _scores("out_of_distribution", out_of_distribution)
    if not len(inside) or not len(outside):
        raise ValueError(f"got {len(inside)} and {len(outside)} scores: both must be above 0")
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside)
    not_above = torch.searchsorted(ordered, outside, right=True)
    return float((below + not_above).sum()) / (2 * len(inside) * len(outside))


def _scores(name: str, values: Any) -> Tensor:
    """Return `values` as a tensor (n,) in float64 on the CPU. Raises ValueError for another shape, and for NaN."""
    scores = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if scores.ndim != 1:
        raise ValueError(f"{name}: must be scores (n,), got the shape {tuple(scores.shape)}")
    if count := int(scores.isnan().sum()):
        raise ValueError(f"{name}: {count} of {len(scores)} scores are NaN; leave those images out")
    return scores
