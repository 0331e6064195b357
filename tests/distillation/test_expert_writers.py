"""Writers of experts: diverged and incomplete ones, several at once, kills, full disks."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support.expert_files import listing, visible
from support.experts import RECIPE, refusal, same, snapshot, trajectory
from torch import Tensor

from fbpc_ray.core import files
from fbpc_ray.distillation import expert_format
from fbpc_ray.distillation.expert_store import ExpertStore

ROOT = Path(__file__).resolve().parents[2]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs `code` with this file's names in reach."""
    folders = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {folders!r}; from test_expert_writers import *\n{code}"
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
