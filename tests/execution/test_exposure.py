"""Nothing listens beyond this machine unless asked; by the kernel's own list of sockets, during real runs."""

import shutil
import signal
import tempfile

import pytest
from support.processes import descendants, listening, processes_naming, soon
from support.runs import flags, start, wait_for

from fbpc_ray.distillation.run_directory import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_cluster_started_here_listens_on_loopback_alone(small, tmp_path, monkeypatch):
    """--address empty and no cluster about: of the driver, Ray's own processes, and the workers. SIGTERM ends them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, ray = tmp_path / "run", tempfile.mkdtemp(prefix="fr", dir="/tmp")
    words = flags(small, backend="ray", address="", steps=2000, out=str(folder), checkpoint_every=1)
    process = start("distill", *words, RAY_TMPDIR=ray)
    try:
        wait_for(RunDirectory(folder).state_path, process)
        titles = {process.pid: "driver", **descendants(process.pid)}
        result = listening(titles)
        who = {titles[pid] for pid, _, _ in result}
        for part in ("driver", "gcs_server", "raylet", "ray::Worker"):
            assert any(part in title for title in who), f"{part} listens nowhere: is this still how Ray works?"
        assert not [(titles[pid][:60], str(ip), port) for pid, ip, port in result if not ip.is_loopback]
    finally:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=300)[0]
        ended = soon(lambda: not processes_naming(ray))
        shutil.rmtree(ray, ignore_errors=True)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert ended
