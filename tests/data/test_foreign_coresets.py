"""Coresets that others made are read; a bad file is one line and runs no code."""

import io
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from support import errors
from support.data_files import write_classes, write_splits
from support.exports import NAMES, same, write_export
from support.traps import Trap

from fbpc_ray.core import memory
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data import coreset_formats, coreset_reader
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import normalise


def test_a_file_of_unknown_content_and_suffix_is_refused(colour_data, tmp_path):
    for content in (b"", b"text", b"PK\x03\x04", b"{}"):
        (tmp_path / "mine").write_bytes(content)
        with pytest.raises(UserError, match="coreset"):
            coreset_reader.load(tmp_path / "mine", colour_data)


def write_foreign(kind: str, folder: Path, pixels: torch.Tensor, normal: torch.Tensor, labels: torch.Tensor) -> Path:
    """The same coreset as others write it."""
    archive, file = folder / "it.npz", folder / "it.pt"
    unit = pixels.double() / 255
    if kind == "mtt":
        torch.save(torch.nn.Parameter(normal), folder / "images_1000.pt")
        torch.save(labels.int(), folder / "labels_1000.pt")
        return folder / "images_1000.pt"
    if kind == "dc":
        torch.save({"data": [[normal + 1, labels], [normal, labels]], "accs_all_exps": {"ConvNet": [0.5]}}, file)
        return file
    if kind == "tuple":
        torch.save((normal, labels), file)
        return file
    if kind == "safetensors":
        save_file({"images": normal, "labels": labels}, folder / "it.safetensors", {"format": "pt"})
        return folder / "it.safetensors"
    if kind == "npz bytes":
        np.savez(archive, images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
        return archive
    if kind == "npz unit":
        np.savez(archive, images=unit.numpy(), labels=labels.numpy().astype(np.uint8))
        return archive
    write_export(Coreset(normal, labels, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), NAMES), "png", folder / "png")
    (folder / "png" / coreset_formats.SIDECAR).unlink()
    for at, name in zip(sorted(f for f in (folder / "png").iterdir() if f.is_dir()), ("cat", "b", "c"), strict=True):
        at.rename(at.with_name(name))
    return folder / "png"


@pytest.mark.parametrize("kind", ["mtt", "dc", "tuple", "safetensors", "npz bytes", "npz unit", "folders"])
def test_what_others_made_is_read(colour_data, kind, tmp_path):
    """Tensors taken as they are, bytes normalised as the data set is, and a line that says what was assumed."""
    colour_data = colour_data._replace(classes=("cat", "b", "c"))
    pixels = torch.randint(0, 256, (3, 3, 5, 4), generator=generator(0, "pixels")).to(torch.uint8)
    normal, labels = normalise(pixels, colour_data.mean, colour_data.std), torch.arange(3)
    outcome = coreset_reader.load(write_foreign(kind, tmp_path, pixels, normal, labels), colour_data)
    assert torch.equal(outcome.coreset.images, normal)
    assert outcome.coreset.labels.tolist() == [0, 1, 2]
    assert outcome.coreset[2:6] == (colour_data.mean, colour_data.std, ("cat", "b", "c"), None)
    assert len(outcome.notes) == (0 if kind in ("npz bytes", "folders") else 1)
    if kind == "npz unit":
        assert "0..1" in outcome.notes[0]
        normalised = coreset_reader.load(tmp_path / "it.npz", colour_data, "normalised").coreset.images
        assert torch.equal(normalised, (pixels.double() / 255).float())
    elif outcome.notes:
        assert "normalised with mean [0.5, 0.4, 0.3]" in outcome.notes[0]
        with pytest.raises(UserError, match="--pixels unit"):
            coreset_reader.load(write_foreign(kind, tmp_path, pixels, normal, labels), colour_data, "unit")


def bytes_of(write) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def pair(images: object, labels: object) -> bytes:
    return bytes_of(lambda file: torch.save((images, labels), file))


def arrays(**items: np.ndarray) -> bytes:
    return bytes_of(lambda file: np.savez(file, allow_pickle=True, **items))


GOOD, LABELS = torch.zeros(3, 3, 5, 4) - 1, torch.arange(3)

