"""`load_coreset` reads what `fbpc evaluate --coreset` reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import errors
from support.exports import same
from support.runs import silent

from fbpc_ray import api
from fbpc_ray.commands import main
from fbpc_ray.data import coreset, coreset_formats
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import denormalise, normalise


@pytest.mark.parametrize("kind", coreset_formats.FORMATS)
def test_every_export_is_read_with_the_settings_of_its_distillation(run, pseudocoreset, digits, kind, tmp_path, capsys):
    """With its data set and without; png, also of one channel, as 8 bits."""
    main.main(["export", str(run.folder), "--format", kind, "--out", str(tmp_path / "it")])
    capsys.readouterr()
    (path,) = tmp_path.iterdir()
    expected = pseudocoreset
    if kind == "png":
        pixels = denormalise(expected.images, expected.mean, expected.std)
        expected = expected._replace(images=normalise(pixels, expected.mean, expected.std))
    for loaded in (api.load_coreset(path), api.load_coreset(str(path), digits)):
        assert same(loaded, expected)
        assert loaded.facts == pseudocoreset.facts
    assert capsys.readouterr().out == ""


def test_a_run_is_its_coreset(run, pseudocoreset):
    loaded = api.load_coreset(run.folder)
    assert same(loaded, pseudocoreset) and loaded.facts == pseudocoreset.facts


def test_learned_labels_come_back(pseudocoreset, tmp_path):
    soft = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    learned = pseudocoreset._replace(soft_labels=soft)
    for kind in ("hf", "pt", "npz", "safetensors"):
        path = tmp_path / f"{kind}{coreset_formats.SINGLE.get(kind, '')}"
        coreset_formats.write(coreset_formats.files(learned, kind, {"method": "fbpc"}, "card"), path)
        loaded = api.load_coreset(path)
        assert loaded.soft_labels is not None and torch.equal(loaded.soft_labels, soft)
        assert loaded.facts["method"] == "fbpc"


def test_a_coreset_of_others_takes_what_it_lacks_from_its_data_set(digits, tmp_path):
    """Pixels in 0..1 and probabilities as labels, channels last; the notes name arguments."""
    unit = np.random.default_rng(0).random((10, 8, 8, 1), np.float32)
    probabilities = np.full((10, 10), 0.05, np.float32) + 0.5 * np.eye(10, dtype=np.float32)
    np.savez(tmp_path / "a.npz", images=unit, labels=probabilities)
    assert errors.refusal(api.load_coreset, tmp_path / "a.npz") == (
        f"{tmp_path / 'a.npz'} doesn't say its normalisation and its classes: give its data set (data)"
    )
    notes: list[str] = []
    loaded = api.load_coreset(tmp_path / "a.npz", digits, log=notes.append)
    (mean,), (std,) = digits.mean, digits.std
    assert torch.allclose(loaded.images, torch.from_numpy(unit.transpose(0, 3, 1, 2) - mean) / std, atol=1e-6)
    assert torch.allclose(loaded.likelihood_labels, torch.from_numpy(probabilities), atol=1e-6)
    assert (loaded.mean, loaded.std, loaded.classes, loaded.facts) == (digits.mean, digits.std, digits.classes, {})
    assert notes == ["note: soft labels taken as probabilities (each row sums to 1)",
                     "note: pixels taken as 0..1 (pixels)"]  # fmt: skip
    as_they_are = api.load_coreset(tmp_path / "a.npz", digits, pixels="normalised", log=silent)
    assert torch.equal(as_they_are.images, torch.from_numpy(unit.transpose(0, 3, 1, 2)))


def test_a_file_that_says_all_needs_no_data_set_in_any_layout(pseudocoreset, tmp_path):
    """Bytes and floats; (m, h, w), (m, c, h, w) and (m, h, w, c)."""
    facts = {"mean": np.array([0.25]), "std": np.array([0.5]), "classes": np.array(pseudocoreset.classes)}
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    expected = (torch.from_numpy(pixels[:, None]).float() / 255 - 0.25) / 0.5
    for images in (pixels, pixels[:, None], pixels[..., None], expected.numpy()):
        np.savez(tmp_path / "a.npz", images=images, labels=np.arange(10), **facts)
        loaded = api.load_coreset(tmp_path / "a.npz", log=silent)
        assert same(loaded, Coreset(expected, torch.arange(10), (0.25,), (0.5,), pseudocoreset.classes))


def test_what_cannot_be_read_is_one_line(pseudocoreset, digits, tmp_path):
    def refusal(name: str, *values, **options) -> str:
        message = errors.refusal(api.load_coreset, tmp_path / name, *values, log=silent, **options)
        assert "--" not in message
        return message

    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    save_file({"images": pseudocoreset.images, "labels": pseudocoreset.labels}, tmp_path / "bare.safetensors")
    coreset.save(pseudocoreset, tmp_path / "ours.safetensors")
    for name, reason in (
        ("none", "coreset not found; check the path"), ("empty", "no class folders"),
        ("cut.npz", "is not a coreset of plain arrays"), ("bare.safetensors", "give its data set (data)"),
    ):  # fmt: skip
        assert reason in refusal(name)
    images = np.zeros((6, 8, 8, 1), np.uint8)
    images[0] = 255
    other = api.dataset((images, np.arange(6) % 3), log=silent)
    assert "has other classes than own: give its data set with data" in refusal("ours.safetensors", other)
    assert refusal("ours.safetensors", pixels="0..1") == "pixels: got '0..1'; known: auto, normalised, unit"


def test_a_run_without_a_coreset_is_named(tmp_path):
    """Before its first checkpoint, and after."""
    (tmp_path / "config.json").write_text(json.dumps({"method": "fbpc"}))
    missing = f"{tmp_path / 'coreset' / 'coreset.safetensors'}: coreset not found; if the run has not ended, resume it"
    assert errors.refusal(api.load_coreset, tmp_path) == missing
    for name in ("checkpoint/state.safetensors", "coreset/over-time.safetensors", "metrics.parquet"):
        Path(tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert errors.refusal(api.load_coreset, tmp_path) == missing
