"""Parquet: which files are one whole set of a split."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_files import rows, write_table
from support.parquet_data import read, refusal

from fbpc_ray.data.shards import ShardName, parse_shard

PRINTS = ("0a1b2c3d4e5f6071", "1a1b2c3d4e5f6072", "2a1b2c3d4e5f6073")


def write(folder: Path, *names: str, flip: bool = False) -> Path:
    """A file of 4 images per class for each name; other images in each."""
    for index, name in enumerate(names):
        data = rows(4, 10 * index + 1000 * len(list(folder.glob("*"))))
        write_table(folder / f"{name}.parquet", [(image, 1 - label if flip else label) for image, label in data])
    return folder


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train", ("train", None, None, None)),
        ("train-3", ("train", 3, None, None)),
        ("train_03", ("train", 3, None, None)),
        ("train-part-0", ("train", 0, None, None)),
        ("train-00003-of-00010", ("train", 3, 10, None)),
        ("train_3_of_10", ("train", 3, 10, None)),
        (f"train-00003-of-00010-{PRINTS[0]}", ("train", 3, 10, PRINTS[0])),
        (f"train-{PRINTS[0]}", ("train", None, None, PRINTS[0])),
        ("train_noisy-00000-of-00002", ("train_noisy", 0, 2, None)),
        ("train-00000-of-00001 (1)", ("train-00000-of-00001 (1)", None, None, None)),
        ("train (copy)", ("train (copy)", None, None, None)),
        ("train.bak", ("train.bak", None, None, None)),
    ],
)
def test_the_parts_of_a_shard_name(name, parts):
    assert parse_shard(name) == ShardName(*parts)


@pytest.mark.parametrize(
    "names",
    [
        ("train",), ("TRAIN-0",), ("train-00000-of-00001",), (f"train-00000-of-00001-{PRINTS[0]}",), ("training",),
        (f"train-00000-of-00002-{PRINTS[0]}", f"train-00001-of-00002-{PRINTS[1]}"), ("train-0", "train-1"),
        ("train-1-of-2", "train-2-of-2"), ("train-part-0", "train-part-1"), ("train_images",),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inner", ["", "data"])
def test_one_whole_set_is_read(tmp_path, names, inner):
    write(tmp_path / inner, *names, "test")
    data = read(tmp_path)
    assert len(data.train.labels) == 8 * len(names) and len(data.test.labels) == 8
    usual = names[0].lower() not in ("training", "train_images")
    assert usual == (not data.notes) and (usual or f"{names[0]} as the train split" in data.notes[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((f"train-00000-of-00003-{PRINTS[0]}", f"train-00001-of-00003-{PRINTS[1]}"), "holds 2 of 3 files like"),
        (("train-00000-of-00003", "train-00002-of-00003"), "holds 2 of 3 files like"),
        (("train-00000-of-00002", "train-00005-of-00002"), "holds 2 of 2 files like"),
        (
            ("train-00000-of-00002", "train-00001-of-00002", "train-00000-of-00001"),
            "several sets of files of the train",
        ),
        ((f"train-00000-of-00001-{PRINTS[0]}", f"train-00000-of-00001-{PRINTS[1]}"), "several sets of files"),
        (("train", "train-00000-of-00001"), "several sets of files"),
        (("train", "train-0"), "several sets of files"),
        (("train-0", "train-00"), "several sets of files"),
        (("train_noisy", "train_small"), "no train split"),
        (("train (1)",), "no train split"),
    ],
)
def test_what_is_no_whole_set_is_refused_with_its_files(tmp_path, names, message):
    write(tmp_path, *names, "test")
    assert message in refusal(tmp_path) and f"{names[0]}.parquet" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "train_noisy-00000-of-00002", "train_small", "train.bak", "train (copy)", "train - Copy", "Copy of train",
        "train-00000-of-00001 (1)", "training", "trainval", "test_unlabelled", "test (1)", "metadata", "train_v2",
    ],
)  # fmt: skip
def test_files_of_other_splits_and_copies_are_left_out_with_a_note(tmp_path, name):
    write(tmp_path / "plain", "train-00000-of-00001", "test-00000-of-00001")
    plain = read(tmp_path / "plain")
    write(tmp_path / "plain", name, flip=True)
    data = read(tmp_path / "plain")
    assert data.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(data.test.images, plain.test.images)
    assert len(data.notes) == 1 and f"left out {name}.parquet" in data.notes[0]


def test_hidden_files_are_left_out(tmp_path):
    write(tmp_path, "train", "test")
    (tmp_path / "._train.parquet").write_bytes(b"x")
    assert len(read(tmp_path).train.labels) == 8 and not read(tmp_path).notes


def test_a_file_beside_data_is_left_out_and_a_second_train_split_refused(tmp_path):
    write(tmp_path / "data", "train", "test")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "metadata.parquet")
    assert len(read(tmp_path).train.labels) == 8 and "left out metadata.parquet" in read(tmp_path).notes[0]
    write(tmp_path, "train")
    assert "both hold a train split" in refusal(tmp_path)


def test_folders_of_several_configurations_are_named(tmp_path):
    for name in ("default", "small"):
        write(tmp_path / name, "train", "test")
    assert "default, small" in refusal(tmp_path) and f"parquet:{tmp_path / 'default'}" in refusal(tmp_path)
    assert len(read(tmp_path / "small").train.labels) == 8


def test_splits_that_are_folders_are_refused_with_the_names_to_give(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / name, "0000")
    assert "move the files of train to" in refusal(tmp_path)


def test_one_shard_read_alone_says_so(tmp_path):
    write(tmp_path, "train-00000-of-00003")
    assert "one of 3 shards, read alone" in read(tmp_path / "train-00000-of-00003.parquet").notes[0]


def test_a_folder_of_save_to_disk_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    assert "save_to_disk" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<html>404</html>", "not a readable parquet file"),
        (b"", "not a readable parquet file"),
    ],
)
def test_files_that_are_no_parquet(tmp_path, content, message):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(content)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("at", [0.3, 0.5, 0.9])
def test_a_cut_file_is_refused(tmp_path, at):
    data = write(tmp_path, "train") / "train.parquet"
    data.write_bytes(data.read_bytes()[: int(at * data.stat().st_size)])
    assert "not a readable parquet file" in refusal(tmp_path)
