"""Experts on disk: what comes back, how it is mapped, and which recipe a folder holds."""

import gc
import json
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support.errors import refusal
from support.expert_files import listing, visible
from support.experts import RECIPE, same, snapshot, trajectory
from torch import Tensor

from fbpc_ray.core import files
from fbpc_ray.core.rng import generator
from fbpc_ray.distillation import expert_store
from fbpc_ray.distillation.expert_store import ExpertStore

# What comes back


def test_float32_comes_back_to_the_bit(tmp_path):
    store = ExpertStore(tmp_path / "new" / "store", RECIPE)
    assert not (tmp_path / "new").exists(), "opening creates nothing"
    assert store.missing(3) == [0, 1, 2]
    for index in (0, 2):
        store.write(index, trajectory(index))
    assert store.missing(3) == [1]
    assert visible(tmp_path / "new/store") == ["00000.arrow", "00000.json", "00002.arrow", "00002.json", "store.json"]
    for opened in (store, ExpertStore(store.folder, RECIPE)):
        for index in (0, 2):
            for epoch in (3, 0, 1, 2):
                assert same(opened.read(index, epoch), snapshot(index, epoch))
            opened.verify(index)


def test_extreme_float32_comes_back_to_the_bit(tmp_path):
    """Subnormals, the largest number and minus zero: compared as integers, since -0.0 == 0.0."""
    values = torch.tensor([1e-45, -1e-38, 3.4028235e38, -0.0, 0.0, 1 / 3])
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, [{"a": values * (-1) ** epoch} for epoch in range(4)])
    for epoch in range(4):
        assert torch.equal(store.read(0, epoch)["a"].view(torch.int32), (values * (-1) ** epoch).view(torch.int32))


def test_float16_is_close_and_integers_are_exact(tmp_path):
    """Rounding to 11 significant bits: |error| <= 2^-11 |value| where float16 is normal, from 2^-14 to 65504."""
    source = generator(0, "half")
    exponents = torch.rand(20_000, generator=source) * 30 - 14
    values = 2**exponents * torch.where(torch.rand(20_000, generator=source) < 0.5, -1, 1)
    values = values.clamp(-65504, 65504)
    count = torch.tensor(2**53 + 1)
    store = ExpertStore(tmp_path, RECIPE._replace(dtype="float16"))
    store.write(0, [{"values": values, "count": count}] * 4)
    back = store.read(0, 2)
    error = ((back["values"] - values).abs() / values.abs()).max()
    assert back["values"].dtype == torch.float32
    assert 2**-13 < error <= 2**-11, "close, and really stored in 16 bits"
    assert back["count"].dtype == torch.int64 and back["count"] == 2**53 + 1
    assert (tmp_path / "00000.arrow").stat().st_size < 4 * (2 * 20_000 + 2_000)
    store.verify(0)


def test_other_dtypes_become_float32_and_int64(tmp_path):
    made = {
        "double": torch.tensor([[0.5, 2.0]], dtype=torch.float64),
        "brain": torch.tensor([1.5], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "short": torch.tensor(7, dtype=torch.int16),
    }
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, [made] * 4)
    back = store.read(0, 0)
    assert [value.dtype for value in back.values()] == [torch.float32, torch.float32, torch.int64, torch.int64]
    assert [value.tolist() for value in back.values()] == [[[0.5, 2.0]], [1.5], [1, 0], 7]
    with pa.memory_map(str(tmp_path / "00000.arrow")) as file:
        schema = pa.ipc.open_file(file).schema
    assert [field.metadata[b"dtype"] for field in schema] == [b"float64", b"bfloat16", b"bool", b"int16"]
    assert [field.metadata[b"shape"] for field in schema] == [b"[1, 2]", b"[1]", b"[2]", b"[]"]
    assert json.loads(schema.metadata[b"recipe"])["architecture"] == "convnet-bn"


def test_snapshots_may_alias_the_tensors_in_training(tmp_path):
    """The peers' trap: all snapshots equal to the last one. Parameters require gradients, as in training."""
    live = {"weight": torch.zeros(5, 7, requires_grad=True), "steps": torch.tensor(0)}

    def train() -> Iterator[dict[str, Tensor]]:
        for _ in range(4):
            yield live
            with torch.no_grad():
                for tensor in live.values():
                    tensor.add_(1)

    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, train())
    back = [store.read(0, epoch) for epoch in range(4)]
    assert [tensors["steps"].item() for tensors in back] == [0, 1, 2, 3]
    assert [tensors["weight"].unique().tolist() for tensors in back] == [[0.0], [1.0], [2.0], [3.0]]


def test_what_is_read_is_fresh_and_writable(tmp_path):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    first = store.read(0, 1)
    for tensor in first.values():
        tensor.zero_()
    assert same(store.read(0, 1), snapshot(0, 1))
    store.verify(0)


# How it is read


