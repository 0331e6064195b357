"""When a cluster counts as dead, and that what it leaves behind ends: with a fake clock, and with real processes."""

import os
import subprocess
import sys

import pytest
from support.processes import alive, kill, soon

from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.ray.cluster_watch import PATIENCE, ClusterWatch, Liveness
from fbpc_ray.execution.ray.reaper import VARIABLE, Reaper

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
import subprocess, sys, time
sys.stdin.readline()
print(subprocess.Popen({SLEEP}).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reap_ends_marked_processes_and_those_that_they_start_later():
    """Also a grandchild whose parent is gone, as an agent of a killed node manager; no other process."""
    reaper = Reaper()
    with reaper.marking():
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    other = subprocess.Popen(SLEEP)
    child = 0
    try:
        assert VARIABLE not in os.environ
        output, _ = parent.stdout, print(file=parent.stdin, flush=True)
        assert output
        child = int(output.readline())
        kill(parent.pid)
        parent.wait()
        assert alive(child)
        reaper.reap()
        assert soon(lambda: not alive(child), 10)
        assert alive(other.pid)
        reaper.dismiss()
        assert alive(other.pid)
    finally:
        for process in (parent, other):
            process.kill()
            process.communicate()
        if child:
            kill(child)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", ["killed", "dismissed"])
def test_a_killed_driver_takes_its_cluster_along(ending):
    driver = f"""
import subprocess, time
from fbpc_ray.execution.ray.reaper import Reaper
reaper = Reaper()
with reaper.marking():
    process = subprocess.Popen({SLEEP})
if {ending == "dismissed"}:
    reaper.dismiss()
print(process.pid, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        assert process.stdout
        child = int(process.stdout.readline())
        kill(process.pid)
        assert soon(lambda: not alive(child), 4) == (ending == "killed")
    finally:
        process.kill()
        process.communicate()
        if child:
            kill(child)
