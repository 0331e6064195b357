"""The Python API with wrong arguments: a UserError that names the argument; numbers of numpy are numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import errors
from support.runs import BRIEF_CHAIN, silent
from torch import nn

from fbpc_ray import api
from fbpc_ray.core.errors import UserError
from fbpc_ray.data.coreset import Coreset

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
OWN = IMAGES, LABELS


@pytest.fixture(scope="module")
def coreset() -> Coreset:
    images = torch.zeros(3, 3, 8, 8)
    return Coreset(images, torch.arange(3), (0.5,) * 3, (0.25,) * 3, ("a", "b", "c"))


def refusal(function: Any, *values: Any, **options: Any) -> str:
    """The line names arguments, no flags."""
    line = errors.refusal(function, *values, **options)
    assert "--" not in line
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": "8"}, "image_size: must be of type int, got '8'"),
        ({"image_size": (8, 8)}, "image_size: must be of type int, got (8, 8)"),
        ({"image_size": 8, "resize": "pad"}, "resize: got 'pad'; known: crop, stretch"),
        ({"normalisation": None}, "normalisation: must be of type str, got None"),
        ({"seed": 1.5}, "seed: must be of type int, got 1.5"),
        ({"test": "digits"}, "test is a str"),
        ({"validation": torch.tensor(0.5)}, "validation is a Tensor"),
    ],
)
def test_arguments_of_dataset_have_types(options, message):
    assert message in refusal(api.dataset, OWN, log=silent, **options)


def test_numbers_of_numpy_are_numbers():
    options: dict[str, Any] = {"seed": np.int64(3), "image_size": np.int32(4), "log": silent}
    data = api.dataset(OWN, np.float32(0.25), np.float16(0.25), **options)
    assert (len(data.test.labels), len(data.validation.labels), data.image_shape) == (3, 3, (3, 4, 4))


def test_a_path_is_taken_as_its_text(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS)
    assert f"write its kind before it, e.g. npz:{tmp_path / 'a.npz'}" in refusal(api.dataset, tmp_path / "a.npz")


def test_a_data_set_is_not_made_again():
    data = api.dataset(OWN, log=silent)
    assert "train is a data set already" in refusal(api.dataset, data)


@pytest.mark.parametrize("value", [None, "coreset.safetensors", (IMAGES, LABELS)], ids=["none", "path", "images"])
def test_what_is_no_coreset_is_refused(value, tmp_path):
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (api.posterior, (value,)), (api.evaluate, (value, OWN)), (api.save, (value, tmp_path / "a.safetensors")),
    ]  # fmt: skip
    for function, values in calls:
        message = refusal(function, *values)
        assert message == f"not a coreset (a {type(value).__name__}): give what distill or load_coreset returns"
    assert not any(tmp_path.iterdir())


def test_other_wrong_values_are_one_line(coreset, tmp_path):
    assert refusal(api.save, coreset, tmp_path) == f"{tmp_path} is a folder: name a file in it"
    message = refusal(api.save_model, coreset, tmp_path / "model", IMAGES)
    assert message == "not posterior samples (a Coreset): give what posterior returns"
    assert "num_chains: must be 1 or more, got 0" in refusal(api.posterior, coreset, num_chains=0)
    assert "seed: must be of type int, got 'x'" in refusal(api.posterior, coreset, seed="x")
    assert "max_per_class: must be 1 or more" in refusal(coreset.plot, max_per_class=0)
    assert "preset: must be of type str, got None" in refusal(api.distill, OWN, preset=None, log=silent)
    assert "architectures: must be a name, a function" in refusal(api.distill, OWN, architectures=3, log=silent)


def test_files_and_values_of_another_kind_are_named(coreset, samples, tmp_path):
    api.save(coreset, tmp_path / "a.safetensors")
    assert "holds no posterior samples (it has no 'spec')" in refusal(api.load_posterior, tmp_path / "a.safetensors")
    assert "initial_coreset is a int: give a coreset" in refusal(api.distill, OWN, initial_coreset=3, log=silent)
    two = refusal(api.posterior, coreset, ["convnet-in", "convnet-bn"])
    assert two == "architecture: must be one network, got 2; call it for each"
    for images in (np.zeros((2, 1, 8, 8)), IMAGES, np.zeros((0, 1, 8, 8), np.uint8)):
        assert "give uint8 (n, c, h, w) = n x (1, 8, 8)" in refusal(api.save_model, samples, tmp_path / "model", images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_data_set_is_one_line():
    assert repr(api.dataset(OWN, 0.25, log=silent)) == (
        "<own: 3 classes, images of 3 x 8 x 8; train 9, validation 0, test 3>"
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "got 2 labels for 3 images"),
        ([0, 1, 4], "labels from 0 to 4, but 4 classes, numbered from 0"),
        ([-1, 1, 2], "labels from -1 to 2, but 4 classes"),
        ([0.0, 1.0, 2.0], r"labels are torch.float32 \(3,\): give the class of each image, integers \(3,\)"),
        (np.eye(4)[:3], r"labels are torch.float64 \(3, 4\)"),
        (["a", "b", "c"], "labels are a list: give the class of each image, integers"),
        (None, "labels are a NoneType"),
    ],
)
def test_labels_that_score_no_prediction_are_refused(labels, message):
    prediction = api.Prediction(torch.full((3, 4), 0.25, dtype=torch.float64), torch.ones(3), torch.zeros(3))
    with pytest.raises(UserError, match=message) as caught:
        prediction.scores(labels)
    assert "\n" not in str(caught.value)


def test_labels_of_any_integers_score_a_prediction():
    right = api.Prediction(torch.eye(4, dtype=torch.float64)[:3], torch.zeros(3), torch.zeros(3))
    for kind in (np.uint8, np.int32, np.int64):
        assert right.scores(np.arange(3).astype(kind)).accuracy == 1
    assert right.scores(torch.arange(3, dtype=torch.uint8)).accuracy == 1


def test_predictions_of_what_is_no_array_are_refused(coreset):
    samples = api.posterior(coreset, "convnet-in", width=4, chain_epochs=1, chain_every=1)
    for images in (None, [IMAGES[0]], Path("a.png")):
        assert f"images are a {type(images).__name__}: give a tensor or an array" in refusal(samples.predict, images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data, pseudocoreset: api.distill(data, step=3), "did you mean steps"),
        (lambda data, pseudocoreset: api.distill(data, out="x"), "no setting 'out'"),
        (lambda data, pseudocoreset: api.distill(data, steps=0), "^steps: must be 1 or more, got 0"),
        (lambda data, pseudocoreset: api.distill(data, lambda shape, classes: nn.Linear(2, 2)), "define it with def"),
        (lambda data, pseudocoreset: api.distill(data, nn.Linear(2, 2)), "a function of"),
        (lambda data, pseudocoreset: api.distill(data, []), "name a network"),
        (lambda data, pseudocoreset: api.posterior(pseudocoreset, "convnt"), "did you mean"),
        (lambda data, pseudocoreset: api.posterior(pseudocoreset, width=0), "^width: must be 1 or more, got 0"),
        (lambda data, pseudocoreset: api.evaluate(pseudocoreset, data, width=-1), "^width: must be 1 or more"),
        (lambda data, pseudocoreset: api.evaluate(pseudocoreset, data, split="all"), "^split all: must be test or val"),
        (lambda data, pseudocoreset: api.distill(data, width=0, preset="quick"), "^width: must be 1 or more, got 0"),
        (
            lambda data, pseudocoreset: api.posterior(pseudocoreset, preset="quick"),
            "^preset='quick': chooses the sizes",
        ),
        (lambda data, pseudocoreset: api.distill(data, time_budget="soon"), "^time_budget: must be a duration"),
        (lambda data, pseudocoreset: api.distill(data, val_every=5), "no setting 'val_every'"),
        (lambda data, pseudocoreset: api.distill(data, method="vbpc", draws_per_step=20), "^draws_per_step=20: vbpc"),
        (lambda data, pseudocoreset: api.distill(data, backend="serial", device="cuda"), "device='cuda', but"),
        (lambda data, pseudocoreset: api.posterior(pseudocoreset, steps=3), "no setting 'steps'"),
        (
            lambda data, pseudocoreset: api.posterior(pseudocoreset, chain_eta=1e6, **BRIEF_CHAIN),
            "diverged: lower chain_eta \\(now 1e\\+06\\)$",
        ),
        (
            lambda data, pseudocoreset: api.posterior(
                pseudocoreset._replace(labels=pseudocoreset.labels[:2]), **BRIEF_CHAIN
            ),
            "not a coreset",
        ),
    ],
)
def test_what_is_wrong_is_one_line(digits, pseudocoreset, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(digits, pseudocoreset)
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be_predicted_are_refused(samples, digits):
    for images, message in (
        (torch.zeros(2, 3, 8, 8), r"takes \(n, c, h, w\)"), (torch.zeros(0, 1, 8, 8), "takes"),
        (torch.randn(5, 1, 8, 8), "before any normalisation"), (torch.zeros(2, 1, 8, 8).long(), "uint8"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            samples.predict(images)
    with pytest.raises(UserError, match=r"got \d labels for"):
        samples.predict(digits.test.images[:3]).scores(torch.zeros(2).long())
