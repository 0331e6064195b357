"""When a cluster counts as dead, and that what it leaves behind ends: with a fake clock, and with real processes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from support.processes import alive, kill, soon

from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.ray import cluster_watch
from fbpc_ray.execution.ray.cluster_watch import PATIENCE, ClusterWatch, Liveness
from fbpc_ray.execution.ray.reaper import Reaper

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


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
        assert soon(lambda: bool(watch.message))
        with pytest.raises(UserError, match="gcs_server ended"):
            watch.check()
    finally:
        watch.close()


def test_a_process_that_disconnected_watches_nothing():
    """After ray.shutdown the processes of its own cluster end; that ends nobody else."""
    watch = ClusterWatch(Liveness(lambda: "raylet", lambda: True), connected=lambda: False)
    watch._thread.join(300)
    watch.check()
    watch.close()


@pytest.fixture
def exits(monkeypatch):
    """The statuses with which the watch ends this process, after no grace."""
    statuses: list[int] = []
    monkeypatch.setattr(cluster_watch, "GRACE", 0.2)
    monkeypatch.setattr(cluster_watch, "os", SimpleNamespace(_exit=statuses.append))
    return statuses


def test_a_driver_that_does_not_come_to_check_is_ended(exits, capsys):
    watch = ClusterWatch(Liveness(lambda: "raylet", lambda: True), connected=lambda: True)
    watch._thread.join(300)
    watch.close()
    assert exits == [1]
    assert capsys.readouterr().err.startswith("error: Ray's process raylet ended")


def test_a_driver_that_has_closed_is_not_ended(exits, capsys, monkeypatch):
    """Another exception of the dead cluster came first: a notebook, or the end of an MLflow run, goes on."""
    monkeypatch.setattr(cluster_watch, "GRACE", 30.0)  # a busy machine brings this thread to `close` late
    watch = ClusterWatch(Liveness(lambda: "raylet", lambda: True), connected=lambda: True)
    assert soon(lambda: bool(watch.message))
    watch.close()
    watch._thread.join(300)
    assert exits == []
    assert capsys.readouterr().err == ""


def test_a_look_that_ends_after_the_close_finds_nothing(exits):
    """The processes of its own cluster end by ray.shutdown, while the thread looks at them."""
    looks, closed = threading.Event(), threading.Event()

    def dead_process():
        looks.set()
        return "raylet" if closed.wait(300) else ""

    watch = ClusterWatch(Liveness(dead_process, lambda: True), connected=lambda: True)
    assert looks.wait(300)
    watch.close()
    closed.set()
    watch._thread.join(300)
    assert (watch.message, exits) == ("", [])


CLUSTER = """
import os, subprocess, sys, time
session = f"{sys.argv[1]}/session_{time.strftime('%Y-%m-%d_%H-%M-%S_0')}_{sys.argv[2]}/logs"
os.makedirs(session)
with open(f"{session}/agent.out", "w") as log:
    agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=log)
print(agent.pid, flush=True)
time.sleep(600)
"""
"""A node manager whose agent has its log in the session of a driver, and nothing else that tells whose it is."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reap_ends_the_processes_of_the_session_and_no_other(tmp_path):
    """Also one whose parent is gone, as an agent of a killed node manager; not who reads its log, or is of another
    process or of an earlier one with the same pid."""
    reaper = Reaper()
    parent = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(tmp_path), str(os.getpid())], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    agent, others = int(parent.stdout.readline()), []
    try:
        log = next(tmp_path.glob("session_*/logs/agent.out"))
        with log.open() as reading:
            others.append(subprocess.Popen(SLEEP, stdin=reading))
        for name in (f"9999-11-29_1{os.getpid()}", f"2026-11-28_23-59-59_0_{os.getpid()}"):
            elsewhere = tmp_path / f"session_{name}"
            elsewhere.mkdir()
            with (elsewhere / "agent.out").open("w") as writing:
                others.append(subprocess.Popen(SLEEP, stdout=writing))
        kill(parent.pid)
        parent.wait()
        assert alive(agent)
        reaper.reap()
        assert soon(lambda: not alive(agent))
        reaper.dismiss()
        assert all(alive(other.pid) for other in others)
    finally:
        for process in (parent, *others):
            process.kill()
            process.communicate()
        kill(agent)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", ["killed", "dismissed"])
def test_a_killed_driver_takes_its_cluster_along(ending, tmp_path):
    driver = f"""
import os, subprocess, sys, time
from fbpc_ray.execution.ray.reaper import Reaper
reaper = Reaper()
cluster = subprocess.Popen([sys.executable, "-c", {CLUSTER!r}, {str(tmp_path)!r}, str(os.getpid())])
if {ending == "dismissed"}:
    reaper.dismiss()
time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            assert process.stdout
            agent = int(process.stdout.readline())
            kill(process.pid)
            patience = 300 if ending == "killed" else 4
            assert soon(lambda: not alive(agent), patience) == (ending == "killed")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


SAYS = """
import os, subprocess, sys, time
from fbpc_ray.execution.ray.reaper import Reaper
session = f"{sys.argv[1]}/session_{time.strftime('%Y-%m-%d_%H-%M-%S_0')}_{os.getpid()}"
os.makedirs(session)
with open(f"{session}/gcs_server.out", "w") as log:
    subprocess.Popen(["sleep", "60"], executable=sys.argv[2], stdout=log)
reaper = Reaper()
reaper.explain(sys.argv[4])
if sys.argv[3] == "dismissed":
    reaper.dismiss()
os._exit(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "ending, message, said",
    [
        ("silent", "error: {name} ended", "error: raylet ended\n"),
        ("silent", "error: seen", "error: seen\n"),
        ("dismissed", "error: seen", ""),
    ],
)
def test_where_ray_ends_the_driver_without_a_word_the_reaper_says_why(ending, message, said, tmp_path):
    """The head still runs and the node manager does not, or the driver saw it; nothing is said twice."""
    head = tmp_path / "gcs_server"
    shutil.copy(shutil.which("sleep") or "", head)
    words = [sys.executable, "-c", SAYS, str(tmp_path), str(head), ending, message]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr
    try:
        text = process.stderr.readline() if said else ""
        assert (text, process.wait()) == (said, 1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stderr.read() == ""
        process.stderr.close()