BAD = {
    "trap.pt": (lambda trap: pair(GOOD, trap), "no code in it was run"),
    "trap.npz": (lambda trap: arrays(images=np.array([trap], object), labels=LABELS.numpy()), "no code in it was run"),
    "cut.pt": (lambda trap: pair(GOOD, LABELS)[:-200], "no code in it was run"),
    "cut.npz": (lambda trap: arrays(images=GOOD.numpy(), labels=LABELS.numpy())[:-100], "no code in it was run"),
    "empty.parquet": (lambda trap: b"", "no code in it was run"),
    "text.safetensors": (lambda trap: b"hello", "no code in it was run"),
    "number.pt": (lambda trap: bytes_of(lambda file: torch.save(3, file)), "no code in it was run"),
    "alone.pt": (lambda trap: bytes_of(lambda file: torch.save(GOOD, file)), "labels_X.pt"),
    "images_1.pt": (lambda trap: bytes_of(lambda file: torch.save(GOOD, file)), "without labels: .*labels_1.pt is"),
    "flags.pt": (lambda trap: pair(GOOD, torch.zeros(3, 3, dtype=torch.bool)), "must be class numbers"),
    "soft.pt": (lambda trap: pair(GOOD, torch.zeros(3, 2)), "soft labels are"),
    "four.pt": (lambda trap: pair(GOOD, LABELS + 1), "labels from 1 to 3, but 3 classes"),
    "fewer.pt": (lambda trap: pair(GOOD, LABELS[:2]), "expected int64"),
    "nan.pt": (lambda trap: pair(GOOD / 0, LABELS), "not finite"),
    "none.pt": (lambda trap: pair(GOOD[:0], LABELS[:0]), "is not a coreset"),
    "large.pt": (lambda trap: pair(torch.zeros(3, 3, 8, 8) - 1, LABELS), "--data"),
    "meta.pt": (lambda trap: pair(torch.zeros(3, 3, 5, 4, device="meta"), LABELS), "plain tensor"),
    "sparse.pt": (lambda trap: pair(GOOD.to_sparse(), LABELS), "plain tensor"),
    "integers.pt": (lambda trap: pair(GOOD.long(), LABELS), r"outside 0\.\.255 \(int64\)"),
    "names.npz": (lambda trap: arrays(x=GOOD.numpy()), "no array images"),
    "it.txt": (lambda trap: b"hello", ".safetensors, .npz, .pt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_runs_nothing(colour_data, name, tmp_path):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=reason) as caught:
        coreset_reader.load(tmp_path / name, colour_data)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_a_bad_folder_is_one_line(original, colour_data, tmp_path):
    (tmp_path / "empty").mkdir()
    folders = write_export(original, "png", tmp_path / "png")
    damaged = write_export(original, "pt", tmp_path / "pt")
    (damaged / coreset_formats.SIDECAR).write_text('{"mean": 3}')
    nothing = write_export(original, "hf", tmp_path / "hf")
    (nothing / coreset_formats.SHARD).write_bytes(b"PAR1")
    (folders / coreset_formats.SIDECAR).unlink()
    for folder, reason in (
        (tmp_path / "missing", "coreset not found"), (tmp_path / "empty", "no class folders"),
        (folders, "is not a class of mine"), (damaged, "coreset.json is damaged"), (nothing, "is not a coreset"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason) as caught:
            coreset_reader.load(folder, colour_data)
        assert "\n" not in str(caught.value)
    other = write_export(original._replace(classes=("a", "b", "c")), "npz", tmp_path / "it.npz")
    with pytest.raises(UserError, match="other classes than mine"):
        coreset_reader.load(other, colour_data)


# ---- arrays as people save them

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)


def saved(folder: Path, **values: object) -> Path:
    np.savez(folder / "own.npz", **({"images": IMAGES, "labels": np.arange(3)} | values))  # type: ignore[arg-type]
    return folder / "own.npz"


refusal = partial(errors.refusal, coreset_reader.load)


@pytest.mark.parametrize(
    "values",
    [
        {"images": IMAGES.astype(np.int64)}, {"images": IMAGES.astype(np.uint16)}, {"labels": np.arange(3)[:, None]},
        {"labels": np.eye(3, dtype=int)}, {"labels": np.eye(3, dtype=bool)}, {"labels": np.eye(3)},
        {"classes": np.array(NAMES)},
    ],
    ids=["int64", "uint16", "a column", "one-hot", "one-hot of bool", "one-hot of floats", "names alone"],
)  # fmt: skip
def test_integers_and_one_hot_rows_of_others_are_read(colour_data, tmp_path, values):
    expected = coreset_reader.load(saved(tmp_path), colour_data).coreset
    result = coreset_reader.load(saved(tmp_path, **values), colour_data).coreset
    assert torch.equal(result.images, expected.images) and result.labels.tolist() == [0, 1, 2]
    assert result.soft_labels is None


def test_soft_labels_of_64_bits_are_read(colour_data, tmp_path):
    result = coreset_reader.load(saved(tmp_path, soft_labels=np.eye(3)), colour_data).coreset
    assert result.soft_labels is not None and torch.equal(result.soft_labels, torch.eye(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": IMAGES * 1.0}, "images are floats from 0 to 255; save uint8, or divide them by 255"),
        ({"images": IMAGES > 9}, "images is bool"),
        ({"labels": np.array(["a", "b", "c"])}, "labels are names; write class numbers"),
        ({"labels": np.arange(3) + 1}, "labels from 1 to 3, but 3 classes, numbered from 0"),
        ({"mean": [0.5] * 3}, "has one of the arrays mean and std"),
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, "are not a normalisation"),
        ({"classes": ["x", "y", "z"]}, "has other classes than mine"),
    ],
)
def test_arrays_of_others_that_make_no_coreset_are_refused_with_the_cause(colour_data, tmp_path, values, message):
    images = values.get("images")
    if images is not None and images.dtype == float:
        images.flat[:2] = 0, 255
    assert message in refusal(saved(tmp_path, **values), colour_data)


def test_images_of_three_equal_channels_are_grey_and_coloured_ones_are_not(digits, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), dtype=np.uint8).repeat(3, axis=1)
    result = coreset_reader.load(saved(tmp_path, images=grey, labels=np.arange(10)), digits).coreset
    assert result.images.shape == (10, 1, 8, 8)
    grey[4, 2, 0, 0] ^= 1
    assert "has images of (3, 8, 8)" in refusal(saved(tmp_path, images=grey, labels=np.arange(10)), digits)


