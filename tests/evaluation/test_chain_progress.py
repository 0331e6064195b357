"""The bar of an evaluation: how far a chain is, of sampling and of predictions."""

from dataclasses import replace

import pytest
from support.chains import SETTINGS, arrays, brief_context, context_of, open_display

from fbpc_ray.evaluation.chains import Chain, run_chain
from fbpc_ray.evaluation.last_layer import run_networks
from fbpc_ray.models.functional import specify


@pytest.fixture
def display(monkeypatch):
    return open_display(monkeypatch)


@pytest.mark.parametrize("num_ood", [0, 180])
def test_predictions_are_part_of_a_chain(digits, two_per_class, display, num_ood):
    """20 images 30 times forwards and backwards, then each of 3 samples on 360 test images and those of `ood`."""
    ood = digits.test._replace(images=digits.test.images[:num_ood], labels=digits.test.labels[:num_ood])
    context = context_of(digits, "test", SETTINGS, *arrays(two_per_class), ood=ood if num_ood else None)
    run_chain(context, Chain("x", specify("convnet-in", digits.image_shape, 10, 8, 0), 0), "cpu")
    sampling = 3 * 30 * 20
    whole = sampling + 3 * (360 + num_ood)
    assert display.shares == pytest.approx([sampling / whole * part / 3 for part in (1, 2, 3)])


@pytest.mark.parametrize("inference, networks", [("last-layer", 1), ("ensemble", 2)])
def test_predictions_are_part_of_trained_networks(digits, display, inference, networks):
    """10 steps of 20 images and their mirror images, in batches of 8; then 360 test images."""
    context = brief_context(digits, inference)
    context = context._replace(settings=replace(context.settings, chain_full_batch=10, chain_batch_size=8))
    run_networks(context, Chain("x", specify("convnet-in", digits.image_shape, 10, 8, 0), 0), "cpu")
    assert len(display.shares) == 10 * networks
    assert display.shares[-1] == pytest.approx(3 * 10 * 8 / (3 * 10 * 8 + 360))
    assert display.shares[0] == pytest.approx(display.shares[-1] / (10 * networks))
