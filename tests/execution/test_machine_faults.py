"""What the machine and the network do to a run: memory that ends, a node that is cut off. Drivers in processes of their
own, on clusters of their own; each run ends with the bits of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import alive, descendants, free_port, gradient_workers, kill, soon
from support.runs import ENVIRONMENT, distil, flags, images_of

from fbpc_ray.distillation.run_directory import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 100


@pytest.fixture(scope="module")
def config(small):
    return small.updated(steps=STEPS, checkpoint_every=5, backend="ray", device="cpu")


@pytest.fixture(scope="module")
def undisturbed_run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine") / "whole"
    distil(*flags(config, backend="serial", out=str(folder)))
    return folder


@pytest.fixture
def ray_folder():
    folder = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """`fbpc distill` in a process of its own, with what it says in a file."""

    def __init__(self, folder: Path, words: list[str], **environment: str):
        self.output, self.run = folder / "output.txt", RunDirectory(folder / "run")
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fbpc_ray", "distill", *words, "--out", str(self.run.folder)],
                env={**ENVIRONMENT, **environment}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def has_printed(self, text: str) -> bool:
        return text in self.output.read_text()

    def wait_for_a_checkpoint(self) -> None:
        assert soon(lambda: self.run.state_path.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.output.read_text()

    def ends_with_the_bits_of(self, undisturbed_run: Path) -> None:
        assert self.process.wait(300) == 0, self.output.read_text()
        assert torch.equal(images_of(self.run.folder), images_of(undisturbed_run))


def stop(process: subprocess.Popen) -> None:
    """A process that a test started, and all below it."""
    for pid in [process.pid, *descendants(process.pid)]:
        kill(pid)
    process.wait()


def memory() -> tuple[float, float]:
    """Bytes that this machine has and uses, as Ray counts them."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (1024.0 * int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return total, total - available


HOG = """
import sys, time
held, end = [], time.monotonic() + 300
while time.monotonic() < end:
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    total, available = (1024 * int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    missing = int(min(float(sys.argv[1]) - (total - available), 2e9))
    if missing > 0:
        held.append(b"1" * missing)
    time.sleep(0.05)
"""
"""A process that takes what is left, and what others give back meanwhile."""


def test_workers_killed_for_memory_are_replaced(config, undisturbed_run, tmp_path, ray_folder):
    """Ray's memory monitor kills our workers as another process takes what is left; it ends, and so does the run.

    The driver is stopped until a worker is gone: else it may be at its chains by then, whose tasks Ray itself repeats.
    """
    from ray._common.utils import get_system_memory

    total, used = memory()
    if get_system_memory() < 0.99 * total:
        pytest.skip("a control group limits the memory: what Ray counts is not that of the machine")
    limit = used + 7e9  # the run takes 3, and the tests beside it a cluster's 3 more or less from minute to minute
    if limit > 0.9 * total:
        pytest.skip(f"less than 7 GB to spare: {used / 1e9:.1f} of {total / 1e9:.1f} GB are in use")
    driver = Driver(
        tmp_path, flags(config, address="local"), RAY_TMPDIR=ray_folder, RAY_memory_monitor_refresh_ms="100",
        RAY_memory_usage_threshold=f"{limit / total:.4f}",
    )  # fmt: skip
    hog = None
    try:
        driver.wait_for_a_checkpoint()
        workers = gradient_workers(driver.process.pid)
        kill(driver.process.pid, signal.SIGSTOP)
        hog = subprocess.Popen([sys.executable, "-c", HOG, str(limit + 3e8)])
        assert soon(lambda: not all(map(alive, workers))), driver.output.read_text()
        stop(hog)
        kill(driver.process.pid, signal.SIGCONT)
        driver.ends_with_the_bits_of(undisturbed_run)
        assert driver.has_printed("was lost"), driver.output.read_text()
        assert driver.has_printed("memory"), driver.output.read_text()  # the line says why
    finally:
        for process in (driver.process, hog):
            if process:
                stop(process)


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_dead_cluster_is_one_line_and_leaves_nothing(config, tmp_path, ray_folder, name):
    """kill -9 of one of the two processes that Ray consists of. For the driver it is as kill -9: tests/faults/."""
    driver = Driver(tmp_path, flags(config, address="local"), RAY_TMPDIR=ray_folder)
    processes: dict[int, str] = {}
    try:
        driver.wait_for_a_checkpoint()
        processes = descendants(driver.process.pid)
        kill(next(pid for pid, title in processes.items() if f"/{name} " in title))
        assert driver.process.wait(30) == 1, driver.output.read_text()
        assert soon(lambda: f"error: Ray's process {name} ended" in driver.output.read_text(), 10)
        text = driver.output.read_text()
        assert text.count("error: ") == 1
        assert "Traceback" not in text
        assert soon(lambda: not any(map(alive, processes)), 10)
    finally:
        stop(driver.process)
        for pid in processes:
            kill(pid)


def test_a_short_soak_passes_its_own_checks(tmp_path):
    """jobs/chaos.py, short: workers and nodes are hit, and the coreset is that of an undisturbed run."""
    report, job = tmp_path / "chaos.json", Path(__file__).parents[2] / "jobs" / "chaos.py"
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(job), "--steps", "30", "--every", "5", "--seed", "1", "--json", str(report)],
            env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        assert process.wait(500) == 0, (tmp_path / "output.txt").read_text()
    finally:
        stop(process)
    result = json.loads(report.read_text())
    assert sum(result["hits"].values()) >= 1
    assert result["holds"] == {
        "equal to the bit": True, "all CPUs free": True, "no worker left": True, "memory flat": True,
    }  # fmt: skip