def test_a_file_larger_than_the_memory_is_refused(colour_data, tmp_path, monkeypatch):
    where = saved(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: where.stat().st_size)
    coreset_reader.load(where, colour_data)
    monkeypatch.setattr(memory, "available", lambda: where.stat().st_size - 1)
    assert "does not fit into memory" in refusal(where, colour_data)


def test_of_exported_shards_those_of_the_train_split_are_read(original, colour_data, tmp_path):
    folder = write_export(original, "hf", tmp_path / "hf")
    shard = folder / coreset_formats.SHARD
    shutil.copy(shard, shard.with_name("test-00000-of-00001.parquet"))
    result = coreset_reader.load(folder, colour_data).coreset
    assert torch.equal(result.images, original.images) and torch.equal(result.labels, original.labels)


def test_all_shards_of_the_train_split_are_read(original, colour_data, tmp_path):
    """As `datasets` writes them; a shard alone is read with the coreset.json of its folder."""
    folder = write_export(original, "hf", tmp_path / "hf")
    shard = folder / coreset_formats.SHARD
    assert same(coreset_reader.load(shard, colour_data).coreset, original)
    assert coreset_reader.facts_of(shard) == {"method": "fbpc"}
    table = pq.read_table(shard)
    shard.unlink()
    for number, part in enumerate((table[:4], table[4:])):
        pq.write_table(part, shard.with_name(f"train-0000{number}-of-00002.parquet"))
    assert same(coreset_reader.load(folder, colour_data).coreset, original)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        ([[[0.5, None], [0.5, 0.5]]], "a pixel is null"),
        ([[[0.5] * 2, [0.5], [0.5] * 3]], "its images are of several sizes"),
    ],
)
def test_pixels_that_are_no_array_are_refused(colour_data, tmp_path, pixels, reason):
    pq.write_table(pa.table({"pixels": [pixels], "label": [0]}), tmp_path / "it.parquet")
    assert reason in refusal(tmp_path / "it.parquet", colour_data)


def test_a_folder_of_pictures_has_the_class_of_its_number(original, colour_data, tmp_path):
    """Of which one may be missing."""
    two = original._replace(images=original.images[[0, 2]], labels=torch.tensor([0, 2]))
    result = coreset_reader.load(write_export(two, "png", tmp_path / "png"), colour_data).coreset
    assert result.labels.tolist() == [0, 2]


def test_floats_of_255_that_are_said_to_be_normalised_are_taken_as_such(colour_data, tmp_path):
    result = coreset_reader.load(saved(tmp_path, images=IMAGES * 1.0), colour_data, "normalised").coreset
    assert torch.equal(result.images, torch.tensor(IMAGES).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": torch.zeros(3)}, "has no images and labels (it has x): rename its entries"),
        ([torch.zeros(3, 3, 5, 4)], "must hold images and labels, a pair or a dict"),
    ],
)
def test_files_of_other_tensors_are_refused_with_what_they_hold(colour_data, tmp_path, content, message):
    torch.save(content, tmp_path / "it.PT")
    assert message in refusal(tmp_path / "it.PT", colour_data)


def test_a_path_with_the_kind_of_a_data_set_is_refused_with_the_path(colour_data, tmp_path):
    path = saved(tmp_path)
    assert refusal(Path(f"npz:{path}"), colour_data) == f"npz:{path}: coreset not found; write its path alone, {path}"


def test_notes_of_a_folder_of_images_are_kept(colour_data, tmp_path):
    data = colour_data._replace(classes=("a", "b"))
    write_splits(tmp_path, size=(4, 5))
    (tmp_path / "train" / "a" / "x.heic").write_bytes(b"x")
    result = coreset_reader.load(tmp_path, data)
    assert any("left out 1 file" in note for note in result.notes)
    assert f"{tmp_path}: the test split is left out" in result.notes
    write_classes(tmp_path / "val", first=90)
    assert f"{tmp_path}: the validation and test split is left out" in coreset_reader.load(tmp_path, data).notes
