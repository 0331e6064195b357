"""Scores of a `Prediction`, which holds probabilities, against those of `fbpc evaluate`, which holds their logs."""

import math

import pytest
import torch

from fbpc_ray.core.rng import generator
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.evaluation.ensemble import Ensemble
from fbpc_ray.evaluation.scoring import average_of, score
from fbpc_ray.inference.metrics import scores
from fbpc_ray.models.functional import Network, specify
from fbpc_ray.models.passes import Passes


@pytest.mark.parametrize("scale, is_exact", [(300.0, True), (3000.0, False)])
def test_scores_of_a_prediction_are_those_of_an_evaluation_and_finite(scale, is_exact):
    """Two samples whose last layer is `scale` times as large: wrong labels have p below 1e-100, and below 1e-308."""
    network = Network(specify("convnet-in", (1, 8, 8), 10, 8, 0))
    samples = [network.init(generator(seed)) for seed in range(2)]
    *_, bias = samples[0]
    layer = bias.removesuffix("bias")
    samples = [{name: value * (scale if layer in name else 1) for name, value in one.items()} for one in samples]
    images = torch.randint(256, (20, 1, 8, 8), generator=generator(3), dtype=torch.uint8)
    normalisation, coreset = ((0.5,), (0.2,)), torch.zeros(10, 1, 8, 8)
    ensemble = Ensemble(network.spec, samples, [{}, {}], *normalisation, tuple("0123456789"))
    prediction = ensemble.predict(images)
    labels = prediction.probabilities.argmin(-1)  # none is right
    test = DeviceDataset(images, labels, *normalisation)
    expected = scores(score(average_of(Passes(network), samples, coreset), test).stats)
    result = prediction.scores(labels)
    least = prediction.probabilities.min()
    if is_exact:
        assert 0 < least < 1e-100
        assert result == pytest.approx(expected, rel=1e-12)
    else:
        assert least == 0 and math.isfinite(expected.nll)
        assert result.nll == pytest.approx(708.396, abs=1e-3) and expected.nll > result.nll
        assert result[2:] == pytest.approx(expected[2:]) and result.accuracy == expected.accuracy == 0
