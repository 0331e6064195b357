"""Objects and their errors: names, addresses, credentials, uploads that are cut; real servers on loopback."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from support.errors import refusal
from support.processes import soon
from support.remote_files import ROOT, names, use
from support.runs import silent
from support.stores import BUCKET, Wire

from fbpc_ray import api
from fbpc_ray.commands import main
from fbpc_ray.core import storage
from fbpc_ray.core.config import Config
from fbpc_ray.core.storage import Remote, place
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory

# Names


def test_a_place_is_a_path_or_a_remote():
    assert place("~/x") == Path.home() / "x"
    assert place("runs/a:b") == Path("runs/a:b")
    result = place("s3://bucket//a/b/")
    assert result == Remote("s3", "bucket/a/b")
    assert str(result) == "s3://bucket/a/b"
    assert (result / "c.d.json").with_suffix(".png") == Remote("s3", "bucket/a/b/c.d.png")
    assert (result.name, result.absolute()) == ("b", result)
    assert pickle.loads(pickle.dumps(result)) == result
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
    assert [entry.name for entry in folder.glob("*.txt")] == ["one.txt"]
    one.unlink()
    one.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        one.unlink()
    assert names(folder) == []
    assert folder.exists()


def test_another_process_opens_the_store_by_itself(folder):
    (folder / "a").write_bytes(b"hello")
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).read_text(), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(folder / "a"), capture_output=True)
    assert result.stdout.split() == [b"hello", b"False"], result.stderr


def test_an_upload_that_is_cut_leaves_the_old_object(folder, servers, monkeypatch):
    """Cut in the second of three parts, at each attempt; and with no object there before, none appears."""
    monkeypatch.setattr(storage, "PART", 10 * 2**20)
    wire = Wire(servers[folder.scheme])
    use(monkeypatch, folder.scheme, wire.port)
    old, new = folder / "old", folder / "new"
    old.write_bytes(b"o" * 1000)
    cut = {"s3": (b"partNumber=2", 1_000_000), "gs": (b"content-range: bytes 10485760", 10_000)}
    for target in (old, new):
        wire.cut_at = cut[folder.scheme]
        wire.cuts = 0
        line = refusal(target.write_bytes, b"n" * 30_000_000)
        assert line.startswith(f"{target} cannot be written ("), line
        assert "what was there before is whole: run the same command with --resume" in line
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
    """Its coreset is evaluated where it lies, by the run's path or its own; another folder there is one line."""
    run, source = RunDirectory(folder / "run"), torch.Generator().manual_seed(0)
    pseudocoreset = coreset.Coreset(
        torch.randn(10, 1, 8, 8, generator=source), torch.arange(10), (0.5,), (0.25,), tuple("0123456789")
    )
    run.write_config(Config())
    coreset.save(pseudocoreset, run.coreset_path, {"method": "fbpc"})
    main.main(["export", str(run.folder), "--format", "safetensors", "--out", str(tmp_path / "it.safetensors")])
    assert torch.equal(coreset.load(tmp_path / "it.safetensors").images, pseudocoreset.images)
    evaluate = ["evaluate", "--data", "digits", "--width", "8", "--backend", "serial", "--num-chains", "1",
                "--chain-epochs", "2", "--chain-every", "1", "--coreset"]  # fmt: skip
    for path in (run.coreset_path, run.folder):
        main.main([*evaluate, str(path)])
        assert "convnet-in    given" in capsys.readouterr().out
        loaded = api.load_coreset(str(path), log=silent)
        assert torch.equal(loaded.images, pseudocoreset.images) and loaded.facts["method"] == "fbpc"
    RunDirectory(folder / "begun").write_config(Config())
    for path, message in (
        (folder / "run/coreset", "from an object store a run or a single file can be read"),
        (folder / "begun", "begun/coreset/coreset.safetensors: coreset not found; if the run has not ended, resume it"),
    ):
        with pytest.raises(SystemExit):
            main.main([*evaluate, str(path)])
        assert message in capsys.readouterr().err


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
        assert f"{scheme}://not-there: bucket not found" in leaves(capsys, *words)


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
