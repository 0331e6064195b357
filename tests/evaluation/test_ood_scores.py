"""Images of another data set: the scores of a chain on them, and which images are refused."""

import math
import time

import numpy as np
import pytest
import torch
from support.chains import SETTINGS, Pair, arrays, context_of
from support.errors import refusal
from support.image_files import pixels, write_images

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data.datasets import Split, load, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.data.ood import ood_split
from fbpc_ray.evaluation.chains import (
    Chain,
    ChainResult,
    Predictor,
    chain_result,
    posterior_samples,
    quantities,
    run_chain,
    values,
)
from fbpc_ray.evaluation.evaluate import collect
from fbpc_ray.evaluation.scoring import average_of, score
from fbpc_ray.execution.session import load_ood
from fbpc_ray.inference.metrics import Scores, batch_nll, predictive_stats
from fbpc_ray.inference.uncertainty import Uncertainty, auroc
from fbpc_ray.models.functional import specify
from fbpc_ray.models.passes import Passes


def noise(digits, shape=(1, 8, 8), count=70):
    """A data set whose test images are noise; of the form of digits, unless `shape` is another."""
    images = torch.randint(256, (count, *shape), generator=generator(4), dtype=torch.uint8).numpy()
    return digits._replace(name="noise", test=Split(images, np.arange(count)))


def test_values_of_a_chain_with_ood_images(network, two_per_class: Pair, digits):
    """By hand from the samples: the lineage's NLL in the order of the split, and how entropy and mutual information
    rank noise above digits. The scores are those without those images."""
    outside_split = ood_split(digits, noise(digits))
    context = context_of(digits, "test", SETTINGS, *arrays(two_per_class), outside_split)
    chain = Chain("x", network.spec, 0)
    outcome = values(run_chain(context, chain, "cpu"))
    assert tuple(outcome) == quantities(context)

    samples = posterior_samples(Passes(network), *two_per_class, SETTINGS, "dsa", 0)
    predictions = average_of(Passes(network), samples, two_per_class[0])
    inside, outside = (
        score(predictions, DeviceDataset(*tensors(split, "cpu"), digits.mean, digits.std))
        for split in (digits.test, outside_split)
    )
    assert len(inside.uncertainty.entropy) == len(digits.test.labels)
    assert len(outside.uncertainty.entropy) == 70
    for name in Uncertainty._fields:
        expected = auroc(getattr(inside.uncertainty, name), getattr(outside.uncertainty, name))
        assert outcome[f"ood_auroc_{name}"] == expected
        assert expected != 0.5
    assert outcome["batch_nll"] == batch_nll(inside.losses, 128)
    assert outcome["mean_sample_nll"] == inside.losses.mean().item()
    assert outcome["nll"] < outcome["batch_nll"] < outcome["mean_sample_nll"]

    without = context._replace(ood=None)
    alone = values(run_chain(without, chain, "cpu"))
    assert tuple(alone) == quantities(without) == tuple(outcome)[:-2]
    assert alone == {name: outcome[name] for name in alone}


def test_ood_images_are_fitted_or_refused(digits):
    """Grey ones are repeated for networks that see three channels; other sizes are resized where that is asked for, to
    the mean of four pixels at half the size; colour where the networks see grey, and other sizes, are refused."""
    same_kind = ood_split(digits, noise(digits))
    assert np.array_equal(same_kind.images, noise(digits).test.images)
    assert same_kind.labels.tolist() == [0] * 70
    colour = digits._replace(train=Split(np.zeros((2, 3, 8, 8), np.uint8), np.arange(2)), name="colour")
    fitted = ood_split(colour, noise(digits)).images
    assert fitted.shape == (70, 3, 8, 8)
    assert fitted.flags.c_contiguous
    assert all(np.array_equal(fitted[:, c], noise(digits).test.images[:, 0]) for c in range(3))
    with pytest.raises(UserError, match=r"noise has images of 3 channels, digits of 1: choose"):
        ood_split(digits, noise(digits, (3, 8, 8)))
    with pytest.raises(UserError, match=r"noise has images of 16x16, digits of 8x8: .*--ood-resize"):
        ood_split(digits, noise(digits, (1, 16, 16)))
    flat = noise(digits, (1, 16, 16))
    flat.test.images[:] = np.arange(70)[:, None, None, None]
    halved = ood_split(digits, flat, resize=True).images
    assert halved.shape == (70, 1, 8, 8)
    assert np.array_equal(halved[:, 0, 3, 3], np.arange(70))
    stripes = noise(digits, (1, 32, 32))
    stripes.test.images[:] = np.tile([0, 255, 255, 0], 8)
    quartered = ood_split(digits, stripes, resize=True).images
    assert abs(quartered[..., 1:-1].astype(int) - 128).max() < 20, "stripes that the size can't show are grey"
    ramp = noise(digits, (1, 16, 16))
    ramp.test.images[:] = 8 * np.arange(16)
    assert ood_split(digits, ramp, resize=True).images[0, 0, 0, 1:-1].tolist() == [16 * i + 4 for i in range(1, 7)]


