"""Named generators, the one place that seeds globally, files that are whole or absent, and the error users read."""

import ast
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.rng import generator, seeded_globally


def first(*name) -> float:
    return torch.rand((), generator=generator(*name)).item()


def test_a_stream_never_changes():
    """Literal values: were they to change, no stored experts and no checkpoint would be reproducible."""
    source = generator(0, "step", 7, "convnet-in")
    assert torch.rand(3, generator=source).tolist() == [0.1034594178199768, 0.9976322054862976, 0.540351152420044]
    assert torch.randint(2**62, (), generator=source).item() == 607411213487411006
    assert torch.randn((), generator=generator(1)).item() == 0.7176015973091125


def test_a_stream_is_the_same_in_every_process():
    """Not Python's `hash`, which is salted: a process with another salt sees this process's values."""
    code = (
        "import torch; from fbpc_ray.core.rng import generator as g; print(torch.rand(4, generator=g(3, 'a')).tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == torch.rand(4, generator=generator(3, "a")).tolist()


def test_the_same_name_gives_the_same_stream_and_a_new_generator():
    """What one holder draws doesn't move the other."""
    one, other = generator(5, "x", 2), generator(5, "x", 2)
    drawn = torch.rand(10, generator=one)
    assert torch.equal(torch.rand(10, generator=other), drawn)
    assert not torch.equal(torch.rand(10, generator=one), drawn)


def test_different_names_give_different_streams():
    """Every part of the name counts: seed, words, numbers, their order, their type and where a word ends."""
    names = [
        (0,), (1,), (-1,), (2**40,), (0, "a"), (1, "a"), (0, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a", 1),
        (0, 1, "a"), (0, "1", "a"), (0, 1), (1, 0), (0, "a,b"), (0, "a', 'b"), (0, "a", ""), (0, "a1"),
    ]  # fmt: skip
    assert len({first(*name) for name in names}) == len(names)


def test_the_streams_of_a_run_are_independent():
    """Neighbouring names (steps, architectures, purposes, seeds): no equal beginnings, and no correlation."""
    names = [
        (seed, "step", step, architecture, purpose)
        for seed in range(2)
        for step in range(25)
        for architecture in ("convnet-in", "convnet-gn", "convnet-bn")
        for purpose in ("augment", "prior", "map", "real")
    ]
    streams = torch.stack([torch.randn(600, generator=generator(*name)) for name in names])
    assert streams[:, 0].unique().numel() == len(names)
    correlation = torch.corrcoef(streams) - torch.eye(len(names))
    assert correlation.abs().max() < 6 / 600**0.5
    assert abs(streams[:, 0].mean()) < 4 / len(names) ** 0.5  # first values are uniform over names, too


def test_a_generator_leaves_the_global_one_alone():
    """Making one seeds nothing else, and drawing from it neither."""
    before = torch.random.get_rng_state()
    torch.rand(3, generator=generator(0, "a"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeded_globally_depends_on_its_source_alone():
    """The values inside are those of the source, whatever the global generator was; a second block has others."""
    values = []
    for noise in (1, 2):
        torch.rand(noise)
        source = generator(0, "init")
        for _ in range(2):
            with seeded_globally(source):
                values.append(torch.rand(4))
    assert torch.equal(values[0], values[2])
    assert torch.equal(values[1], values[3])
    assert not torch.equal(values[0], values[1])
    with seeded_globally(generator(0, "other")):
        assert not torch.equal(torch.rand(4), values[0])


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_globally_restores_the_global_generator(fails):
    """Also where the block raises; Python's and numpy's global generators are never touched."""
    before = torch.random.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    try:
        with seeded_globally(generator(0)):
            torch.rand(100)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]  # noqa: NPY002


def test_only_rng_seeds_globally():
    """No other file of the package names a global seed; ruff's TID251 can't see `torch.seed` or an aliased import."""
    package = Path(files.__file__).parents[1]
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("manual_seed", "manual_seed_all", "seed"):
                owner = ast.unparse(node.value)
                assert owner not in ("torch", "torch.random", "torch.cuda", "np.random", "numpy.random", "random") or (
                    path.name == "rng.py"
                ), f"{path}:{node.lineno}"


# --- atomic ---


def run(code: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=check, timeout=300
    )


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    """Exactly the bytes, nothing beside it, and the second version takes the first one's place."""
    path = tmp_path / "a" / "b" / "file.bin"
    for data in (b"\x00one\r\n", b"two", b""):
        files.write_bytes(path, data)
        assert path.read_bytes() == data
        assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    """e acute and an arrow by their bytes, and no newline translated."""
    files.write_text(tmp_path / "t", "é→\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa9\xe2\x86\x92\n"


DIE_HALFWAY = """
import resource, signal, sys
from pathlib import Path
from fbpc_ray.core import files
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the process inside the write that passes the limit
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
files.write_bytes(Path(sys.argv[1]), b"n" * 300_000)
"""


def test_a_death_in_the_middle_of_the_write_leaves_the_old_file(tmp_path):
    """The process dies inside write(2), a third of the bytes out: the old file is whole, or there is none."""
    old, fresh = tmp_path / "old" / "file", tmp_path / "fresh" / "file"
    files.write_bytes(old, b"o" * 1000)
    for path in (old, fresh):
        assert run(DIE_HALFWAY, path, check=False).returncode == -signal.SIGXFSZ
    assert old.read_bytes() == b"o" * 1000
    assert not fresh.exists()


WRITE_FOREVER = """
import sys
from pathlib import Path
from fbpc_ray.core import files
while True:
    for letter in (b"a", b"b"):
        files.write_bytes(Path(sys.argv[1]), letter * 2_000_000)
"""


def test_kill_9_and_readers_see_one_version_or_the_other(tmp_path):
    """A process rewrites 2 MB without end: whoever reads meanwhile, or after kill -9, sees all a or all b."""
    path = tmp_path / "file"
    versions = (b"a" * 2_000_000, b"b" * 2_000_000)
    for delay in (0.0, 0.013, 0.029):
        with subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, path]) as writer:
            try:
                deadline = time.monotonic() + 300
                while not path.exists():
                    assert writer.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                for _ in range(20):
                    assert path.read_bytes() in versions
                time.sleep(delay)
            finally:
                writer.kill()
        assert path.read_bytes() in versions


FAIL = """
import resource, sys
from pathlib import Path
from fbpc_ray.core import files
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: the write returns an error
try:
    files.write_bytes(Path(sys.argv[1]), b"n" * 300_000)
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_failing_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    """EFBIG halfway: OSError, the old bytes, and nothing else in the folder."""
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    assert run(FAIL, path).stdout.startswith("OSError 27")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_not_replaced(tmp_path):
    """OSError, and the folder is alone."""
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="target"):
        files.write_bytes(tmp_path / "target", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    """Ctrl-C is no Exception, and is cleaned up after all the same."""

    def interrupted(descriptor):
        raise KeyboardInterrupt

    files.write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """fsync sees all the bytes, and the old file still in place: else a power cut leaves an empty new file."""
    path, seen, fsync = tmp_path / "file", [], os.fsync

    def watch(descriptor):
        seen.append((os.fstat(descriptor).st_size, path.read_bytes()))
        fsync(descriptor)

    files.write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", watch)
    files.write_bytes(path, b"n" * 100)  # less than a buffer
    assert seen[0] == (100, b"old")
    assert path.read_bytes() == b"n" * 100


# --- errors ---


def test_user_error_keeps_its_code_between_processes():
    """Ray pickles what a worker raises: type, message and exit status come back; 2 is the default."""
    for error, code in ((UserError("cause: fix"), 2), (UserError("cause: fix", code=4), 4)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is UserError
        assert (str(copy), copy.code) == ("cause: fix", code)


def test_closest_names_the_nearest_first_and_then_all():
    """A typo finds its word; what is like nothing gets the list alone."""
    known = ["convnet-in", "convnet-gn", "lenet", "resnet18"]
    hint = closest("resnt18", known)
    assert hint.startswith("did you mean resnet18")
    assert all(name in hint for name in known)
    far = closest("zzz", known)
    assert "did you mean" not in far
    assert all(name in far for name in known)
