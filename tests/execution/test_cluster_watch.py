"""When a cluster counts as dead, and that what it leaves behind ends: with a fake clock, and with real processes."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.processes import alive, kill, soon

from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.ray.cluster_watch import PATIENCE, ClusterWatch, Liveness
from fbpc_ray.execution.ray.reaper import Reaper

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_dead_process_is_named_at_once():
    dead = ""
    liveness = Liveness(lambda: dead, lambda: True, lambda: 0.0)
    assert liveness.fault() == ""
    dead = "raylet"
    assert (
        liveness.fault() == "Ray's process raylet ended (killed, or out of memory): run the same command with --resume"
    )


def test_a_head_that_is_silent_for_a_while_is_no_dead_head():
    now, answers = 0.0, True
    liveness = Liveness(lambda: "", lambda: answers, lambda: now)
    now = 100.0
    assert liveness.fault() == ""
    answers, now = False, 100.0 + PATIENCE
    assert liveness.fault() == ""
    answers, now = True, 101.0 + PATIENCE
    assert liveness.fault() == ""
    answers, now = False, 100.0 + 2 * PATIENCE
    assert liveness.fault() == ""  # it answered meanwhile
    now = 102.0 + 2 * PATIENCE
    assert "has not answered for 31 s" in liveness.fault()


def test_the_driver_raises_what_the_thread_saw():
    dead = ""
    watch = ClusterWatch(Liveness(lambda: dead, lambda: True), connected=lambda: True)
    try:
        watch.check()
        dead = "gcs_server"
        assert soon(lambda: bool(watch.message), 10)
        with pytest.raises(UserError, match="gcs_server ended"):
            watch.check()
    finally:
        watch.close()


def test_a_process_that_disconnected_watches_nothing():
    """After ray.shutdown the processes of its own cluster end; that ends nobody else."""
    watch = ClusterWatch(Liveness(lambda: "raylet", lambda: True), connected=lambda: False)
    watch._thread.join(10)
    watch.check()
    watch.close()


PARENT = f"""
import subprocess, time
print(subprocess.Popen({SLEEP}).pid, flush=True)
time.sleep(60)
"""


def family() -> tuple[subprocess.Popen[str], int]:
    """Start a process that has a child; return it and the child's pid."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout as output:
        return parent, int(output.readline())


def node_of(*processes: subprocess.Popen) -> SimpleNamespace:
    """Ray's record of the processes that it started."""
    return SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=pid) for pid in processes]})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reap_ends_processes_and_their_children():
    parent, child = family()
    other = subprocess.Popen(SLEEP)
    try:
        reaper = Reaper(node_of(parent))
        kill(parent.pid)
        parent.wait()
        assert alive(child)
        reaper.reap()
        assert soon(lambda: not alive(child), 10)
        assert alive(other.pid)
        reaper.dismiss()
    finally:
        other.kill()
        other.wait()
        kill(child)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", ["killed", "dismissed"])
def test_a_killed_driver_takes_its_cluster_along(ending):
    process = subprocess.Popen(SLEEP)
    driver = f"""
import time
from types import SimpleNamespace
from fbpc_ray.execution.ray.reaper import Reaper
info = SimpleNamespace(process=SimpleNamespace(pid={process.pid}))
reaper = Reaper(SimpleNamespace(all_processes={{"raylet": [info]}}))
if {ending == "dismissed"}:
    reaper.dismiss()
print("ready", flush=True)
time.sleep(60)
"""
    driver_process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    try:
        assert driver_process.stdout
        with driver_process.stdout as output:
            assert output.readline() == "ready\n"
        kill(driver_process.pid)
        assert soon(lambda: process.poll() is not None, 4) == (ending == "killed")
    finally:
        for child in (process, driver_process):
            child.kill()
            child.wait()
