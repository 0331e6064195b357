"""The store of expert trajectories: every bit comes back, and no end of a writer leaves half an expert."""

import gc
import hashlib
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.experts import RECIPE, refusal, same, snapshot, trajectory
from torch import Tensor

from fbpc_ray.core import cache, files, inputs
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.distillation import expert_format, expert_store
from fbpc_ray.distillation.expert_store import ExpertStore

ROOT = Path(__file__).resolve().parents[2]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def visible(folder: Path) -> list[str]:
    return [name for name in listing(folder) if not name.startswith(".")]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs `code` with this file's names in reach."""
    folders = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {folders!r}; from test_expert_store import *\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


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
    old = {name: value for name, value in RECIPE._asdict().items() if name != "depth"}
    (tmp_path / "store.json").write_text(json.dumps({"format": 1, "recipe": old}))
    assert "made with depth None, this run wants depth 3" in refusal(ExpertStore, tmp_path, RECIPE)


def test_a_folder_claimed_during_a_write_stays_the_others(tmp_path):
    """Two runs of different recipes that open the same new folder: the one that finds itself second gives up."""
    store = ExpertStore(tmp_path, RECIPE)

    def train() -> Iterator[dict[str, Tensor]]:
        for epoch, tensors in enumerate(trajectory(0)):
            if epoch == 2:
                other = {"format": 1, "recipe": RECIPE._replace(lr=0.1)._asdict()}
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
        assert f"epoch {epoch} is not in the experts of {tmp_path}: they hold epochs 0 to 3" in refusal(
            store.read, 0, epoch
        )
    (tmp_path / "00000.json").unlink()
    assert store.missing(1) == [0]
    assert "no complete expert 0" in refusal(ExpertStore(tmp_path, RECIPE).read, 0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_expert_is_refused(tmp_path, bad):
    store = ExpertStore(tmp_path, RECIPE)
    tensors = [snapshot(5, epoch) for epoch in range(4)]
    tensors[2]["head.weight"][3, 1] = bad
    line = refusal(store.write, 5, tensors)
    assert "expert 5" in line and "head.weight is not finite at epoch 2" in line and "lower --expert-lr" in line
    assert visible(tmp_path) == ["store.json"] and store.missing(6) == list(range(6))


def test_a_value_beyond_float16_is_refused(tmp_path):
    store = ExpertStore(tmp_path, RECIPE._replace(dtype="float16"))
    assert "a does not fit float16 at epoch 0" in refusal(store.write, 0, [{"a": torch.tensor([70000.0])}] * 4)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_another_number_of_snapshots_leaves_nothing(tmp_path, count):
    store = ExpertStore(tmp_path, RECIPE)
    with pytest.raises(ValueError, match="another number of snapshots than 4"):
        store.write(0, [snapshot(0, 0)] * count)
    assert listing(tmp_path) == ["store.json"]


def test_an_endless_run_is_stopped_at_the_first_snapshot_too_many(tmp_path):
    seen = []

    def endless() -> Iterator[dict[str, Tensor]]:
        while True:
            seen.append(1)
            yield snapshot(0, 0)

    with pytest.raises(ValueError, match="another number of snapshots"):
        ExpertStore(tmp_path, RECIPE).write(0, endless())
    assert len(seen) == RECIPE.epochs + 2


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(3, 2)},  # as many numbers, another shape
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3, dtype=torch.int64)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ],
)
def test_snapshots_that_change_their_form_are_refused(tmp_path, other):
    with pytest.raises(ValueError, match="epoch 2 are not those of epoch 0"):
        ExpertStore(tmp_path, RECIPE).write(0, [{"a": torch.zeros(2, 3)}] * 2 + [other] * 2)
    assert listing(tmp_path) == ["store.json"]


def test_a_failing_training_leaves_nothing_and_keeps_the_old(tmp_path):
    store = ExpertStore(tmp_path, RECIPE)

    def fails() -> Iterator[dict[str, Tensor]]:
        yield snapshot(9, 0)
        raise RuntimeError("out of memory")

    for whole in ([], ["00000.arrow", "00000.json"]):
        with pytest.raises(RuntimeError, match="out of memory"):
            store.write(0, fails())
        assert listing(tmp_path) == [*whole, "store.json"]
        store.write(0, trajectory(0))
    assert same(store.read(0, 2), snapshot(0, 2))