def mapped(folder: Path) -> dict[str, int]:
    """Bytes resident in memory of each .arrow file of `folder` that this process has mapped."""
    resident, name = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=5)
        if "-" in head[0]:
            name = Path(head[5]).name if len(head) == 6 and head[5].startswith(str(folder)) else None
        elif name and head[0] == "Rss:":
            resident[name] = resident.get(name, 0) + int(head[1]) * 1024
    return resident


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_one_epoch_of_a_large_file_is_read_by_map(tmp_path):
    """40 MB in ten epochs: reading one leaves the other nine on disk, and what is read doesn't pin the map."""
    size, epochs = 2**20, 9
    store = ExpertStore(tmp_path, RECIPE._replace(epochs=epochs))
    store.write(0, ({"a": torch.full((size,), float(epoch))} for epoch in range(epochs + 1)))
    gc.collect()
    before = pa.total_allocated_bytes()
    back = store.read(0, 5)
    assert pa.total_allocated_bytes() - before < 2**20
    resident = mapped(tmp_path)
    assert list(resident) == ["00000.arrow"]
    assert 4 * size <= resident["00000.arrow"] < 3 * 4 * size
    store.read(0, 5)
    assert list(mapped(tmp_path)) == ["00000.arrow"], "opened once"
    del store
    gc.collect()
    assert mapped(tmp_path) == {}
    assert back["a"].unique().tolist() == [5.0]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_a_store_keeps_a_bounded_number_of_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_store, "MAX_OPEN", 2)
    store = ExpertStore(tmp_path, RECIPE)
    for index in range(4):
        store.write(index, trajectory(index))
    for index in (0, 1, 2, 0, 3, 0, 1):
        assert same(store.read(index, 1), snapshot(index, 1))
    assert sorted(mapped(tmp_path)) == ["00000.arrow", "00001.arrow"]


def test_threads_may_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_store, "MAX_OPEN", 2)
    store = ExpertStore(tmp_path, RECIPE)
    for index in range(4):
        store.write(index, trajectory(index))
    wanted = [(index, epoch) for _ in range(25) for index in range(4) for epoch in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: same(store.read(*key), snapshot(*key)), wanted))


def test_a_store_pickles_without_its_maps(tmp_path):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    store.read(0, 0)
    data = pickle.dumps(store)
    assert len(data) < 1000
    other = pickle.loads(data)
    assert (other.folder, other.recipe) == (tmp_path, RECIPE)
    assert same(other.read(0, 3), snapshot(0, 3))
    other.write(1, trajectory(1))
    assert store.missing(2) == []


# What is refused


def test_another_recipe_is_refused_naming_both_sides(tmp_path):
    ExpertStore(tmp_path, RECIPE._replace(width=128)).write(0, trajectory(0))
    assert refusal(ExpertStore, tmp_path, RECIPE) == (
        f"experts in {tmp_path} were made with width 128, this run wants width 32: give another --experts folder"
    )
    line = refusal(ExpertStore, tmp_path, RECIPE._replace(width=128, epochs=50, augment="none"))
    assert "were made with epochs 3, augment dsa, this run wants epochs 50, augment none" in line
    ExpertStore(tmp_path, RECIPE._replace(width=128, image_shape=(3, 32, 32)))


def test_the_same_images_from_another_path_share_their_experts(tmp_path):
    here, there = (RECIPE._replace(data=f"parquet:{folder}/cifar10") for folder in ("/disk", "../other"))
    expert_store.open_store(tmp_path, here).write(0, trajectory(0))
    moved = expert_store.open_store(tmp_path, there)
    assert moved.missing(2) == [1] and moved.recipe == here
    assert same(moved.read(0, 1), snapshot(0, 1))
    other = expert_store.open_store(tmp_path, there._replace(fingerprint="other"))
    assert other.folder != moved.folder and other.missing(1) == [0]


def test_experts_of_another_recipe_lie_beside_the_first(tmp_path):
    """A sweep holds images out, a table has another learning rate: neither asks for another folder."""
    first, other = expert_store.open_store(tmp_path, RECIPE), expert_store.open_store(tmp_path, RECIPE._replace(lr=0.5))
    assert first.folder == other.folder == expert_store.folder(tmp_path, RECIPE)  # nobody has it yet
    first.write(0, trajectory(0))
    other = expert_store.open_store(tmp_path, RECIPE._replace(lr=0.5))
    other.write(0, trajectory(1))
    assert re.fullmatch(re.escape(first.folder.name) + "-[0-9a-f]{8}", other.folder.name)
    for recipe, store in ((RECIPE, first), (RECIPE._replace(lr=0.5), other)):
        assert expert_store.open_store(tmp_path, recipe).folder == store.folder
        assert expert_store.open_store(tmp_path, recipe).missing(2) == [1]
    third = expert_store.open_store(tmp_path, RECIPE._replace(lr=0.5, seed=9))
    assert third.folder not in (first.folder, other.folder)


