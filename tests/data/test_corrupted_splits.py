"""Corrupted test splits: the official folder is checked, generated files are cached, and damage is noticed."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.image_files import scenes

from fbpc_ray.core.errors import UserError
from fbpc_ray.data import corrupted_splits
from fbpc_ray.data.corrupted_splits import cached_at, corrupted_test, notes, official
from fbpc_ray.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
)
from fbpc_ray.data.datasets import Dataset, Split, load, tensors

# ---- official files


def coloured(tmp_path: Path, n: int = 6) -> Dataset:
    x = scenes(20, 8, 8).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(20) % 3, x_test=x[:n], y_test=np.arange(n) % 3)
    return load(f"npz:{tmp_path / 'a.npz'}")


def folder_for(dataset: Dataset, at: Path, names: tuple[str, ...] = tuple(CORRUPTIONS)) -> Path:
    """A folder in the layout of CIFAR-10-C: images and labels (uint8) of severity 1, then of severity 2, ..."""
    at.mkdir()
    for name in names:
        made = [corrupt(dataset.test.images, name, severity, 11) for severity in SEVERITIES]
        np.save(at / f"{name}.npy", np.ascontiguousarray(np.concatenate(made).transpose(0, 2, 3, 1)))
    np.save(at / "labels.npy", np.tile(dataset.test.labels, 5).astype(np.uint8))
    return at


def test_official_files_are_mapped_and_split(tmp_path):
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "CIFAR-10-C")
    opened = official(folder, data)
    assert set(opened.arrays) == set(CORRUPTIONS)
    for name in CORRUPTIONS:
        assert isinstance(opened.arrays[name], np.memmap) and not opened.arrays[name].flags.writeable
        for severity in SEVERITIES:
            split = opened.split(name, severity)
            assert np.array_equal(split.images, corrupt(data.test.images, name, severity, 11))
            assert np.array_equal(split.labels, data.test.labels) and split.labels.dtype == np.int64
            assert split.images.flags.c_contiguous and split.images.dtype == np.uint8
            again = corrupted_test(data, name, severity, source=folder, seed=0, cache=tmp_path / "unused")
            assert np.array_equal(again.images, split.images)
    assert not (tmp_path / "unused").exists()
    for severity in (0, 6):
        with pytest.raises(UserError, match="severity must be"):
            opened.split("snow", severity)
    assert notes(folder, 0) == (f"corrupted images from {folder}",)


def test_one_official_file_is_enough_for_one_corruption(tmp_path):
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "c", ("snow",))
    assert len(corrupted_test(data, "snow", 2, source=folder, seed=0, cache=tmp_path).labels) == 6
    with pytest.raises(UserError, match=r"c lacks brightness\.npy, defocus_blur\.npy.*CIFAR-10-C\.tar"):
        official(folder, data)
    with pytest.raises(UserError, match="unknown corruption 'fog'"):
        official(folder, data, ("fog",))


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, at: Path):
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.at,)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def cut(folder: Path) -> None:
    data = (folder / "frost.npy").read_bytes()
    (folder / "frost.npy").write_bytes(data[: len(data) // 2])


def archived(folder: Path) -> None:
    with (folder / "frost.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3))


BAD_OFFICIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "frost.npy").unlink(), r"CIFAR-10-C lacks frost\.npy; name the folder"),
    "no labels": (lambda f: (f / "labels.npy").unlink(), r"lacks labels\.npy; "),
    "cut": (cut, r"frost\.npy: not a readable \.npy array"),
    "empty": (lambda f: (f / "frost.npy").write_bytes(b""), r"frost\.npy: not a readable \.npy array"),
    "text": (lambda f: (f / "frost.npy").write_text("<html>404"), r"frost\.npy: not a readable"),
    "archive": (archived, r"frost\.npy: not a readable \.npy array \(the magic string"),
    "half an archive": (lambda f: (f / "frost.npy").write_bytes(b"PK\x03\x04abc"), r"frost\.npy: not a readable"),
    "pickle": (
        lambda f: (f / "frost.npy").write_bytes(pickle.dumps(Trap(f / "sprung"))),
        r"frost\.npy: not a readable",
    ),
    "objects": (
        lambda f: np.save(f / "frost.npy", np.array([Trap(f / "sprung")], object), allow_pickle=True),
        r"frost\.npy: not a readable",
    ),
    "floats": (
        replaced("frost.npy", lambda a: a / 255),
        r"frost\.npy: expected uint8 \(30.*, got float64 \(30, ",
    ),
    "few": (
        replaced("frost.npy", lambda a: a[:24]),
        r"expected uint8 \(30, 8, 8, 3\), five severities of the 6 test images .*, got uint8 \(24, 8, 8, 3\)",
    ),
    "channels first": (replaced("frost.npy", lambda a: a.transpose(0, 3, 1, 2)), r"got uint8 \(30, 3, 8, 8\)"),
    "size": (replaced("frost.npy", lambda a: a[:, :7]), r"got uint8 \(30, 7, 8, 3\)"),
    "grey": (replaced("frost.npy", lambda a: a[..., 0]), r"got uint8 \(30, 8, 8\)"),
    "few labels": (
        replaced("labels.npy", lambda a: a[:6]),
        r"labels\.npy: expected 30 integers, five times the 6 test labels of .*, got uint8 \(6,\)",
    ),
    "float labels": (replaced("labels.npy", lambda a: a * 1.0), r"labels\.npy: .*, got float64"),
    "other labels": (
        replaced("labels.npy", lambda a: np.where(np.arange(30) == 13, 0, a)),
        r"labels\.npy, row 13: expected label 1, that of test image 1 of .*, got 0 \(1 of 30 differ\).*--data cifar10",
    ),
    "other order": (replaced("labels.npy", np.sort), r"labels\.npy, row 1: expected label 1, that of test image 1"),
}


@pytest.mark.parametrize("case", BAD_OFFICIAL)
def test_a_bad_official_folder_is_one_clear_line(case, tmp_path):
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "CIFAR-10-C", ("frost", "snow"))
    spoil, pattern = BAD_OFFICIAL[case]
    spoil(folder)
    with pytest.raises(UserError, match=pattern) as caught:
        official(folder, data, ("frost", "snow"))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (folder / "sprung").exists()


def test_a_damaged_header_is_one_clear_line(tmp_path):
    """Every byte of a .npy header, changed in two ways: the array is refused, or is the same."""
    data = coloured(tmp_path)
    folder = folder_for(data, tmp_path / "c", ("snow",))
    content = (folder / "snow.npy").read_bytes()
    assert len(content) == 128 + 30 * 8 * 8 * 3
    for place in range(128):
        for change in (1, 128):
            (folder / "snow.npy").write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
            try:
                assert official(folder, data, ("snow",)).arrays["snow"].shape == (30, 8, 8, 3)
            except UserError as error:
                assert "snow.npy" in str(error) and "\n" not in str(error)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder; name the one that CIFAR-10-C\.tar"):
        official(tmp_path / "nowhere", coloured(tmp_path))


# ---- generated files


@pytest.fixture
def small(digits: Dataset) -> Dataset:
    """Twelve test digits."""
    return digits._replace(test=Split(digits.test.images[:12], digits.test.labels[:12]))


def make(data: Dataset, cache: Path, name: str = "snow", severity: int = 3, seed: int = 0) -> Split:
    return corrupted_test(data, name, severity, source=None, seed=seed, cache=cache)


def files_in(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_generated_once_and_read_again(name, small, tmp_path, monkeypatch):
    first = make(small, tmp_path, name)
    assert np.array_equal(first.images, corrupt(small.test.images, name, 3, 0))
    folder = cached_at(tmp_path, small, 0)
    assert files_in(tmp_path) == [f"{folder.name}/{name}-3.parquet"] and folder.name.startswith("digits-")
    before = (folder / f"{name}-3.parquet").stat()
    monkeypatch.setattr(corrupted_splits, "corrupt", lambda *a, **k: pytest.fail("it was cached"))
    second = make(small, tmp_path, name)
    for split in (first, second):
        assert split.images.dtype == np.uint8 and split.images.flags.c_contiguous
        assert np.array_equal(split.labels, small.test.labels) and split.labels.dtype == np.int64
        images, labels = tensors(split, "cpu")
        assert images.shape == (12, 1, 8, 8) and labels.dtype == torch.int64
    assert np.array_equal(first.images, second.images)
    assert (folder / f"{name}-3.parquet").stat().st_ino == before.st_ino


def test_colour_images_of_a_path(tmp_path):
    data = coloured(tmp_path)
    for severity in SEVERITIES:
        assert np.array_equal(
            make(data, tmp_path / "c", "frost", severity).images, make(data, tmp_path / "c", "frost", severity).images
        )
    assert files_in(tmp_path / "c") == [f"{cached_at(tmp_path, data, 0).name}/frost-{s}.parquet" for s in SEVERITIES]
    assert cached_at(tmp_path, data, 0).name.startswith("a.npz-")


def test_a_cached_file_says_what_it_holds(small, tmp_path):
    make(small, tmp_path, "frost")
    schema = pq.read_schema(cached_at(tmp_path, small, 0) / "frost-3.parquet")
    about = json.loads((schema.metadata or {})[corrupted_splits.KEY])
    assert about["corruption"] == "frost" and about["severity"] == 3 and about["constants"] == [0.9, 0.4]
    assert any("not comparable" in note for note in about["notes"])
    assert schema.field("image").type == pa.binary(64) and schema.field("label").type == pa.int64()
    assert any("not comparable" in note for note in notes(None, 0)) and "seed 5" in notes(None, 5)[0]
    assert not any("frost" in note for note in notes(None, 0, ("snow",)))


def test_another_seed_or_test_split_has_files_of_its_own(small, digits, tmp_path):
    swapped = Split(small.test.images[::-1], small.test.labels)
    relabelled = Split(small.test.images, small.test.labels[::-1].copy())
    others = [small, small._replace(test=swapped), small._replace(test=relabelled), digits]
    places = {cached_at(tmp_path, data, seed) for data in others for seed in (0, 1)}
    assert len(places) == 8
    assert not np.array_equal(make(small, tmp_path, seed=0).images, make(small, tmp_path, seed=1).images)
    result = make(others[1], tmp_path)
    assert np.array_equal(result.images, corrupt(np.ascontiguousarray(swapped.images), "snow", 3, 0))
    assert len(files_in(tmp_path)) == 3


def test_a_damaged_file_is_made_again(small, tmp_path):
    """Wherever a byte is wrong, and however much is missing, the images are right and the file is the same again."""
    expected = make(small, tmp_path).images
    path = cached_at(tmp_path, small, 0) / "snow-3.parquet"
    whole = path.read_bytes()
    damaged = [whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :] for place in range(0, len(whole), 17)]
    damaged += [b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", b"PAR1", b"not a file of ours"]
    again = 0
    for data in damaged:
        path.write_bytes(data)
        assert np.array_equal(make(small, tmp_path).images, expected)
        again += path.read_bytes() == whole
    assert again > 0.8 * len(damaged)  # the rest is damage that changes nothing, such as a name nobody reads
    assert files_in(tmp_path) == [f"{path.parent.name}/snow-3.parquet"]


def test_a_file_of_something_else_is_made_again(small, tmp_path, monkeypatch):
    expected = make(small, tmp_path).images
    path = cached_at(tmp_path, small, 0) / "snow-3.parquet"
    whole = path.read_bytes()
    about = corrupted_splits._describe(small.test, "snow", 3, 0)
    wrong = [
        (Split(expected, small.test.labels), about | {"severity": 4}),
        (Split(expected, small.test.labels), about | {"recipe": 0}),
        (Split(expected, small.test.labels), about | {"constants": [1]}),
        (Split(expected, small.test.labels[::-1]), about),
        (Split(expected[:11], small.test.labels[:11]), about),
        (Split(expected[:, :, :4], small.test.labels), about),
    ]
    for split, says in wrong:
        corrupted_splits._write(path, split, says)
        assert path.read_bytes() != whole
        assert np.array_equal(make(small, tmp_path).images, expected) and path.read_bytes() == whole
    images = pa.array([None] + [row.tobytes() for row in expected[1:]], pa.binary(64))
    table = pa.table({"image": images, "label": small.test.labels})
    pq.write_table(table.replace_schema_metadata({corrupted_splits.KEY: json.dumps(about)}), path)
    assert np.array_equal(make(small, tmp_path).images, expected) and path.read_bytes() == whole
    with monkeypatch.context() as patch:
        patch.setattr(corrupted_splits, "RECIPE", 2)
        assert cached_at(tmp_path, small, 0) != path.parent


def test_several_row_groups_are_read(small, tmp_path):
    """Parquet from elsewhere may be cut in pieces."""
    expected = make(small, tmp_path).images
    path = cached_at(tmp_path, small, 0) / "snow-3.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=5)
    result = corrupted_splits._read(path, small.test, corrupted_splits._describe(small.test, "snow", 3, 0))
    assert result is not None and np.array_equal(result, expected)


def test_many_at_once(small, tmp_path):
    """Threads that make the same files together all get the right images, and leave whole files alone."""
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(make, small, tmp_path, "frost", severity) for _ in range(8) for severity in (1, 2)]
        for number, job in enumerate(jobs):
            assert np.array_equal(job.result().images, corrupt(small.test.images, "frost", 1 + number % 2, 0))
    assert [name.split("/")[1] for name in files_in(tmp_path)] == ["frost-1.parquet", "frost-2.parquet"]


@pytest.mark.slow
def test_processes_at_once(tmp_path):
    """Two fresh processes, unlike in threads and hashes, share one cache: each finds what this one computes."""
    code = (
        "import hashlib, sys; from pathlib import Path\n"
        "from fbpc_ray.data.corrupted_splits import corrupted_test\n"
        "from fbpc_ray.data.corruptions import CORRUPTIONS\n"
        "from fbpc_ray.data.datasets import load\n"
        "data, cache = load(sys.argv[1]), Path(sys.argv[2])\n"
        "for name in CORRUPTIONS:\n"
        "    images = corrupted_test(data, name, 4, source=None, seed=7, cache=cache).images\n"
        "    print(hashlib.sha256(images.tobytes()).hexdigest())\n"
    )
    data, cache = coloured(tmp_path), tmp_path / "cache"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, data.name, str(cache)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": number, "OMP_NUM_THREADS": number},
        )
        for number in ("1", "2")
    ]
    expected = [hashlib.sha256(corrupt(data.test.images, n, 4, 7).tobytes()).hexdigest() for n in CORRUPTIONS]
    for run in runs:
        assert run.communicate(timeout=300)[0].split() == expected and run.returncode == 0
    assert [name.split("/")[1] for name in files_in(cache)] == sorted(f"{name}-4.parquet" for name in CORRUPTIONS)


def test_a_cache_that_cannot_be_written_is_one_clear_line(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: cannot write corrupted images .*; free space there, or") as caught:
        make(small, tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    """A disk that is full when the data are to be made safe: the old file, or none, and no part of a new one."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            make(small, tmp_path)
        assert files_in(tmp_path) == []
    assert np.array_equal(make(small, tmp_path).images, corrupt(small.test.images, "snow", 3, 0))


def test_unknown_names_leave_no_file(small, tmp_path):
    for name, severity in (("fog", 1), ("snow", 6), ("../snow", 1)):
        with pytest.raises(UserError):
            make(small, tmp_path, name, severity)
    assert files_in(tmp_path) == []