def test_rewriting_gives_the_same_file(tmp_path):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    first = (tmp_path / "00000.arrow").read_bytes()
    store.read(0, 0)
    store.write(0, trajectory(0))
    assert (tmp_path / "00000.arrow").read_bytes() == first
    store.write(0, trajectory(1))
    assert same(store.read(0, 1), snapshot(1, 1)), "an open store sees the new file"


def test_a_second_writer_of_the_same_index_does_no_harm(tmp_path):
    """A task that Ray runs again while the first one still lives: the second one may not sweep the first's file."""
    store = ExpertStore(tmp_path, RECIPE)

    def interrupted() -> Iterator[dict[str, Tensor]]:
        for epoch, tensors in enumerate(trajectory(0)):
            if epoch == 2:
                ExpertStore(tmp_path, RECIPE).write(0, trajectory(0))
            yield tensors

    store.write(0, interrupted())
    assert store.missing(1) == []
    store.verify(0)
    assert listing(tmp_path) == ["00000.arrow", "00000.json", "store.json"]


def test_what_another_writer_made_meanwhile_can_be_read_at_any_moment(tmp_path, monkeypatch):
    """Two runs lack the same expert and train it both: the quicker one reads it while the other one ends."""

    def watched(function):
        def call(*arguments, **options):
            found = function(*arguments, **options)
            assert same(ExpertStore(tmp_path, RECIPE).read(0, 1), snapshot(0, 1))
            return found

        return call

    def overtaken() -> Iterator[dict[str, Tensor]]:
        yield from itertools.islice(trajectory(0), RECIPE.epochs)
        ExpertStore(tmp_path, RECIPE).write(0, trajectory(0))
        for name in ("replace", "unlink"):
            monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
        yield snapshot(0, RECIPE.epochs)

    ExpertStore(tmp_path, RECIPE).write(0, overtaken())
    assert listing(tmp_path) == ["00000.arrow", "00000.json", "store.json"]


def test_a_whole_file_is_not_swept_before_it_has_its_name(tmp_path, monkeypatch):
    """Another writer of the same index begins, and sweeps, just as this one is through."""
    replace = Path.replace

    def late(path: Path, target: Path) -> Path:
        files.remove_stale_temp_files(tmp_path, ".00000.arrow.*.tmp")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", late)
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    store.verify(0)


def test_a_writer_that_fails_leaves_the_file_of_another_that_is_about_to_list_it(tmp_path, monkeypatch):
    store, write = ExpertStore(tmp_path, RECIPE), files.write_text

    def late(path: Path, text: str) -> None:
        if path.name == "00000.json":
            with pytest.raises(ValueError, match="another number of snapshots"):
                ExpertStore(tmp_path, RECIPE).write(0, trajectory(0, 1))
        write(path, text)

    monkeypatch.setattr(files, "write_text", late)
    store.write(0, trajectory(0))
    store.verify(0)


# Damage


