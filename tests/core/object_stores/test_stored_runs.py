"""Runs in object stores: stopped, resumed, cut off; equal to those on a disk."""

import json
import os
import re
import shutil
import signal
import tempfile

import pytest
import safetensors
import torch
from support.processes import processes_naming, soon
from support.remote_files import ATTEMPTS, names
from support.runs import distil, flags, images_of, start
from support.stores import BUCKET

from fbpc_ray.commands import main
from fbpc_ray.core import storage
from fbpc_ray.core.storage import Remote
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory

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
    ray = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    process = start("distill", *words, **os.environ, RAY_TMPDIR=ray)
    assert soon(lambda: process.poll() is not None or RunDirectory(out).state_path.exists())
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    left = [] if soon(lambda: not processes_naming(ray)) else processes_naming(ray)
    shutil.rmtree(ray, ignore_errors=True)
    assert process.returncode == 143, output
    assert not left, "processes of the cluster"
    assert f"fbpc distill --out {out} --resume --experts {s3 / 'experts'}" in output
    assert not RunDirectory(out).result_path.exists()

    monkeypatch.setenv("FBPC_HOME", str(tmp_path / "home"))
    distil("--out", str(out), "--resume", "--experts", str(s3 / "experts"), "--backend", "serial", "--tracking")
    assert torch.equal(remote_images(out), images_of(folder))
    remote, local_scores = (
        json.loads(RunDirectory(place_of_run).result_path.read_text())["coresets"] for place_of_run in (out, folder)
    )
    assert remote == local_scores
    assert names(out) == sorted(
        [*(place_of_run.name for place_of_run in folder.iterdir() if place_of_run.is_file()), "mlflow.json"]
    )
    artifacts = {path.name for path in (tmp_path / "home" / "mlartifacts").rglob("*.*")}
    assert {"coreset.safetensors", "coreset.png", "result.json", "metrics.parquet"} <= artifacts
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
        rf"error: {state} cannot be written \(.*\): check the network, .*; what was there before is whole: run "
        "the same command with --resume",
        output.strip().splitlines()[-1],
    ), output
    wire.cut_at = None
    with storage.local(state) as path, safetensors.safe_open(path, "pt") as file:
        assert int(file.metadata()["step"]) == settings.distillation.checkpoint_every
    distil("--out", str(out), "--resume")
    assert torch.equal(remote_images(out), images_of(folder))
