"""Writers of experts: diverged and incomplete ones, several at once in a process, full disks."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support.errors import refusal
from support.expert_files import listing, visible
from support.experts import RECIPE, same, snapshot, trajectory
from torch import Tensor

from fbpc_ray.core import files
from fbpc_ray.distillation.expert_store import ExpertStore


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
            result = function(*arguments, **options)
            assert same(ExpertStore(tmp_path, RECIPE).read(0, 1), snapshot(0, 1))
            return result

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