def test_a_truncated_file_is_missing_and_refused(tmp_path):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    data = (tmp_path / "00000.arrow").read_bytes()
    store.read(0, 0)
    for length in (0, 1, len(data) // 2, len(data) - 1):
        (tmp_path / "00000.arrow").write_bytes(data[:length])
        assert store.missing(1) == [0]
        for call in (store.verify, lambda index: store.read(index, 0), lambda index: store.read(index, 3)):
            line = refusal(call, 0)
            assert str(tmp_path / "00000.arrow") in line and "delete it and run again" in line
            assert f"{length} bytes, its manifest says {len(data)}" in line
    (tmp_path / "00000.arrow").unlink()
    assert store.missing(1) == [0]
    assert "no complete expert 0" in refusal(store.read, 0, 0)
    store.write(0, trajectory(0))
    assert same(store.read(0, 0), snapshot(0, 0))


def without_snapshot_checksums(path: Path) -> None:
    """Make a manifest one of an earlier release."""
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "snapshot_checksums"}))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, legacy):
    """Over the whole file, every fifth byte inverted: reading is right to the bit, or refused in one line."""
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    if legacy:
        without_snapshot_checksums(tmp_path / "00000.json")
    path = tmp_path / "00000.arrow"
    data = path.read_bytes()
    refused = 0
    for position in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        opened = ExpertStore(tmp_path, RECIPE)
        line = refusal(opened.verify, 0)
        assert str(path) in line and "delete it and run again" in line
        try:
            for epoch in range(4):
                assert same(opened.read(0, epoch), snapshot(0, epoch))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "delete it and run again" in str(error)
    assert refused > 30
    assert not legacy or refused == len(range(0, len(data), 5))
    path.write_bytes(data)
    ExpertStore(tmp_path, RECIPE).verify(0)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_file(tmp_path, legacy):
    """A file of another program, whose checksums are right."""
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    path, manifest = tmp_path / "00000.arrow", tmp_path / "00000.json"
    value = snapshot(0, 2)["temperature"].numpy()
    data = path.read_bytes()
    assert data.count(value.tobytes()) == 1
    path.write_bytes(data.replace(value.tobytes(), np.array(np.nan, np.float32).tobytes()))
    facts = json.loads(manifest.read_text())
    with path.open("rb") as file:
        facts["checksum"] = hashlib.file_digest(file, cache.digest).hexdigest()
    changed = snapshot(0, 2) | {"temperature": torch.tensor(float("nan"))}
    facts["snapshot_checksums"][2] = inputs.crc(tensor.numpy().tobytes() for tensor in changed.values())
    manifest.write_text(json.dumps(facts))
    if legacy:
        without_snapshot_checksums(manifest)
    opened = ExpertStore(tmp_path, RECIPE)
    assert refusal(opened.read, 0, 2) == (
        f"{path} is damaged (temperature is not finite at epoch 2): delete it and run again"
    )
    assert same(opened.read(0, 1), snapshot(0, 1))


@pytest.mark.parametrize("name", ["store.json", "00000.json", "00000.arrow"])
def test_a_fifo_or_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, name):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    (tmp_path / name).unlink()
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / name)
        assert f"{tmp_path / name}: must be a regular file" in refusal(lambda: ExpertStore(tmp_path, RECIPE).read(0, 0))
        (tmp_path / name).unlink() if make is os.mkfifo else (tmp_path / name).rmdir()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"bytes": 1}'])
def test_a_damaged_manifest_means_no_trajectory(tmp_path, text):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    (tmp_path / "00000.json").write_text(text)
    assert store.missing(1) == [0]
    opened = ExpertStore(tmp_path, RECIPE)
    assert "delete it and run again" in refusal(opened.read, 0, 0)
    assert "delete it and run again" in refusal(opened.verify, 0)


# Writers that are killed, race, or run out of disk


@pytest.mark.slow
def test_a_writer_killed_in_the_middle_leaves_no_expert(tmp_path):
    """A real kill -9 from outside after two of four epochs; the next writer removes what was left."""
    writer = start(
        """
def slow():
    yield {"a": torch.zeros(100_000)}
    yield {"a": torch.ones(100_000)}
    print("two epochs", flush=True)
    sys.stdin.read()
ExpertStore(Path(sys.argv[1]), RECIPE).write(0, slow())
""",
        tmp_path,
    )
    assert writer.stdout and writer.stdout.readline() == "two epochs\n"
    writer.kill()
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    leftovers = list(tmp_path.glob(".*"))
    assert len(leftovers) == 1 and leftovers[0].stat().st_size > 700_000, "it was killed in the middle of its file"
    assert visible(tmp_path) == ["store.json"]
    store = ExpertStore(tmp_path, RECIPE)
    assert store.missing(2) == [0, 1]
    assert "no complete expert 0" in refusal(store.read, 0, 0)
    store.write(1, trajectory(1))
    assert leftovers[0].exists(), "it is not index 1's to remove"
    store.write(0, trajectory(0))
    assert listing(tmp_path) == ["00000.arrow", "00000.json", "00001.arrow", "00001.json", "store.json"]
    assert same(store.read(0, 3), snapshot(0, 3))


SMALL = RECIPE._replace(epochs=1)


def small(value: int) -> list[dict[str, Tensor]]:
    return [{"a": torch.full((3,), float(value))}] * 2


