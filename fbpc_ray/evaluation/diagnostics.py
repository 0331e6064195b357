"""Have the chains mixed? Split R-hat and effective sample size of what posterior samples predict.

The traces of a chain are the mean NLL of each of its samples and, for up to `IMAGES` images, -log p_s(y_i | x_i). R-hat
compares the variance between halves of chains with that within them: 1 where all halves agree. Both are those of
Vehtari et al. 2021 without rank normalisation: R-hat of chains cut in half, ESS by Geyer's monotone sequence.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

IMAGES = 100
"""Images whose losses are traced, evenly spaced over the split."""
MIXED = 1.2
"""R-hat above which chains have not mixed. With the usual 10 samples per chain, independent samples stay below it."""
NOT_MIXED = "note: chains have not mixed"
"""Start of the line that `describe` returns."""


class Mixing(NamedTuple):
    """How well the chains of one coreset and architecture have mixed."""

    coreset: str
    architecture: str
    samples: int
    """Posterior samples of all chains together."""
    rhat_nll: float
    """Split R-hat of the mean NLL of a sample."""
    ess_nll: float
    """Effective number of `samples` for it."""
    rhat_images: float
    """The same of the losses of single images: the median over images."""
    ess_images: float

    @property
    def mixed(self) -> bool:
        return max(self.rhat_nll, self.rhat_images) <= MIXED


QUANTITIES = ("samples", "rhat_nll", "ess_nll", "rhat_images", "ess_images")


def traces_of(losses: np.ndarray) -> np.ndarray:
    """Return the traces (S, 1 + k) of a chain from the losses (S, n) of its samples: the mean, then k images."""
    n = losses.shape[1]
    chosen = np.linspace(0, n - 1, min(n, IMAGES)).round().astype(int)
    return np.concatenate([losses.mean(1, keepdims=True), losses[:, chosen]], 1)


def mixing(coreset: str, architecture: str, traces: Sequence[np.ndarray]) -> Mixing | None:
    """Return the diagnostics of chains with the traces (S, 1 + k); None for fewer than 4 samples per chain."""
    if not traces or len(traces[0]) < 4:
        return None
    columns = np.stack(traces, 1).T  # (1 + k, chains, S)
    pairs = [(split_rhat(draws), effective_sample_size(draws)) for draws in columns]
    rhats, sizes = zip(*pairs[1:], strict=True)
    count = columns[0].size
    return Mixing(coreset, architecture, count, *pairs[0], statistics.median(rhats), statistics.median(sizes))


def halves(draws: np.ndarray) -> np.ndarray:
    """Cut chains (C, S) in half: (2 C, S // 2); the middle draw of an odd number is left out."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]])


def split_rhat(draws: np.ndarray) -> float:
    """Return split R-hat of chains (C, S), S >= 4; 1 where nothing varies, infinity where only halves differ."""
    parts = halves(draws)
    n = parts.shape[1]
    within, between = float(parts.var(1, ddof=1).mean()), float(parts.mean(1).var(ddof=1))
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt((n - 1) / n + between / within)


def effective_sample_size(draws: np.ndarray) -> float:
    """Return how many independent draws estimate a mean as well as those of chains (C, S), S >= 4."""
    parts = halves(draws)
    n = parts.shape[1]
    centred = parts - parts.mean(1, keepdims=True)
    autocovariance = np.array([(centred[:, : n - lag] * centred[:, lag:]).sum(1).mean() / n for lag in range(n)])
    within = autocovariance[0] * n / (n - 1)
    total = within * (n - 1) / n + parts.mean(1).var(ddof=1)
    if total == 0:
        return float(parts.size)
    correlation = 1 - (within - autocovariance) / total
    correlation[0] = 1.0
    time = -1.0
    pair_before = math.inf
    lag = 0
    while lag + 1 < max(2, n - 3):  # later correlations are of too few draws
        pair = correlation[lag] + correlation[lag + 1]
        if pair < 0 and lag:
            break
        pair_before = min(pair, pair_before)
        time += 2 * pair_before
        lag += 2
    if lag < n and correlation[lag] > 0:  # the first half of the pair at which the sum ends
        time += float(correlation[lag])
    time = max(time, 1 / math.log10(parts.size))
    return float(parts.size / time)


def to_json(all_mixing: Sequence[Mixing]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Nest diagnostics as result.json holds them: {coreset: {architecture: {quantity: value}}}."""
    nested: dict[str, dict[str, dict[str, float | None]]] = {}
    for one in all_mixing:
        values = {name: getattr(one, name) for name in QUANTITIES}
        nested.setdefault(one.coreset, {})[one.architecture] = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
    return nested


def from_json(nested: Mapping[str, Any]) -> list[Mixing]:
    """Invert `to_json`; null is infinity. Raises KeyError, TypeError, ValueError or AttributeError for another form."""
    return [
        Mixing(
            str(coreset), str(architecture), int(values["samples"]),
            *(math.inf if values[name] is None else float(values[name]) for name in QUANTITIES[1:]),
        )
        for coreset, by_architecture in nested.items()
        for architecture, values in by_architecture.items()
    ]  # fmt: skip


def metrics(all_mixing: Sequence[Mixing], prefix: str) -> dict[str, float]:
    """Return the finite diagnostics as flat metrics, prefix/quantity/coreset/architecture."""
    return {
        f"{prefix}/{name}/{one.coreset}/{one.architecture}": value
        for one in all_mixing
        for name in QUANTITIES[1:]
        if math.isfinite(value := getattr(one, name))
    }


def describe(all_mixing: Sequence[Mixing]) -> str:
    """Return the line that names chains that have not mixed; empty where all have."""
    parts = [
        f"{max(one.rhat_nll, one.rhat_images):.2f} of {one.coreset} on {one.architecture}"
        for one in all_mixing
        if not one.mixed
    ]
    advice = "other seeds or longer chains (--chain-epochs) would score otherwise"
    return f"{NOT_MIXED}: R-hat {', '.join(parts)} (up to {MIXED} is good); {advice}" if parts else ""
