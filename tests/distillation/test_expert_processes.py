"""Processes that write experts: killed, two at once, on a full disk."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.errors import refusal
from support.expert_files import listing, visible
from support.experts import RECIPE, same, snapshot, trajectory
from torch import Tensor

from fbpc_ray.distillation import expert_format
from fbpc_ray.distillation.expert_store import ExpertStore

ROOT = Path(__file__).resolve().parents[2]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs `code` with this file's names in reach."""
    folders = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {folders!r}; from test_expert_processes import *\n{code}"
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