def killed_at_each_step(folder: Path) -> None:
    """For each call that changes the disk while index 0 is rewritten and index 1 is made, a forked child that kills
    itself just before it, in a folder named after the number of the call."""

    def killing(target: int, function):
        def call(*arguments, **options):
            steps.append(function.__name__)
            if len(steps) == target:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for target in range(1, 1000):
        ExpertStore(folder / str(target), SMALL).write(0, small(7))
        child = os.fork()
        if child == 0:
            steps: list[str] = []
            expert_format.Sink.write = killing(target, expert_format.Sink.write)
            os.fsync = killing(target, os.fsync)
            for name in ("replace", "unlink", "open"):
                setattr(Path, name, killing(target, getattr(Path, name)))
            store = ExpertStore(folder / str(target), SMALL)
            store.write(0, small(0))
            store.write(1, small(1))
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return


@pytest.mark.slow
def test_a_writer_killed_at_any_step_leaves_all_or_nothing(tmp_path):
    """Index 0 is the old one, missing, or the new one, in this order as the writer gets further; index 1 is missing to
    the end. Whatever is there is whole, and what is missing can be made."""
    finish(start("killed_at_each_step(Path(sys.argv[1]))", tmp_path))
    folders = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    seen = []
    for folder in folders:
        store = ExpertStore(folder, SMALL)
        missing = store.missing(2)
        for index in (0, 1):
            if index in missing:
                assert f"no complete expert {index}" in refusal(store.read, index, 0)
            else:
                store.verify(index)
        seen.append((None if 0 in missing else store.read(0, 1)["a"][0].item(), 1 in missing))
        for index in missing:
            store.write(index, small(index))
            store.verify(index)
            assert not list(folder.glob(f".{index:05d}.arrow.*")), "the killed writer's file is swept"
        assert store.missing(2) == []
    order = [(7.0, True), (None, True), (0.0, True), (0.0, False)]
    assert [state for state, _ in itertools.groupby(seen)] == order
    assert seen.count(order[-1]) == 1, "the one that nobody killed"
    assert len(seen) > 40


@pytest.mark.slow
def test_two_processes_write_one_new_store(tmp_path):
    """Both find no store.json; their writes overlap epoch by epoch."""
    folder = tmp_path / "store"
    code = """
store = ExpertStore(Path(sys.argv[1]), RECIPE)
print("ready", flush=True)
sys.stdin.readline()
for index in range(int(sys.argv[2]), 20, 2):
    store.write(index, trajectory(index))
"""
    writers = [start(code, folder, first) for first in (0, 1)]
    for writer in writers:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    assert not folder.exists()
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        finish(writer)
    store = ExpertStore(folder, RECIPE)
    assert store.missing(20) == []
    assert len(listing(folder)) == 41
    for index in range(20):
        store.verify(index)
        assert same(store.read(index, 2), snapshot(index, 2))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_and_keeps_the_others(tmp_path):
    """A limit on the size of files is met in the middle of trajectory 1, by write() itself."""
    out = finish(
        start(
            """
import resource
import fbpc_ray.data.coreset
store = ExpertStore(Path(sys.argv[1]), RECIPE)
store.write(0, trajectory(0))
size = (store.folder / "00000.arrow").stat().st_size
for limit in (size - 1, size // 2, 1000, 10):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for index in (0, 1):
        try:
            store.write(index, trajectory(index))
        except OSError as error:
            print(error.errno, *listing(store.folder))
    assert store.missing(2) == [1]
    store.verify(0)
    assert same(store.read(0, 1), snapshot(0, 1))
print({"ray", "mlflow", "matplotlib", "torchvision", "pandas"} & set(sys.modules))
""",
            tmp_path,
        )
    )
    *listings, imported = out.splitlines()
    assert listings == ["27 00000.arrow 00000.json store.json"] * 8
    assert imported == "set()", "none of these is imported, neither with the modules nor in writing and reading"
    store = ExpertStore(tmp_path, RECIPE)
    assert same(store.read(0, 3), snapshot(0, 3))
    store.write(1, trajectory(1))
    assert store.missing(2) == []


def test_a_disk_that_fills_at_the_manifest_leaves_no_arrow_file(tmp_path, monkeypatch):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(1, trajectory(1))
    assert visible(tmp_path) == listing(tmp_path) == ["00000.arrow", "00000.json", "store.json"]
    assert same(store.read(0, 1), snapshot(0, 1))


def test_a_file_that_the_system_will_not_open_is_not_called_damaged(tmp_path, monkeypatch):
    """Deleting a good file because of "too many open files" would be the wrong fix."""
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))

    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pa, "memory_map", refuse)
    line = refusal(store.read, 0, 0)
    assert "cannot be read (Too many open files)" in line and "delete" not in line


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