def test_ood_images_of_several_sizes_are_resized_as_image_size_does(digits, tmp_path):
    """Images of one size are left for `ood_split`, so that scores stay what they were; no size fits oblong networks."""
    for number, size in enumerate((8, 9, 10, 12)):
        write_images(tmp_path / "mixed" / "ab"[number % 2] / str(number), pixels(1, size=size))
        write_images(tmp_path / "same" / "ab"[number % 2] / str(number), pixels(1, number, size=12))
    colour = digits._replace(train=Split(digits.train.images.repeat(3, axis=1), digits.train.labels))
    mixed, same = f"folder:{tmp_path / 'mixed'}", f"folder:{tmp_path / 'same'}"
    lines: list[str] = []
    loaded = load_ood(Config(), mixed, colour, True, lines.append)
    assert np.array_equal(loaded.test.images, load(mixed, image_size=8).test.images)
    assert any("resized to 8x8 (short side, then centre crop)" in line for line in lines)
    assert load_ood(Config(), same, colour, True, lines.append).image_shape == (3, 12, 12)
    oblong = colour._replace(train=Split(np.zeros((2, 3, 8, 6), np.uint8), np.arange(2)))
    for data, resize, end in ((oblong, True, "resize them"), (colour, False, "or add --ood-resize")):
        assert refusal(load_ood, Config(), mixed, data, resize, lines.append).endswith(end)


def test_the_histogram_shows_the_uncertainty_of_the_first_chain():
    """Not of the last one: an evaluation of more chains keeps its picture."""

    def of(value: float) -> Uncertainty:
        return Uncertainty(torch.full((3,), value).double(), torch.zeros(3).double())

    spec = specify("convnet", (1, 8, 8), 10, 8, 0)
    stats = predictive_stats(torch.full((3, 10), 0.1).double().log(), torch.tensor([0, 1, 2]))
    results = [
        ChainResult(stats, 1.0, in_distribution=of(seed), out_of_distribution=of(seed + 0.5)) for seed in range(3)
    ]
    evaluation = collect([Chain("x", spec, seed) for seed in range(3)], results, Scores._fields)
    ((key, (inside, outside)),) = evaluation.uncertainty.items()
    assert key == ("x", "convnet-in") and (inside.entropy == 0).all() and (outside.entropy == 0.5).all()
    assert evaluation.stats[key].examples == 9


@pytest.mark.parametrize(("limit", "ends"), [(10.0, True), (1.0, False), (0.1, False)])
def test_a_chain_whose_predictions_overflow_has_diverged(digits, limit, ends):
    """By a predictor whose logits are infinite for images with a pixel above `limit`: none, the others, or all.

    The pixels of dark digits end at 0.5, those of the others are 1.8.
    """
    others = Split(np.full((20, 1, 8, 8), 255, np.uint8), np.zeros(20, np.int64))
    dark = digits._replace(test=Split(digits.test.images // 2, digits.test.labels))
    context = context_of(dark, "test", SETTINGS, np.zeros((10, 1, 8, 8), np.float32), np.arange(10), others)

    def logits(images: torch.Tensor) -> torch.Tensor:
        largest = images.amax((1, 2, 3))
        return torch.where(largest > limit, math.inf, largest)[None, :, None] * torch.linspace(0, 1, 10)

    chain = Chain("x", specify("convnet-in", (1, 8, 8), 10, 8, 0), 0)
    result = chain_result(context, chain, Predictor(logits, []), "cpu", time.perf_counter())
    assert tuple(values(result)) == (quantities(context) if ends else ())
    assert all(map(math.isfinite, values(result).values()))
