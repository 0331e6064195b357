"""Nothing listens beyond this machine unless asked; by the kernel's own list of sockets, during real runs."""

import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request

import pytest
from conftest import flags
from processes import descendants, free_port, kill, listening
from test_run import ENVIRONMENT, start, wait_for

from fbpc_ray.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_cluster_started_here_listens_on_loopback_alone(small, tmp_path, monkeypatch):
    """--address empty and no cluster about: of the driver, Ray's own processes, and the workers."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, ray = tmp_path / "run", tempfile.mkdtemp(prefix="fr", dir="/tmp")
    words = flags(small, backend="ray", address="", steps=2000, out=str(folder), checkpoint_every=1)
    process = start("distill", *words, RAY_TMPDIR=ray)
    try:
        wait_for(Run(folder).state_path, process)
        titles = {process.pid: "driver", **descendants(process.pid)}
        found = listening(titles)
        who = {titles[pid] for pid, _, _ in found}
        for part in ("driver", "gcs_server", "raylet", "ray::Worker"):
            assert any(part in title for title in who), f"{part} listens nowhere: is this still how Ray works?"
        assert not [(titles[pid][:60], str(ip), port) for pid, ip, port in found if not ip.is_loopback]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        shutil.rmtree(ray, ignore_errors=True)


def test_the_command_that_opens_mlflow_listens_on_loopback_alone(tmp_path):
    """The very command that a run prints, but for the port; whatever MLFLOW_HOST says."""
    from fbpc_ray.tracking import ui_command

    command, port = ui_command(f"sqlite:///{tmp_path}/mlflow.db"), free_port()
    assert command.endswith(" --port 5000")
    process = subprocess.Popen(
        f"exec env {command.removesuffix('5000')}{port}", shell=True, env={**ENVIRONMENT, "MLFLOW_HOST": "0.0.0.0"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 90
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        found = listening([process.pid, *descendants(process.pid)])
        assert port in {each for _, _, each in found}
        assert not [(str(ip), each) for _, ip, each in found if not ip.is_loopback]
    finally:
        for pid in (*descendants(process.pid), process.pid):
            kill(pid)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
