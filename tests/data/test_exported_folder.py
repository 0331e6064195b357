"""The folder that `fbpc export --format hf` writes: `datasets` reads it, and its card says what made it."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from support.exports import NAMES, same

from fbpc_ray.commands import main
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import without_folders
from fbpc_ray.data import coreset, coreset_formats, coreset_reader
from fbpc_ray.data.datasets import Split, denormalise, normalise
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reporting import dataset_card


@pytest.mark.parametrize("channels", [3, 1])
def test_datasets_reads_the_folder(original, colour_data, channels, tmp_path, monkeypatch):
    """The real library: exact pixels, pictures, names; and what it writes is read here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    datasets.disable_progress_bars()
    original = original._replace(
        images=original.images[:, :channels].contiguous(), mean=original.mean[:channels], std=original.std[:channels]
    )
    card = dataset_card.card(original, "hf", Config(), {"method": "fbpc", "data": "cifar10"}, None)
    out = tmp_path / "set"
    coreset_formats.write(coreset_formats.files(original, "hf", {}, card), out)
    dataset = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset, datasets.Dataset)
    assert dataset.features["label"].names == list(NAMES)
    assert dataset.features["pixels"] == datasets.Array3D((channels, 5, 4), "float32")
    tensors = dataset.with_format("torch")[:]
    assert torch.equal(tensors["pixels"], original.images)
    assert torch.equal(tensors["label"], original.labels)
    picture = np.array(dataset[4]["image"]).reshape(5, 4, channels).transpose(2, 0, 1)
    assert np.array_equal(picture, denormalise(original.images, original.mean, original.std)[4].numpy())

    dataset.to_parquet(tmp_path / "theirs.parquet")
    facts = {"mean": original.mean, "std": original.std, "classes": NAMES}
    (tmp_path / coreset_formats.SIDECAR).write_text(json.dumps(facts))
    train = Split(colour_data.train.images[:, :channels].copy(), colour_data.train.labels)
    fitting = colour_data._replace(train=train)
    assert same(coreset_reader.load(tmp_path / "theirs.parquet", fitting).coreset, original)
    dataset.select_columns(["image", "label"]).to_parquet(tmp_path / "theirs.parquet")
    (tmp_path / coreset_formats.SIDECAR).unlink()
    fitting = fitting._replace(mean=colour_data.mean[:channels], std=colour_data.std[:channels])
    pixels = denormalise(original.images, original.mean, original.std)
    again = coreset_reader.load(tmp_path / "theirs.parquet", fitting).coreset
    assert torch.equal(again.images, normalise(pixels, fitting.mean, fitting.std))
    with pytest.raises(UserError, match="other classes"):
        coreset_reader.load(tmp_path / "theirs.parquet", fitting._replace(classes=("x", "y", "z")))


def test_the_card_says_what_made_it_and_names_no_folder_of_this_machine(exported_run, tmp_path):
    out = tmp_path / "set"
    main.main(["export", str(exported_run), "--format", "hf", "--out", str(out)])
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == "cc-by-4.0"
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    outcome = coreset.load(RunDirectory(exported_run).coreset_path)
    result = json.loads(RunDirectory(exported_run).result_path.read_text())
    for word in (str(list(outcome.mean)), str(list(outcome.std)), "`fbpc`, step 2", result["commit"], '"gamma": 0.5',
                 f"torch {result['versions']['torch']}", "UCI", "convnet-bn"):  # fmt: skip
        assert word in text
    settings = read_config(exported_run).updated(data=f"folder:{tmp_path}/cats")
    facts = {"data": without_folders(settings.data.data)}
    other_card = dataset_card.card(outcome, "pt", settings, facts, result)
    assert "folder:cats" in other_card
    for card in (text, other_card):
        assert str(tmp_path) not in card and str(exported_run) not in card and settings.experts.experts not in card


@pytest.mark.parametrize(
    ("data", "licence", "words"),
    [
        ("digits", {"license": "cc-by-4.0"}, "CC BY 4.0"),
        ("cifar10", {"license": "unknown"}, "states no licence"),
        ("cifar100", {"license": "unknown"}, "states no licence"),
        (
            "tiny-imagenet",
            {"license": "other", "license_name": "imagenet", "license_link": "https://www.image-net.org/download.php"},
            "non-commercial research",
        ),
        ("folder:cats", {"license": "unknown"}, "derived from images whose licence the run did not record"),
    ],
)
def test_the_card_says_whose_images_these_are_and_under_which_licence(exported_run, data, licence, words):
    card = dataset_card.card(
        coreset.load(RunDirectory(exported_run).coreset_path), "hf", read_config(exported_run), {"data": data}, None
    )
    head = yaml.safe_load(card.split("---\n", 2)[1])
    assert {name: value for name, value in head.items() if name.startswith("license")} == licence
    assert words in card.split("## Licence of the source")[1]


def test_the_card_has_the_command_that_scores_the_same_splits(exported_run):
    settings = read_config(exported_run).updated(test=0.25, data_seed=3)
    images = coreset.load(RunDirectory(exported_run).coreset_path)
    card = dataset_card.card(images, "hf", settings, {"data": "folder:my cats"}, None)
    command = "fbpc evaluate --coreset PATH --data 'folder:my cats' --test 0.25 --data-seed 3"
    assert f"```sh\n{command}\n```" in card


def test_names_in_the_card_are_text(exported_run):
    """Classes, data and facts of somebody else's run: no markup, no line of their own."""
    hostile = "<script>alert(1)</script>\n# heading ```` [a](b)"
    saved = coreset.load(RunDirectory(exported_run).coreset_path)
    saved = saved._replace(classes=(hostile, *saved.classes[1:]))
    facts = {"data": f"folder:{hostile}", "method": hostile, "step": hostile, "commit": hostile}
    result = RunDirectory(exported_run).read_result()
    assert result is not None
    result |= {"device": hostile, "split": hostile, "versions": {hostile: hostile}}
    text = dataset_card.card(saved, "pt", read_config(exported_run).updated(data=f"folder:{hostile}"), facts, result)
    blocks = text.split("```")
    assert len(blocks) % 2 == 1
    for line in "".join(blocks[::2]).splitlines():
        assert "<script>" not in re.sub("`[^`]*`", "", line)
        assert not line.startswith("# heading")
