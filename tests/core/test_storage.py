"""Runs and experts in object stores: real servers on loopback, real processes, wires that are cut."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import safetensors
import torch
from support.experts import RECIPE, refusal, same, snapshot, trajectory
from support.processes import raised_at_once, soon
from support.runs import distil, flags, images_of, start
from support.stores import BUCKET, Wire, gs_server, s3_server

from fbpc_ray.commands import main
from fbpc_ray.core import cache, storage
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import Remote, place
from fbpc_ray.data import coreset
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
ATTEMPTS = storage.ATTEMPTS
S3 = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "mine", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def servers():
    """{scheme: port}."""
    with s3_server() as s3, gs_server() as gs:
        yield {"s3": s3, "gs": gs}


@pytest.fixture(autouse=True)
def environment(servers, monkeypatch, tmp_path):
    """Variables with which both servers are found, and a cache of the test's own."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "FBPC_")):
            monkeypatch.delenv(name)
    for name, value in S3.items():
        monkeypatch.setenv(name, value)
    use(monkeypatch, "s3", servers["s3"])
    use(monkeypatch, "gs", servers["gs"])
    monkeypatch.setenv("FBPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "ATTEMPTS", 2)  # for the tests' time; commands in processes of their own have all
    monkeypatch.setattr(storage, "RETRY", storage.timedelta(seconds=2))
    storage._opened.cache_clear()


def use(monkeypatch, scheme: str, port: int) -> None:
    name = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}[scheme]
    monkeypatch.setenv(name, f"http://127.0.0.1:{port}")


@pytest.fixture
def wire(servers, monkeypatch):
    """Between this test and the S3 server."""
    wire = Wire(servers["s3"])
    use(monkeypatch, "s3", wire.port)
    yield wire
    wire.close()


@pytest.fixture(params=["s3", "gs"])
def folder(request, tmp_path) -> Remote:
    """A prefix that no other test has."""
    return Remote(request.param, f"{BUCKET}/{tmp_path.name}")


@pytest.fixture
def s3(tmp_path) -> Remote:
    return Remote("s3", f"{BUCKET}/{tmp_path.name}")


def names(where: Remote) -> list[str]:
    return sorted(each.name for each in where.iterdir())


def copies() -> list[str]:
    return sorted(path.name for path in cache.folder().iterdir() if not path.name.startswith(".lock"))


# Names


def test_a_place_is_a_path_or_a_remote():
    assert place("~/x") == Path.home() / "x"
    assert place("runs/a:b") == Path("runs/a:b")
    found = place("s3://bucket//a/b/")
    assert found == Remote("s3", "bucket/a/b")
    assert str(found) == "s3://bucket/a/b"
    assert (found / "c.d.json").with_suffix(".png") == Remote("s3", "bucket/a/b/c.d.png")
    assert (found.name, found.absolute()) == ("b", found)
    assert pickle.loads(pickle.dumps(found)) == found
    for text in ("http://host/a", "s3://", "gs:///"):
        assert text in refusal(place, text)


def test_what_must_be_local_says_so(monkeypatch, capsys):
    monkeypatch.setenv("FBPC_HOME", "s3://bucket/home")
    for words in (["reproduce", "table1", "--out", "s3://bucket/x", "--dry-run"], ["experts", "--dry-run"]):
        with pytest.raises(SystemExit) as stop:
            main.main(words)
        assert stop.value.code == 2
        assert "must be a local folder, got" in capsys.readouterr().err


# Objects


def test_an_object_comes_back_and_is_replaced(folder, monkeypatch):
    monkeypatch.setattr(storage, "PART", 10 * 2**20)  # three parts of the large one below
    one, two = folder / "one.txt", folder / "below" / "two.bin"
    assert not one.exists()
    assert not folder.exists()
    assert names(folder) == []
    with pytest.raises(FileNotFoundError, match=r"one\.txt"):
        one.read_bytes()
    for data in (b"first", b"", b"\xc3\xa4"):
        one.write_bytes(data)
        assert one.read_bytes() == data
    assert one.read_text() == "ä"
    large = os.urandom(25_000_000)
    two.write_bytes(large)
    assert two.read_bytes() == large
    assert (one.is_file(), one.is_dir(), folder.is_dir(), folder.exists()) == (True, False, True, True)
    two.with_suffix(".txt").write_bytes(b"")
    assert names(folder) == ["one.txt"]
    assert [each.name for each in folder.glob("*.txt")] == ["one.txt"]
    one.unlink()
    one.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        one.unlink()
    assert names(folder) == []
    assert folder.exists()


def test_another_process_opens_the_store_by_itself(folder):
    (folder / "a").write_bytes(b"hello")
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).read_text(), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(folder / "a"), capture_output=True)
    assert found.stdout.split() == [b"hello", b"False"], found.stderr


