"""Runs that are interrupted, resumed, started twice, or whose disk is full: the bits of an undisturbed one."""

import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from support.runs import ENVIRONMENT, distil, flags, images_of, refused, start, wait_for

from fbpc_ray.distillation.run_directory import RunDirectory


def test_resume_in_two_parts_gives_the_same_bits(finished_run, small, tmp_path):
    """5 steps, then on to 12, with momentum and metrics carried over; the steps before a resume are not repeated."""
    folder = tmp_path / "parts"
    distil(*flags(small, backend="serial", steps=5, out=str(folder)))
    assert not torch.equal(images_of(folder), images_of(finished_run))
    distil("--out", str(folder), "--resume", "--steps", "12")
    assert torch.equal(images_of(folder), images_of(finished_run))
    columns = ["step", "architecture", "expected_x", "expected_u", "map_steps", "gradient_norm"]
    parts, one = (pq.read_table(RunDirectory(f).metrics_path, columns=columns) for f in (folder, finished_run))
    assert parts.equals(one)


def test_a_crash_between_metrics_and_state_repeats_no_row(small, tmp_path):
    """The metrics of steps 1..4 beside the state of step 2, as a kill between the two writes leaves them."""
    folder = tmp_path / "between"
    run = RunDirectory(folder)
    distil(*flags(small, backend="serial", steps=2, out=str(folder)))
    early = run.state_path.read_bytes()
    distil("--out", str(folder), "--resume", "--steps", "4")
    expected = images_of(folder)
    run.state_path.write_bytes(early)
    run.result_path.unlink()
    distil("--out", str(folder), "--resume")
    assert [row["step"] for row in pq.read_table(run.metrics_path).to_pylist()] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(images_of(folder), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_resumable_checkpoint_and_says_how(finished_run, small, tmp_path, number):
    folder = tmp_path / "stopped"
    words = flags(small, backend="serial", steps=12, out=str(folder), checkpoint_every=2)
    process = start("distill", *words)
    wait_for(RunDirectory(folder).state_path, process)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + number, output
    assert f"fbpc distill --out {folder} --resume" in output
    assert "Traceback" not in output
    assert not RunDirectory(folder).result_path.exists()
    distil("--out", str(folder), "--resume")
    assert torch.equal(images_of(folder), images_of(finished_run))


@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_bits(finished_run, small, tmp_path, capsys):
    """With --resume auto, as each attempt of a job: killed amid the run, resumed, left alone once it is complete."""
    folder = tmp_path / "killed"
    changed = flags(small, backend="serial", steps=12, out=str(folder), checkpoint_every=2)
    words = [*changed, "--resume", "auto"]
    process = start("distill", *words)
    wait_for(RunDirectory(folder).state_path, process)
    process.kill()
    process.communicate()
    assert not RunDirectory(folder).result_path.exists()
    distil(*words)
    assert "resumed at step" in capsys.readouterr().out
    assert torch.equal(images_of(folder), images_of(finished_run))
    before = RunDirectory(folder).result_path.stat().st_mtime_ns
    distil(*words)
    assert "this run is complete" in capsys.readouterr().out
    assert RunDirectory(folder).result_path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_processes_do_not_share_a_run(small, tmp_path, capsys):
    """The second ends with one line and leaves the first alone, which may be killed: then the run goes on."""
    folder = tmp_path / "shared"
    words = [*flags(small, backend="serial", steps=500, checkpoint_every=1, out=str(folder))]
    process = start("distill", *words)
    try:
        wait_for(RunDirectory(folder).state_path, process)
        message = refused(capsys, "--out", str(folder), "--resume")
        assert f"another process uses {folder}: wait until it ends, or give another --out" in message
        process.kill()
        assert process.wait() == -signal.SIGKILL
        state = safetensors.torch.load_file(RunDirectory(folder).state_path)
        assert torch.isfinite(state["images"]).all()
    finally:
        process.kill()
        process.communicate()
    with safetensors.safe_open(RunDirectory(folder).state_path, "pt") as file:
        steps = int(file.metadata()["step"])
    distil("--out", str(folder), "--resume", "--steps", str(steps + 1))
    result = RunDirectory(folder).read_result()
    assert result is not None
    assert result["steps"] == steps + 1
    assert not (folder / ".lock").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_last_checkpoint(capsys, small, tmp_path):
    """A learning rate of 1e30 sends the pixels to infinity in a few steps; what was saved before is finite."""
    folder = tmp_path / "exploded"
    message = refused(
        capsys, *flags(small, backend="serial", steps=12, alpha=1e30, checkpoint_every=1, out=str(folder))
    )
    assert "non-finite" in message
    assert "--alpha" in message
    state = safetensors.torch.load_file(RunDirectory(folder).state_path)
    assert torch.isfinite(state["images"]).all()


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(finished_run, small, tmp_path):
    """With files limited to 20 kB the first checkpoint fits and a result does not; later, resume ends as ever."""
    folder = tmp_path / "full"
    words = flags(small, backend="serial", steps=12, out=str(folder), checkpoint_every=1)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192));"
        "from fbpc_ray.commands.main import main; main(sys.argv[1:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, "distill", *words], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
    assert "--resume" in process.stderr
    assert not list(folder.rglob("*.tmp"))
    distil("--out", str(folder), "--resume")
    assert torch.equal(images_of(folder), images_of(finished_run))
