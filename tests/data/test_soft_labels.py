"""Learned labels in the formats of other programs: written and read back, and those that others made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data import coreset_formats, coreset_reader
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, Split

NAMES = ("cat", "dog", "ship")
SOFT = torch.randn(6, 3, generator=generator(0, "soft"))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    split = Split(np.zeros((9, 3, 5, 4), np.uint8), np.arange(9) % 3)
    return Dataset("mine", NAMES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), split, split, split, (), "")


@pytest.fixture(scope="module")
def soft_coreset() -> Coreset:
    images = 2 * torch.randn(6, 3, 5, 4, generator=generator(0, "images"))
    return Coreset(images, torch.arange(6) % 3, (1 / 3, 0.1, 0.2), (0.25, 0.3, 0.1), NAMES, SOFT)


@pytest.mark.parametrize("kind", ["hf", "pt", "npz", "safetensors"])
def test_soft_labels_come_back_to_the_bit(soft_coreset, dataset, kind, tmp_path):
    out = tmp_path / f"it{coreset_formats.SINGLE.get(kind, '')}"
    coreset_formats.write(coreset_formats.files(soft_coreset, kind, {"method": "vbpc"}, "card"), out)
    result = coreset_reader.load(out, dataset).coreset
    assert result.soft_labels is not None
    assert torch.equal(result.soft_labels, SOFT)
    assert torch.equal(result.labels, soft_coreset.labels)
    assert torch.equal(result.images, soft_coreset.images)


def test_png_has_classes_alone(soft_coreset, dataset, tmp_path):
    coreset_formats.write(coreset_formats.files(soft_coreset, "png", {}, "card"), tmp_path / "it")
    assert coreset_reader.load(tmp_path / "it", dataset).coreset.soft_labels is None


def test_the_datasets_library_reads_them(soft_coreset, tmp_path):
    datasets = pytest.importorskip("datasets")
    coreset_formats.write(coreset_formats.files(soft_coreset, "hf", {}, ""), tmp_path / "set")
    (tmp_path / "set" / "README.md").unlink()
    result = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert torch.equal(result.with_format("torch")["soft_label"][:], SOFT)


def write_foreign(kind: str, folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Path:
    """Float labels (m, d) under the name of labels."""
    if kind == "pt":
        torch.save((images, labels), folder / "it.pt")
    elif kind == "npz":
        np.savez(folder / "it.npz", images=images.numpy(), labels=labels.numpy())
    else:
        save_file({"images": images, "labels": labels}, folder / "it.safetensors", {"format": "pt"})
    return folder / f"it.{kind}"


@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors"])
def test_those_of_others_are_probabilities_or_logits(soft_coreset, dataset, kind, tmp_path):
    """Probabilities become logits with the same softmax; other numbers are logits, centred. Classes: the largest."""
    images, p = soft_coreset.images, SOFT.softmax(1)
    result, notes = coreset_reader.load(write_foreign(kind, tmp_path, images, p), dataset)
    assert torch.equal(result.labels, p.argmax(1))
    torch.testing.assert_close(result.likelihood_labels, p)
    assert any("probabilities" in note for note in notes)
    result, notes = coreset_reader.load(write_foreign(kind, tmp_path, images, SOFT + 5), dataset)
    assert result.soft_labels is not None
    torch.testing.assert_close(result.soft_labels, SOFT - SOFT.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert any("logits" in note for note in notes)


def test_probabilities_of_zero_give_finite_logits(soft_coreset, dataset, tmp_path):
    """Not all rows are one-hot: such labels are class numbers."""
    p = torch.eye(3)[soft_coreset.labels]
    p[0] = torch.tensor([0.5, 0.5, 0.0])
    result, _ = coreset_reader.load(write_foreign("npz", tmp_path, soft_coreset.images, p), dataset)
    assert result.soft_labels is not None
    torch.testing.assert_close(result.likelihood_labels, p, rtol=0, atol=1e-5)


def test_soft_labels_for_other_classes_are_refused(soft_coreset, dataset, tmp_path):
    with pytest.raises(UserError, match="soft labels are"):
        coreset_reader.load(write_foreign("npz", tmp_path, soft_coreset.images, torch.rand(6, 4)), dataset)


def test_the_card_names_the_column(soft_coreset):
    from fbpc_ray.core.config import Config
    from fbpc_ray.reporting.dataset_card import card

    text = card(soft_coreset, "hf", Config(), {"method": "vbpc", "data": "cifar10"}, None)
    assert "labels were learned" in text
    assert "labels were learned" not in card(
        soft_coreset._replace(soft_labels=None), "hf", Config(), {"data": "cifar10"}, None
    )
    (line,) = [line for line in text.splitlines() if line.startswith("dataset_info: ")]
    assert {"name": "soft_label", "sequence": "float32"} in json.loads(line.removeprefix("dataset_info: "))["features"]
