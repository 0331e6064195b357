"""Rows of Table 3 and Fig. 2b by every inference: the network's own predictions, for corrupted images and one image."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.chains import brief_context, open_display

from fbpc_ray.data.corrupted_splits import corrupted_test
from fbpc_ray.data.corruptions import CORRUPTIONS, SEVERITIES
from fbpc_ray.data.datasets import Split
from fbpc_ray.data.whitening import Whitening
from fbpc_ray.evaluation.chains import Chain, Predictor, on_device
from fbpc_ray.evaluation.last_layer import PREDICTORS
from fbpc_ray.evaluation.scoring import score
from fbpc_ray.inference.metrics import scores
from fbpc_ray.models.functional import specify
from fbpc_ray.reproduction.tasks import RowTask, SharedContext, run_row_task


@pytest.fixture(scope="module")
def few(digits):
    """20 test images of digits."""
    return digits._replace(test=Split(digits.test.images[:20], digits.test.labels[:20]))


class Case(NamedTuple):
    shared: SharedContext
    chain: Chain
    predictor: Predictor


@pytest.fixture(scope="module", params=["sghmc", "last-layer", "mse", "ensemble"])
def case(request, few):
    """Twenty real images as the coreset, judged by one inference."""
    context = brief_context(few, request.param)
    chain = Chain("x", specify("convnet-bn", few.image_shape, 10, 8, 0), 1)
    predictor = PREDICTORS[request.param](context, chain, "cpu")
    assert predictor is not None
    return Case(SharedContext(context, few), chain, predictor)


def rows_of(case: Case, kind: str, cache: Path) -> list:
    return run_row_task(case.shared, RowTask(case.chain, kind, None, cache), "cpu")


def test_logits_are_those_of_the_inference(case, tmp_path):
    """At the coreset's first image of the last class, averaged over networks; digits have no dog."""
    arrays = case.shared.context.coresets["x"]
    (first, *_) = (arrays.labels == 9).nonzero()[0]
    expected = case.predictor.logits(torch.tensor(arrays.images[first : first + 1])).double().mean(0)[0]
    rows = rows_of(case, "logits", tmp_path)
    assert [row["column"] for row in rows] == list(case.shared.dataset.classes)
    assert [row["logit"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)


def test_corrupted_accuracy_is_that_of_the_inference(case, tmp_path):
    """Averaged over severities; the degradation is relative to the test images of the same inference."""
    context, few = case.shared.context, case.shared.dataset
    rows = {row["column"]: row for row in rows_of(case, "corruptions", tmp_path)}
    assert set(rows) == {corruption.abbreviation for corruption in CORRUPTIONS.values()} | {"Avg."}

    def accuracy(split: Split) -> float:
        return scores(score(case.predictor.logits, on_device(split, context, "cpu")).stats).accuracy

    splits = [
        corrupted_test(few, "brightness", severity, source=None, seed=0, cache=tmp_path) for severity in SEVERITIES
    ]
    expected = sum(accuracy(split) for split in splits) / len(splits)
    row = rows[CORRUPTIONS["brightness"].abbreviation]
    assert row["accuracy"] == pytest.approx(expected)
    assert row["degradation"] == pytest.approx(1 - expected / accuracy(few.test))


def test_the_bar_of_a_chain_counts_its_corrupted_images(few, tmp_path, monkeypatch):
    """3 images of training for each of the coreset's, then 51 predictions of 20 test images by each sample."""
    context = brief_context(few, "sghmc")._replace(more_images=50 * 20)
    chain = Chain("x", specify("convnet-in", few.image_shape, 10, 8, 0), 1)
    display, settings, m = open_display(monkeypatch), context.settings, len(context.coresets["x"].labels)
    run_row_task(SharedContext(context, few), RowTask(chain, "corruptions", None, tmp_path), "cpu")
    samples = settings.chain_epochs // settings.chain_every
    fitting, predicting = 3 * settings.chain_epochs * m, samples * 51 * 20
    fitted = [part / samples for part in range(1, samples + 1)]
    expected = [fitting * part for part in fitted] + [fitting + predicting * part / 51 for part in range(1, 52)]
    assert display.shares == pytest.approx([value / (fitting + predicting) for value in expected])


def empty_rows(kind: str) -> list[dict[str, str]]:
    """One in each column of the kind's table, so that it counts the chain as diverged there, and has no column more."""
    columns = {"corruptions": [corruption.abbreviation for corruption in CORRUPTIONS.values()] + ["Avg."],
               "logits": [str(digit) for digit in range(10)]}  # fmt: skip
    return [{"column": column} for column in columns[kind]] if kind in columns else [{}]


@pytest.mark.parametrize("kind", ["corruptions", "logits"])
def test_a_network_that_diverged_leaves_empty_rows(case, tmp_path, kind):
    """A learning rate, or a step size, without measure."""
    settings = replace(case.shared.context.settings, net_lr=1e38, chain_eta=1e30)
    shared = case.shared._replace(context=case.shared.context._replace(settings=settings))
    assert run_row_task(shared, RowTask(case.chain, kind, None, tmp_path), "cpu") == empty_rows(kind)


@pytest.mark.parametrize("kind", ["scores", "corruptions", "logits"])
def test_predictions_that_are_not_finite_leave_empty_rows(few, tmp_path, kind):
    """Networks are finite, their last layer is not: its ridge is too small for float64."""
    context = brief_context(few, "last-layer")
    context = context._replace(settings=replace(context.settings, net_ridge=1e-20))
    chain = Chain("x", specify("convnet-bn", few.image_shape, 10, 8, 0), 1)
    assert run_row_task(SharedContext(context, few), RowTask(chain, kind, None, tmp_path), "cpu") == empty_rows(kind)


def test_clean_and_corrupted_images_are_whitened_as_the_coreset_is(few, tmp_path, monkeypatch):
    """The network of a whitened coreset never saw other images."""
    size = few.train.images[0].size
    whitening = Whitening(np.zeros(size, np.float32), 2 * np.eye(size, dtype=np.float32))
    context = brief_context(few, "sghmc")._replace(whitening=whitening)
    largest = list[float]()

    def logits(images: torch.Tensor) -> torch.Tensor:
        largest.append(images.abs().max().item())
        return torch.zeros(1, len(images), 10)

    monkeypatch.setitem(PREDICTORS, "sghmc", lambda *_: Predictor(logits, []))
    chain = Chain("x", specify("convnet-in", few.image_shape, 10, 8, 0), 0)
    run_row_task(SharedContext(context, few), RowTask(chain, "corruptions", None, tmp_path), "cpu")
    whitened = largest.copy()
    largest.clear()
    shared = SharedContext(context._replace(whitening=None), few)
    run_row_task(shared, RowTask(chain, "corruptions", None, tmp_path), "cpu")
    assert len(whitened) == 1 + len(CORRUPTIONS) * len(SEVERITIES)
    assert whitened == pytest.approx([2 * value for value in largest])
