"""How unsure a predictive distribution is, and how well that tells strange images from familiar ones.

H  = entropy of p(y | x) = 1/S sum_s p_s(y | x)             total uncertainty, nats
E  = 1/S sum_s entropy of p_s(y | x)                        what every sample says by itself
MI = H - E = 1/S sum_s KL(p_s || p)                         what the samples disagree about, 0 or more

AUROC = P(score of a strange image > of a familiar one) + P(equal) / 2        (Mann-Whitney's U, exact with ties)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fbpc_ray.inference.metrics import log_mixture, log_probabilities


class Uncertainty(NamedTuple):
    """Of n images, in float64 nats. Merge with `+`, which puts the images of one after those of the other."""

    entropy: Tensor
    """(n,) H."""
    mutual_information: Tensor
    """(n,) MI."""

    @property
    def expected_entropy(self) -> Tensor:
        """(n,) E."""
        return self.entropy - self.mutual_information

    def __add__(self, other: "Uncertainty") -> "Uncertainty":  # type: ignore[override]
        return Uncertainty._make(torch.cat(pair) for pair in zip(self, other, strict=True))


def uncertainty(logits: Tensor) -> Uncertainty:
    """Of images whose S posterior samples give logits (S, b, d)."""
    log_probs = log_probabilities(logits)
    return uncertainty_of(log_probs, log_mixture(log_probs))


def uncertainty_of(log_probs: Tensor, mean: Tensor) -> Uncertainty:
    """Return the uncertainty of images from log p_s(y | x) (S, b, d) of each sample and log p(y | x) (b, d)."""
    entropy = torch.special.entr(mean.exp()).sum(-1)
    # As a divergence rather than H - E: where the samples agree it is 0 to the last bits of its own terms.
    divergence = (log_probs.exp() * (log_probs - mean)).sum(-1).mean(0)
    return Uncertainty(entropy.cpu(), divergence.clamp(min=0).cpu())


def auroc(familiar: Tensor, strange: Tensor) -> float:
    """How well a score (n,) and (k,) ranks strange above familiar: 1 always, 1/2 as chance, 0 never.

    Raises ValueError where either is empty.
    """
    if not len(familiar) or not len(strange):
        raise ValueError(f"{len(familiar)} familiar and {len(strange)} strange scores: both are needed")
    ordered = familiar.sort().values
    below = torch.searchsorted(ordered, strange)
    not_above = torch.searchsorted(ordered, strange, right=True)
    return float((below + not_above).sum()) / (2 * len(familiar) * len(strange))
