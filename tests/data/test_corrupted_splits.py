"""Corrupted test images that are generated: cached, and made again where a file is damaged."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.image_files import coloured

from fbpc_ray.core.errors import UserError
from fbpc_ray.data import corrupted_splits
from fbpc_ray.data.corrupted_splits import cached_at, corrupted_test, notes
from fbpc_ray.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from fbpc_ray.data.datasets import Dataset, Split, tensors


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
