"""Decoded images on disk: the same data set as without them, whatever became of sources, files and disk."""

import errno
import os
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.image_files import write_parquet

from fbpc_ray.data import datasets, image_cache, parquet
from fbpc_ray.data.resize import Resizing

COUNT = 6


def bmp(level: int) -> bytes:
    """One image of 4x4 pixels; all such files have one length."""
    buffer = BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache's folder, for any number of images."""
    monkeypatch.setattr(image_cache, "MIN_IMAGES", 1)
    monkeypatch.setenv("FBPC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def write(tmp_path, first=10):
    """Write one file; a third of its images become the test split."""
    write_parquet(
        tmp_path / "mine" / "train.parquet", [bmp(first + 20 * i) for i in range(COUNT)], [0, 1] * (COUNT // 2),
        compression="none", use_dictionary=False, write_statistics=False,
    )  # fmt: skip
    return f"parquet:{tmp_path / 'mine'}"


def levels(dataset: datasets.Dataset) -> list[int]:
    return sorted(int(image[0, 0, 0]) for part in (dataset.train, dataset.test) for image in part.images)


def same(one: datasets.Dataset, other: datasets.Dataset) -> bool:
    equal = all(
        np.array_equal(getattr(one, name).images, getattr(other, name).images)
        and np.array_equal(getattr(one, name).labels, getattr(other, name).labels)
        for name in ("train", "validation", "test")
    )
    return equal and (one.fingerprint, one.notes, one.mean) == (other.fingerprint, other.notes, other.mean)


def never(*_):
    pytest.fail("decoded again")


def test_the_second_start_decodes_nothing_and_has_the_same_data(tmp_path, folder, monkeypatch):
    name = write(tmp_path)
    with monkeypatch.context() as without:
        without.setenv("FBPC_CACHE_GB", "0")
        expected = datasets.load(name)
    assert not list(folder.glob("*"))
    assert levels(expected) == [10, 30, 50, 70, 90, 110]
    first = datasets.load(name)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(parquet, "decode", never)
    second = datasets.load(name)
    assert same(expected, first)
    assert same(expected, second)
    assert datasets.tensors(second.train, "cpu")[0].shape == (4, 3, 4, 4)


def test_other_content_of_the_same_size_and_time_is_read(tmp_path):
    name = write(tmp_path)
    datasets.load(name)
    file = tmp_path / "mine" / "train.parquet"
    before = file.stat()
    write(tmp_path, first=11)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert levels(datasets.load(name)) == [11, 31, 51, 71, 91, 111]


def test_a_damaged_file_is_replaced(tmp_path, folder):
    name = write(tmp_path)
    expected = datasets.load(name)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    cuts = [data[:end] for end in (0, 5, 40, len(data) - 1)]
    flips = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in (0, 9, 20, 60, 90, 120, len(data) - 1)]
    for damaged in (*cuts, *flips, data + b"0"):
        path.write_bytes(damaged)
        assert same(datasets.load(name), expected)
        assert path.read_bytes() == data


def test_size_and_way_of_resizing_count(tmp_path, folder):
    name = write(tmp_path)
    assert datasets.load(name).image_shape == (3, 4, 4)
    assert datasets.load(name, image_size=2).image_shape == (3, 2, 2)
    assert datasets.load(name, image_size=2).image_shape == (3, 2, 2)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_file_fails_no_run(tmp_path, folder, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    name = write(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert len(levels(datasets.load(name))) == COUNT
    assert not list(folder.iterdir())


def test_the_files_used_longest_ago_go_first(tmp_path, folder, monkeypatch):
    name = write(tmp_path)
    datasets.load(name)
    (old,) = folder.iterdir()
    os.utime(old, (1, 1))
    monkeypatch.setenv("FBPC_CACHE_GB", str(1.5 * old.stat().st_size / 1e9))
    write(tmp_path, first=11)
    datasets.load(name)
    (new,) = folder.iterdir()
    assert new != old


def test_a_file_that_is_read_has_been_used_now(tmp_path, folder):
    name = write(tmp_path)
    datasets.load(name)
    (path,) = folder.iterdir()
    os.utime(path, (1, 1))
    datasets.load(name)
    assert path.stat().st_mtime > 1


@pytest.mark.parametrize(
    ("free", "gigabytes", "kept"), [(3.2, "", True), (2.8, "", False), (0.5, "1", False), (1.5, "1", True)]
)
def test_what_the_disk_has_for_the_folder_counts(tmp_path, folder, monkeypatch, free, gigabytes, kept):
    """Two files fit in half of what the first and the free space take together from 3 files of free space on; with a
    limit beyond the disk, one goes where the next finds no space."""
    name = write(tmp_path)
    datasets.load(name)
    (old,) = folder.iterdir()
    space = int(free * old.stat().st_size)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=space))
    monkeypatch.setenv("FBPC_CACHE_GB", gigabytes)
    write(tmp_path, first=11)
    datasets.load(name)
    assert old.exists() == kept
    assert len(list(folder.iterdir())) == 1 + kept


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, folder):
    name = write(tmp_path)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    datasets.load(name)
    assert not list(folder.iterdir())


def test_nothing_is_kept_of_a_source_that_changes_while_it_is_decoded(tmp_path, folder, monkeypatch):
    write(tmp_path)
    file, decode = tmp_path / "mine" / "train.parquet", parquet.decode

    def change(*arguments):
        result = decode(*arguments)
        file.write_bytes(file.read_bytes() + b"0")
        return result

    monkeypatch.setattr(parquet, "decode", change)
    assert len(parquet.parquet(file).parts["train"].images) == COUNT
    assert not folder.exists()


SOURCES = ("one.parquet", "two.parquet")
CHANGES: dict[str, dict[str, Any]] = {
    "order of the files": {"sources": SOURCES[::-1]},
    "column": {"column": "picture"},
    "origin, which notes name": {"origin": "another"},
    "size": {"resizing": Resizing(3, "crop")},
    "way of resizing": {"resizing": Resizing(2, "stretch")},
}


def name_of(folder: Path, *, sources=SOURCES, column="image", origin="mine", resizing=Resizing(2, "crop")):  # noqa: B008
    return image_cache._checksum([folder / source for source in sources], column, origin, resizing)


@pytest.fixture
def sources(tmp_path):
    for source in SOURCES:
        (tmp_path / source).write_text(source)
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_the_name_holds_each_argument_of_the_decoding(sources, change):
    assert name_of(sources, **CHANGES[change]) != name_of(sources)


def test_the_name_holds_the_versions_of_pillow_and_of_its_codecs_and_our_code(sources, monkeypatch):
    """Another libjpeg, or another commit of ours, may decode to other pixels."""
    names = {name_of(sources)}
    for target, attribute, value in (
        (image_cache.PIL, "__version__", "0.1"),
        (image_cache.features, "version", lambda codec: "0.1" if codec == "jpg" else None),
        (image_cache.inspect, "getsource", lambda module: module.__name__),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, value)
            names.add(name_of(sources))
    assert len(names) == 4