def test_an_upload_that_is_cut_leaves_the_old_object(folder, servers, monkeypatch):
    """Cut in the second of three parts, at each attempt; and with no object there before, none appears."""
    monkeypatch.setattr(storage, "PART", 10 * 2**20)
    wire = Wire(servers[folder.scheme])
    use(monkeypatch, folder.scheme, wire.port)
    old, new = folder / "old", folder / "new"
    old.write_bytes(b"o" * 1000)
    cut = {"s3": (b"partNumber=2", 1_000_000), "gs": (b"content-range: bytes 10485760", 10_000)}
    for each in (old, new):
        wire.cut_at = cut[folder.scheme]
        wire.cuts = 0
        line = refusal(each.write_bytes, b"n" * 30_000_000)
        assert line.startswith(f"{each} cannot be written ("), line
        assert "what was there before is whole, and --resume goes on" in line
        assert wire.cuts >= 1
        wire.cut_at = None
    assert old.read_bytes() == b"o" * 1000
    assert not new.exists()
    old.write_bytes(b"again")
    assert old.read_bytes() == b"again"
    wire.close()


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from fbpc_ray.core import storage
storage.PART = 10 * 2**20
storage.place(sys.argv[1]).write_bytes(b"n" * 30_000_000)
"""


def test_ctrl_c_in_an_upload_leaves_no_part_of_an_object(s3, wire):
    """Arrow completes an upload as its stream is closed or dropped, so an exception in the middle would."""
    wire.bytes_a_second = 5e6  # so that it takes seconds more, however late we see that it is amid
    each = s3 / "object"
    each.write_bytes(b"old")
    before = wire.sent
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(each)], cwd=ROOT, stderr=subprocess.PIPE)
    assert soon(lambda: wire.sent - before > 12_000_000)
    process.send_signal(signal.SIGINT)
    wire.bytes_a_second = float("inf")
    error = process.communicate(timeout=300)[1]
    assert b"KeyboardInterrupt" in error
    assert len(each.read_bytes()) in (3, 30_000_000)


def test_an_export_takes_a_run_out_of_a_store(folder, tmp_path, capsys):
    """And a file alone is evaluated where it lies; a folder there is one line."""
    run, source = RunDirectory(folder / "run"), torch.Generator().manual_seed(0)
    made = coreset.Coreset(
        torch.randn(10, 1, 8, 8, generator=source), torch.arange(10), (0.5,), (0.25,), tuple("0123456789")
    )
    run.write_config(Config())
    coreset.save(made, run.coreset_path, {"method": "fbpc"})
    main.main(["export", str(run.folder), "--format", "safetensors", "--out", str(tmp_path / "it.safetensors")])
    assert torch.equal(coreset.load(tmp_path / "it.safetensors").images, made.images)
    evaluate = ["evaluate", "--data", "digits", "--width", "8", "--backend", "serial", "--num-chains", "1",
                "--chain-epochs", "2", "--chain-every", "1", "--coreset"]  # fmt: skip
    main.main([*evaluate, str(run.coreset_path)])
    assert "convnet-in    given" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main([*evaluate, str(run.folder)])
    assert "of a store only a file can be read" in capsys.readouterr().err


# What stores say


def leaves(capsys, *words: str) -> str:
    """The one line with which a command ends, soon, with exit status 1."""
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main.main(list(words))
    assert time.monotonic() - began < 120
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error, error
    return error


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there(scheme, capsys, digits):
    where = f"{scheme}://not-there/x"
    for words in (["distill", "--out", where], ["evaluate", where], ["distill", "--out", where, "--resume"],
                  ["experts", "--experts", where]):  # fmt: skip
        assert f"there is no bucket {scheme}://not-there" in leaves(capsys, *words)


def test_a_run_that_is_not_there(folder, capsys):
    for words in (["evaluate", str(folder)], ["distill", "--out", str(folder), "--resume"]):
        with pytest.raises(SystemExit):
            main.main(words)
        assert f"{folder} holds no run (no config.json)" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_nobody_at_the_address(scheme, monkeypatch, capsys):
    use(monkeypatch, scheme, 9)
    error = leaves(capsys, "distill", "--out", f"{scheme}://{BUCKET}/x")
    assert re.search(r"cannot be read \(.*connect to server.*\): check the network", error), error


def test_an_address_that_never_answers(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(storage, "SILENT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(monkeypatch, "s3", silent.getsockname()[1])
        assert "check the network" in leaves(capsys, "distill", "--out", f"s3://{BUCKET}/x")


def test_credentials_that_are_not_there(monkeypatch, capsys):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/not/there.json")
    error = leaves(capsys, "distill", "--out", f"gs://{BUCKET}/x")
    assert "cannot be read (Cannot open credentials file /not/there.json" in error
    assert ": check GOOGLE_APPLICATION_CREDENTIALS" in error


def test_credentials_that_are_refused(servers, capsys):
    """moto checks signatures once it is told to."""

    def after(requests: bytes) -> None:
        url = f"http://127.0.0.1:{servers['s3']}/moto-api/reset-auth"
        request = urllib.request.Request(url, requests, {"Content-Type": "text/plain"}, method="POST")
        urllib.request.urlopen(request, timeout=10).close()

    after(b"0")
    try:
        error = leaves(capsys, "distill", "--out", f"s3://{BUCKET}/x")
        assert "cannot be read (access denied): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in error
    finally:
        after(b"inf")


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
    found = [process.communicate(timeout=300) for process in processes]
    assert len({out for out, _ in found}) == 1 != len(found[0][0]), found
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


def test_a_damaged_object_is_said(s3):
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
    assert there() == {f"{each[2]}.arrow" for each in (a, c)}, "b was used longest ago"
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


def test_a_full_disk_is_said(s3, tmp_path):
    """A disk of 2 MB, and a cache that may hold more."""
    arguments = stored(s3, "object")
    mounted = tmp_path / "cache"
    mounted.mkdir()
    script = f'mount -t tmpfs -o size=2m none {mounted} && exec "$@"'
    found = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", FULL,
         *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "FBPC_CACHE_GB": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if "unshare" in found.stderr or "mount" in found.stderr:
        pytest.skip(f"no file system may be mounted here: {found.stderr.strip()}")
    said, left = found.stdout.splitlines()
    assert said == (
        f"the disk of {mounted} is full (0.003 GB more for experts): free some space, or set FBPC_CACHE to a folder on "
        "another disk, then run the same command again 1"
    )
    assert left == "[]"


# Runs


@pytest.fixture(scope="module")
def local(small, tmp_path_factory):
    """(settings, folder) of an undisturbed run on local files."""
    folder = tmp_path_factory.mktemp("local") / "run"
    settings = small.updated(steps=12, checkpoint_every=2)
    distil(*flags(settings, backend="serial", out=str(folder)))
    return settings, folder


def remote_images(run: Remote) -> torch.Tensor:
    return coreset.load(RunDirectory(run).coreset_path).images


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_in_a_store_stopped_and_resumed_equals_the_local_one(local, s3, tmp_path, monkeypatch, capsys):
    """Everything remote: experts made by Ray's workers, checkpoints, SIGTERM, resume with MLflow, evaluation."""
    settings, folder = local
    out = s3 / "run"
    words = flags(settings, experts=str(s3 / "experts"), out=str(out), backend="ray", device="cpu", address="local")
    process = start("distill", *words, **os.environ)
    assert soon(lambda: process.poll() is not None or RunDirectory(out).state_path.exists())
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 143, output
    assert f"fbpc distill --out {out} --resume --experts {s3 / 'experts'}" in output
    assert not RunDirectory(out).result_path.exists()

    monkeypatch.setenv("FBPC_HOME", str(tmp_path / "home"))
    distil("--out", str(out), "--resume", "--experts", str(s3 / "experts"), "--backend", "serial", "--tracking")
    assert torch.equal(remote_images(out), images_of(folder))
    mine, its = (json.loads(RunDirectory(each).result_path.read_text())["coresets"] for each in (out, folder))
    assert mine == its
    assert names(out) == sorted([*(each.name for each in folder.iterdir() if each.is_file()), "mlflow.json"])
    kept = {path.name for path in (tmp_path / "home" / "mlartifacts").rglob("*.*")}
    assert {"coreset.safetensors", "coreset.png", "result.json", "metrics.parquet"} <= kept
    assert "resumed at step" in capsys.readouterr().out
    distil("--out", str(out), "--resume", "--experts", str(s3 / "experts"))
    assert "this run is complete" in capsys.readouterr().out

    main.main(["evaluate", str(out), "--backend", "serial", "--architectures", "convnet-in"])
    assert names(out / "evaluations") == ["001-test-convnet-in.json", "001-test-convnet-in.reliability.png"]
    with pytest.raises(SystemExit):
        distil("--out", str(out))
    assert f"{out} is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_google_s_protocol(local, tmp_path):
    settings, folder = local
    out = Remote("gs", f"{BUCKET}/{tmp_path.name}")
    distil(*flags(settings, experts=str(out / "experts"), out=str(out / "run"), backend="serial"))
    assert torch.equal(remote_images(out / "run"), images_of(folder))
    main.main(["evaluate", str(out / "run"), "--backend", "serial", "--architectures", "convnet-in"])
    assert names(out / "run" / "evaluations") == ["001-test-convnet-in.json", "001-test-convnet-in.reliability.png"]


@pytest.mark.slow
def test_a_checkpoint_cut_on_its_way_leaves_the_one_before(local, s3, wire):
    """The second of six, on each attempt."""
    settings, folder = local
    out = s3 / "run"
    state = RunDirectory(out).state_path
    wire.cut_at, wire.spared = (b"PUT /" + state.key.encode(), 1500), 1
    process = start("distill", *flags(settings, out=str(out), backend="serial"), **os.environ)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert wire.cuts == ATTEMPTS
    assert "Traceback" not in output
    assert re.fullmatch(
        rf"error: {state} cannot be written \(.*\): check the network, .*; what was there before is whole, and "
        "--resume goes on",
        output.strip().splitlines()[-1],
    ), output
    wire.cut_at = None
    with storage.local(state) as path, safetensors.safe_open(path, "pt") as file:
        assert int(file.metadata()["step"]) == settings.distillation.checkpoint_every
    distil("--out", str(out), "--resume")
    assert torch.equal(remote_images(out), images_of(folder))
