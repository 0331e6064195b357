"""A folder for the Hub: its card parses, `datasets` loads it, and its files say what made it."""

import json

import pytest
import torch
import yaml
from PIL import Image

from fbpc_ray.commands import main
from fbpc_ray.core.config import Config
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reporting import dataset_card


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "my-coreset"
    main.main(["export", str(finished_run), "--format", "hf", "--out", str(out)])
    return out


def test_the_files_are_those_of_the_hub(folder, finished_run):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "images.png", "config.json", "provenance.json", "scores.json", "coreset.json",
        "data/train-00000-of-00001.parquet",
    }  # fmt: skip
    facts = coreset.metadata(RunDirectory(finished_run).coreset_path)
    result = json.loads((finished_run / "result.json").read_text())
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["versions"] == result["versions"] and provenance["data"] == "digits"
    assert {name: provenance[name] for name in ("commit", "step", "fingerprint")} == {
        name: facts[name] for name in ("commit", "step", "fingerprint")
    }
    assert json.loads((folder / "scores.json").read_text())["coresets"] == result["coresets"]
    assert json.loads((folder / "config.json").read_text())["width"] == 8
    with Image.open(folder / "images.png") as picture:
        assert picture.size[0] > 300
    texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".json")]
    assert not [text for text in texts if str(finished_run.parent) in text or 'experts"' in text]


def test_the_card_is_read_by_the_hubs_library(folder):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.DatasetCard.load(folder / "README.md")
    head = card.data.to_dict()
    assert (head["license"], head["task_categories"]) == ("cc-by-4.0", ["image-classification"])
    assert head["size_categories"] == ["n<1K"] and "dataset-distillation" in head["tags"]
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    text = card.text
    assert text.index("![") < text.index("## Scores") < text.index("load_dataset(") < text.index("## Licence")
    assert "accuracy %" in text and "fingerprint" in text


@pytest.mark.slow
def test_the_folder_is_a_data_set(folder, finished_run, tmp_path, monkeypatch):
    """By the configuration in its card: one split, of the Parquet file alone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 10}
    saved = coreset.load(RunDirectory(finished_run).coreset_path)
    assert torch.equal(loaded["train"].with_format("torch")[:]["pixels"], saved.images)


def test_random_images_are_called_real():
    images = Coreset(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), (0.5,), (0.25,), ("a", "b"))
    text = dataset_card.card(images, "png", Config(), {"data": "folder:pets", "method": "random"}, None)
    assert "# pets, 1 image per class, drawn at random" in text and "synthetic" not in text
    assert "2 real images (1 x 4 x 4) of 2 classes, drawn at random from the training images of folder:pets." in text


def test_images_of_two_channels_have_no_picture_and_a_run_without_result_no_scores():
    outcome = Coreset(torch.randn(4, 2, 3, 3), torch.arange(4), (0.5, 0.5), (0.2, 0.2), ("a", "b", "c", "d"))
    facts = {"data": "folder:cats"}
    assert set(dataset_card.companions(outcome, Config(), facts, None)) == {"config.json", "provenance.json"}
    card = dataset_card.card(outcome, "hf", Config(), facts, None)
    assert "![" not in card and "## Scores" not in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown"


@pytest.mark.parametrize(
    ("images", "category"),
    [(10, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10_000, "10K<n<100K"), (100_000, "100K<n<1M")],
)
def test_sizes_are_the_hubs_categories(images, category):
    assert dataset_card._size(images) == category
