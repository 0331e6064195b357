"""Experts in object stores, and the copies of them that a node keeps."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.errors import refusal
from support.experts import RECIPE, same, snapshot, trajectory
from support.processes import raised_at_once, soon
from support.remote_files import ROOT, names
from support.stores import BUCKET

from fbpc_ray.core import cache
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Remote
from fbpc_ray.distillation.expert_store import ExpertStore


def copies() -> list[str]:
    return sorted(path.name for path in cache.folder().iterdir() if not path.name.startswith(".lock"))


# Experts and their copies


def test_experts_come_back_to_the_bit(folder):
    store = ExpertStore(folder, RECIPE)
    assert store.missing(3) == [0, 1, 2]
    for index in (0, 2):
        store.write(index, trajectory(index))
    assert store.missing(3) == [1]
    assert names(folder) == ["00000.arrow", "00000.json", "00002.arrow", "00002.json", "store.json"]
    for opened in (store, ExpertStore(folder, RECIPE), pickle.loads(pickle.dumps(store))):
        for index in (0, 2):
            opened.verify(index)
            for epoch in range(RECIPE.epochs + 1):
                assert same(opened.read(index, epoch), snapshot(index, epoch))
    assert "no complete expert 1" in refusal(store.read, 1, 0)
    assert "were made with width 32, this run wants width 64" in refusal(ExpertStore, folder, RECIPE._replace(width=64))


def test_an_expert_that_another_run_wrote_meanwhile_stays(s3):
    """Its readers must never see it missing."""
    ExpertStore(s3, RECIPE).write(0, trajectory(0))
    before = (s3 / "00000.json").read_text()
    ExpertStore(s3, RECIPE).write(0, trajectory(1))
    assert (s3 / "00000.json").read_text() == before
    assert same(ExpertStore(s3, RECIPE).read(0, 1), snapshot(0, 1))


def test_an_expert_that_cannot_be_sent_is_missing(s3, wire, monkeypatch):
    store = ExpertStore(s3, RECIPE)
    for name in (b"00000.arrow", b"00000.json"):
        wire.cut_at = b"PUT /%s/%s/%s" % (BUCKET.encode(), s3.name.encode(), name), 300
        assert "cannot be written" in refusal(store.write, 0, trajectory(0))
        wire.cut_at = None
        assert store.missing(1) == [0]
        assert copies() == []
    store.write(0, trajectory(0))
    assert same(store.read(0, 2), snapshot(0, 2))


FETCH = """
import sys
from fbpc_ray.core import cache, storage
source, size, checksum = storage.place(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.stdin.readline()
with cache.copy(source, size, checksum) as path:
    print(path.stat().st_ino, cache.digest().name)
"""


def stored(s3: Remote, name: str, size: int = 3_000_000) -> tuple[Remote, int, str]:
    """Arguments of `cache.copy`, for an object that is there."""
    data, digest = os.urandom(size), cache.digest()
    digest.update(data)
    (s3 / name).write_bytes(data)
    return s3 / name, size, digest.hexdigest()


def fetching(arguments: tuple[Remote, int, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, *map(str, arguments)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_processes_of_a_node_download_once(s3, wire):
    arguments = stored(s3, "object")
    wire.bytes_a_second = 3e6  # a second: they do meet
    before = wire.received
    processes = [fetching(arguments) for _ in range(4)]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    items = [process.communicate(timeout=300) for process in processes]
    assert len({out for out, _ in items}) == 1 != len(items[0][0]), items
    assert 3_000_000 < wire.received - before < 4_000_000
    assert copies() == [f"{arguments[2]}.arrow"]


def test_a_killed_download_leaves_nothing_for_long(s3, wire):
    arguments = stored(s3, "object")
    wire.bytes_a_second = 1e5  # half a minute: it is killed long before
    process = fetching(arguments)
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()

    def is_downloading() -> bool:
        return cache.folder().exists() and any(name.endswith(".tmp") for name in copies())

    assert soon(lambda: process.poll() is not None or is_downloading())
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert [name.endswith(".tmp") for name in copies()] == [True]
    wire.bytes_a_second = float("inf")
    with cache.copy(*arguments) as path:
        assert path.read_bytes() == arguments[0].read_bytes()
    assert copies() == [path.name]


@pytest.mark.parametrize("damage", ["cut", "garbage", "one bit"])
def test_a_damaged_copy_is_replaced(s3, damage):
    ExpertStore(s3, RECIPE).write(0, trajectory(0))
    (path,) = cache.folder().glob("*.arrow")
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "one bit":  # only a checksum tells
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-10], "garbage": bytes(len(data)), "one bit": data}[damage])
    store = ExpertStore(s3, RECIPE)
    if damage == "one bit":
        store.verify(0)
        store = ExpertStore(s3, RECIPE)
    for epoch in range(RECIPE.epochs + 1):
        assert same(store.read(0, epoch), snapshot(0, epoch))


def test_a_damaged_object_is_reported_in_one_line(s3):
    ExpertStore(s3, RECIPE).write(0, trajectory(0))
    shutil.rmtree(cache.folder())
    data = bytearray((s3 / "00000.arrow").read_bytes())
    for wrong in (data[:-1], bytes(len(data)), data + b"x"):
        (s3 / "00000.arrow").write_bytes(wrong)
        line = refusal(ExpertStore(s3, RECIPE).read, 0, 0)
        assert line == (
            f"{s3}/00000.arrow is damaged (it is not the file that its manifest describes): delete it and run again"
        )
        assert copies() == []


def test_scratch_files_of_several_at_once_cost_nobody_anything(tmp_path, monkeypatch):
    """One counts what lies in the folder while another's file goes."""
    monkeypatch.setenv("FBPC_CACHE", str(tmp_path))

    def work():
        for _ in range(1000):
            with cache.scratch(10) as file:
                file.write(b"x")

    assert not raised_at_once(work, 6)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_cache_keeps_its_limit_and_what_was_used_last(s3, monkeypatch):
    monkeypatch.setenv("FBPC_CACHE_GB", "0.0075")  # two of three
    a, b, c = (stored(s3, name) for name in "abc")

    def fetch(arguments: tuple[Remote, int, str]) -> None:
        with cache.copy(*arguments):
            time.sleep(0.02)  # file systems tell times apart by some milliseconds

    def there() -> set[str]:
        return set(copies())

    fetch(a)
    fetch(b)
    fetch(a)
    fetch(c)
    assert there() == {f"{object_path[2]}.arrow" for object_path in (a, c)}, "b was used longest ago"
    monkeypatch.setenv("FBPC_CACHE_GB", "0.002")
    with pytest.raises(UserError, match=r"an expert of 0\.003 GB doesn't fit in the 0\.002 GB of .*FBPC_CACHE"):
        fetch(b)
    monkeypatch.setenv("FBPC_CACHE_GB", "many")
    with pytest.raises(UserError, match="FBPC_CACHE_GB: must be a number, got 'many'"):
        fetch(b)


def test_a_reader_keeps_what_was_pushed_out_and_then_lets_go(s3, monkeypatch):
    store = ExpertStore(s3, RECIPE)
    for index in range(3):
        store.write(index, trajectory(index))
    shutil.rmtree(cache.folder())
    size = json.loads((s3 / "00000.json").read_text())["bytes"]
    monkeypatch.setenv("FBPC_CACHE_GB", str(1.5 * size / 1e9))  # one at a time
    for _ in range(2):
        for index in range(3):
            assert same(store.read(index, 1), snapshot(index, 1))
            assert len(copies()) == 1
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache.folder()) in line]
    assert len(mapped) <= 2, "the one in use, and the one before'"


FULL = """
import sys
from fbpc_ray.core import cache, storage
from fbpc_ray.core.errors import UserError
try:
    with cache.copy(storage.place(sys.argv[1]), int(sys.argv[2]), sys.argv[3]):
        pass
except UserError as error:
    print(error, error.code)
print([each.name for each in cache.folder().iterdir() if not each.name.startswith(".lock")])
"""


def test_a_full_disk_is_reported_in_one_line(s3, tmp_path):
    """A disk of 2 MB, and a cache that may hold more."""
    arguments = stored(s3, "object")
    mounted = tmp_path / "cache"
    mounted.mkdir()
    script = f'mount -t tmpfs -o size=2m none {mounted} && exec "$@"'
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", FULL,
         *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "FBPC_CACHE_GB": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip(f"no file system may be mounted here: {result.stderr.strip()}")
    message, files = result.stdout.splitlines()
    assert message == (
        f"the disk of {mounted} is full (0.003 GB more for experts): free some space, or set FBPC_CACHE to a folder on "
        "another disk, then run the same command again 1"
    )
    assert files == "[]"