def test_of_two_recipes_that_find_a_new_folder_the_slower_one_goes_beside_it(tmp_path, monkeypatch):
    """The trials of a sweep over --expert-lr begin at the same time; each must find a place for its experts, even where
    both see at once that nobody has the folder."""
    other = RECIPE._replace(lr=0.5)
    first, second = expert_store.open_store(tmp_path, RECIPE), expert_store.open_store(tmp_path, other)
    write = files.write_first

    def late(path: Path, text: str) -> None:
        monkeypatch.undo()
        first.claim()
        write(path, text)

    monkeypatch.setattr(files, "write_first", late)
    second.claim()
    assert first.folder == expert_store.folder(tmp_path, RECIPE) != second.folder
    for recipe, store in ((RECIPE, first), (other, second)):
        pickle.loads(pickle.dumps(store)).write(0, trajectory(0))
        assert expert_store.open_store(tmp_path, recipe).folder == store.folder
        assert store.missing(1) == []
        assert listing(Path(str(store.folder))) == ["00000.arrow", "00000.json", "store.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "recipe": 3}', '{"format": 2, "recipe": {}}'])
def test_an_unreadable_store_json_is_refused(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    line = refusal(ExpertStore, tmp_path, RECIPE)
    assert str(tmp_path / "store.json") in line and "--experts" in line


def test_a_store_of_an_older_recipe_is_refused(tmp_path):
    old = {name: value for name, value in RECIPE.to_json().items() if name != "depth"}
    (tmp_path / "store.json").write_text(json.dumps({"format": 1, "recipe": old}))
    assert "made with depth None, this run wants depth 3" in refusal(ExpertStore, tmp_path, RECIPE)


def test_a_folder_claimed_during_a_write_stays_the_others(tmp_path):
    """Two runs of different recipes that open the same new folder: the one that finds itself second gives up."""
    store = ExpertStore(tmp_path, RECIPE)

    def train() -> Iterator[dict[str, Tensor]]:
        for epoch, tensors in enumerate(trajectory(0)):
            if epoch == 2:
                other = {"format": 1, "recipe": RECIPE._replace(lr=0.1).to_json()}
                files.write_text(tmp_path / "store.json", json.dumps(other))
            yield tensors

    assert "made with lr 0.1, this run wants lr 0.01" in refusal(store.write, 0, train())
    assert visible(tmp_path) == ["store.json"]


def test_a_trajectory_from_another_store_is_refused(tmp_path):
    for name, lr in (("a", 0.1), ("b", 0.01)):
        ExpertStore(tmp_path / name, RECIPE._replace(lr=lr)).write(0, trajectory(0))
    for name in ("00000.arrow", "00000.json"):
        (tmp_path / "a" / name).replace(tmp_path / "b" / name)
    line = refusal(ExpertStore(tmp_path / "b", RECIPE).read, 0, 0)
    assert "00000.arrow" in line and "another recipe" in line and "delete it and run again" in line


def test_an_index_or_epoch_that_is_not_there_is_refused(tmp_path):
    store = ExpertStore(tmp_path, RECIPE)
    assert "no complete expert 0" in refusal(store.read, 0, 0)
    store.write(0, trajectory(0))
    assert "no complete expert 7" in refusal(store.read, 7, 0)
    assert "no complete expert 7" in refusal(store.verify, 7)
    for epoch in (-1, 4):
        assert f"epoch {epoch} is not in the experts of {tmp_path}, which have epochs 0 to 3" in refusal(
            store.read, 0, epoch
        )
    (tmp_path / "00000.json").unlink()
    assert store.missing(1) == [0]
    assert "no complete expert 0" in refusal(ExpertStore(tmp_path, RECIPE).read, 0, 0)


# Names


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("parquet:../shared/data/cifar10-jpeg", "parquet-cifar10-jpeg"),
        ("parquet:../shared/data/cifar10-jpeg/", "parquet-cifar10-jpeg"),
        ("parquet:s3://bucket/a b/tiny imagenet", "parquet-tiny-imagenet"),
        (r"folder:C:\data\mine", "folder-mine"),
        ("cifar10", "cifar10"),
        ("../..", "data"),
    ],
)
def test_the_folder_of_a_recipe(tmp_path, data, name):
    path = expert_store.folder(tmp_path, RECIPE._replace(data=data))
    assert path == tmp_path / name / "convnet-bn-w32-d3"
    plain = expert_store.folder(tmp_path, RECIPE._replace(data=data, augment="none"))
    assert plain == tmp_path / name / "convnet-bn-w32-d3-none"


def test_dtype_and_index_are_checked(tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        ExpertStore(tmp_path, RECIPE._replace(dtype="bfloat16"))
    with pytest.raises(ValueError, match="-1"):
        ExpertStore(tmp_path, RECIPE).write(-1, trajectory(0))
