"""Split R-hat and effective sample size against arviz's numbers, and what they say of chains."""

import math

import numpy as np
import pytest

from fbpc_ray.evaluation import diagnostics
from fbpc_ray.evaluation.diagnostics import Mixing, effective_sample_size, mixing, split_rhat


def draws(chains: int, count: int, shift: float, drift: float, summed: bool = False) -> np.ndarray:
    t = np.arange(count)
    x = [np.sin(1.7 * t * (k + 1) + k) + np.cos(2.9 * t + k * k) + shift * k + drift * t for k in range(chains)]
    return np.cumsum(x, 1) if summed else np.stack(x)


@pytest.mark.parametrize(
    ("arguments", "rhat", "ess"),
    [
        ((3, 10, 0, 0), 0.9084221005618854, 44.31363764158987),
        ((3, 10, 1, 0), 1.0958685105944947, 29.416583264422556),
        ((3, 10, 1, 0, True), 3.152349007212333, 8.033166864434582),
        ((1, 10, 0, 0.5), None, 3.481565103197701),
        ((4, 40, 0.1, 0), 0.9797824747446112, 352.6591972249479),
        ((4, 40, 0.1, 0, True), 2.059940039561436, 6.487320351742521),
        ((2, 9, 0, 0), 0.8676561364882968, 19.265919722494797),
    ],
)
def test_the_numbers_are_arviz_s(arguments, rhat, ess):
    """Of arviz 0.21: rhat(method="split"), which it does not give for one chain, and ess(method="mean")."""
    x = draws(*arguments)
    assert effective_sample_size(x) == pytest.approx(ess, rel=1e-9)
    if rhat is not None:
        assert split_rhat(x) == pytest.approx(rhat, rel=1e-9)


def test_rhat_is_its_formula_and_of_what_does_not_vary():
    """Halves (0, 1) and (2, 3): within 1/2, between 2, so sqrt(1/2 + 4)."""
    assert split_rhat(np.array([[0.0, 1.0, 2.0, 3.0]])) == pytest.approx(math.sqrt(4.5))
    assert split_rhat(np.zeros((2, 6))) == 1.0
    assert split_rhat(np.array([[0.0] * 4, [1.0] * 4])) == math.inf
    assert effective_sample_size(np.zeros((2, 6))) == 12


def test_chains_of_one_distribution_have_mixed_and_chains_apart_or_adrift_have_not():
    noise = np.random.default_rng(0).normal(size=(3, 10, 101))
    alike = mixing("random", "lenet", list(noise))
    apart = mixing("fbpc", "convnet-in", [chain + 5 * k for k, chain in enumerate(noise)])
    drifting = mixing("fbpc", "convnet-in", [noise[0] + np.arange(10)[:, None]])
    assert alike and apart and drifting
    assert alike.mixed
    assert not apart.mixed and not drifting.mixed
    assert apart.samples == 30 and apart.ess_nll < 10
    assert mixing("fbpc", "convnet-in", [noise[0, :3]]) is None
    line = diagnostics.describe([alike, apart])
    rhat = f"{apart.rhat_nll:.2f}"
    assert line.startswith(f"note: chains have not mixed: R-hat {rhat} of fbpc on convnet-in (up to 1.2 is good); ")
    assert apart.rhat_nll > apart.rhat_images and "random" not in line
    assert diagnostics.describe([alike]) == ""
    nearly = diagnostics.describe([alike._replace(rhat_images=1.23)])
    assert "R-hat 1.23 of random on lenet (up to 1.2 is good)" in nearly


def test_traces_are_the_mean_and_images_over_the_whole_split():
    losses = np.arange(2 * 301, dtype=float).reshape(2, 301)
    traces = diagnostics.traces_of(losses)
    assert traces.shape == (2, 101)
    assert traces[:, 0].tolist() == losses.mean(1).tolist()
    assert traces[0, [1, -1]].tolist() == [0, 300]
    assert diagnostics.traces_of(losses[:, :7]).shape == (2, 8)


def test_those_of_images_are_medians():
    """Of three images, two alike and one adrift: those of the two. The mean NLL has its own."""
    x = draws(3, 10, 1, 0)
    adrift = x + 100 * np.arange(10)
    one = mixing("random", "lenet", [np.stack(columns, 1) for columns in zip(adrift, x, adrift, x, strict=True)])
    assert one is not None and one.samples == 30
    assert one[3:] == pytest.approx(
        (split_rhat(adrift), effective_sample_size(adrift), 1.0958685105944947, 29.416583264422556)  # arviz's, above
    )


def test_json_and_back_is_the_same():
    values = [
        Mixing("fbpc", "lenet", 30, 1.5, 10.0, math.inf, 30.0),
        Mixing("random", "lenet", 30, 1.0, 30.0, 1.1, 9.0),
    ]
    assert diagnostics.from_json(diagnostics.to_json(values)) == values
    assert diagnostics.metrics(values, "val")["val/ess_nll/fbpc/lenet"] == 10.0
    assert "val/rhat_images/fbpc/lenet" not in diagnostics.metrics(values, "val")