def test_a_store_and_a_disk_without_room_are_one_line(config, tmp_path, ray_folder):
    """A data set larger than Ray's object store, and a disk that Ray may not use."""
    address, disk = f"127.0.0.1:{free_port()}", {"RAY_local_fs_capacity_threshold": "0.0001"}
    images = np.arange(120_000 * 32 * 32).astype(np.uint8).reshape(-1, 1, 32, 32)
    labels = np.arange(len(images)) % 10
    np.savez(tmp_path / "large.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    head = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={address.split(':')[1]}",
        "--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats",
        f"--temp-dir={ray_folder}", "--object-store-memory=80000000", f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    processes = []
    try:
        with (tmp_path / "ray.txt").open("w") as output:
            processes.append(
                subprocess.Popen(
                    head, env={**ENVIRONMENT, **disk}, start_new_session=True, stdout=output, stderr=output
                )
            )
        assert soon(lambda: "Node status" in status(head[0], address))  # it answers
        experts = str(tmp_path / "experts")
        driver = Driver(tmp_path, flags(config, address=address, data=f"npz:{tmp_path}/large.npz", experts=experts))
        processes.append(driver.process)
        assert driver.process.wait(300) == 1, driver.output.read_text()
        assert driver.has_printed("error: Ray's object store is full"), driver.output.read_text()
        assert not driver.has_printed("Traceback")
        assert not list((tmp_path / "experts").rglob("*.arrow"))
    finally:
        for process in reversed(processes):
            stop(process)


def titles(node: subprocess.Popen) -> list[str]:
    """Those of gradient workers on a node: what each does, if it does anything."""
    below = (title.split() or [""] for title in descendants(node.pid).values())
    return [words[0] for words in below if words[0].startswith("ray::Worker")]


def status(program: str, address: str) -> str:
    """What `ray status` says of a cluster."""
    words = [program, "status", f"--address={address}"]
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True).stdout


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def network():
    """A network namespace as another machine: (its name, our address, its address, the link to cut)."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command `ip` (iproute2)")
    number = os.getpid() % 200 + 20
    name, here, there = f"fbpc{number}", f"10.213.{number}.1", f"10.213.{number}.2"
    try:
        ip("netns", "add", name)
        ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}n", "netns", name)
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    ip("addr", "add", f"{here}/24", "dev", f"{name}h")
    ip("link", "set", f"{name}h", "up")
    for words in (["addr", "add", f"{there}/24", "dev", f"{name}n"], ["link", "set", f"{name}n", "up"],
                  ["link", "set", "lo", "up"]):  # fmt: skip
        ip("-n", name, *words)
    yield name, here, there, f"{name}h"
    ip("netns", "del", name)  # takes the link with it


def test_a_node_that_is_cut_off_costs_no_bit(config, undisturbed_run, tmp_path, ray_folder, network):
    """A head, a node beside it and one on "another machine"; the link to that one goes down amid the run."""
    name, here, there, link = network
    program, port = str(Path(sys.executable).with_name("ray")), free_port()
    common = ["--block", "--disable-usage-stats", "--object-store-memory=100000000"]
    notice = (
        '{"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,'
        ' "health_check_failure_threshold": 20}'  # a node of a busy machine may be deaf for seconds
    )
    head = [
        "start", "--head", f"--port={port}", f"--node-ip-address={here}", "--num-cpus=0", "--include-dashboard=false",
        f"--system-config={notice}", f"--temp-dir={ray_folder}", f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    joins = ["start", f"--address={here}:{port}", "--num-cpus=1"]
    processes: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        with (tmp_path / f"node-{len(processes)}.txt").open("w") as output:
            processes.append(
                subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=output, stderr=output)
            )

    try:
        start(program, *head, *common)
        assert soon(lambda: "Node status" in status(program, f"{here}:{port}"))  # it answers
        start(program, *joins, f"--node-ip-address={here}", *common)
        assert soon(lambda: "/1.0 CPU" in status(program, f"{here}:{port}"))
        has_joined = False
        for _ in range(3):  # in a namespace without a route Ray's node now and then finds its head too late, and ends
            far = ("ip", "netns", "exec", name, program, *joins, f"--node-ip-address={there}", *common)
            start(*far)
            if has_joined := soon(lambda: "/2.0 CPU" in status(program, f"{here}:{port}"), 60):
                break
            stop(processes.pop())
        if not has_joined:
            output = (tmp_path / f"node-{len(processes)}.txt").read_text().strip().splitlines()
            pytest.skip(f"Ray's node did not join from the namespace: {(output or ['it printed nothing'])[-1]}")
        driver = Driver(tmp_path, flags(config, address=f"{here}:{port}"))
        processes.append(driver.process)
        driver.wait_for_a_checkpoint()
        near = gradient_workers(processes[1].pid)
        for pid in near:
            kill(pid, signal.SIGSTOP)  # or it might end the run before the other stands
        assert soon(lambda: any(title != "ray::Worker.__init__" for title in titles(processes[2])))
        for pid in near:
            kill(pid, signal.SIGCONT)
        assert soon(lambda: "ray::Worker.gradient" in titles(processes[2]) or driver.process.poll() is not None)
        ip("link", "set", link, "down")
        assert soon(lambda: driver.has_printed("was lost") or driver.process.poll() is not None)
        driver.ends_with_the_bits_of(undisturbed_run)
        assert driver.has_printed("was lost"), driver.output.read_text()
    finally:
        for process in reversed(processes):
            stop(process)
