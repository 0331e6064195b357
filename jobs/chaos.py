"""Kill and freeze random workers and nodes while digits are distilled on several local nodes.

    python jobs/chaos.py --steps 600 --seed 0 --json benchmarks/results/chaos.json

--seed draws the targets and the steps between them. The exit status is 0 if the coreset equals that of an undisturbed
serial run to the bit, all CPUs and processes were freed, and neither the object store nor the driver grew; else 1. All
runs on this machine, in a temporary folder.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of its own, on loopback; read as Ray is imported

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.processes import all_cpus_free, gradient_workers, soon

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import preset
from fbpc_ray.core.provenance import capture
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial

STORE = 80_000_000
WAIT = 60.0
"""Seconds within which all CPUs and processes must be freed."""
SMALL: dict[str, Any] = {
    "architectures": ("convnet-in", "convnet-bn", "convnet-gn"), "width": 8, "expert_count": 2, "expert_epochs": 3,
    "start_epoch": 1, "gamma": 0.5, "map_lr": 0.02, "map_max_steps": 30, "alpha": 1.0, "posterior_steps": 4,
    "real_batch_size": 32, "mc_samples": 5, "checkpoint_every": 1000, "tracking": False, "threads": 1,
    "step_deadline": 10.0, "trajectory_cache_gb": 0.0,
}  # fmt: skip
"""Small steps, so that many fit into minutes; every part of a step is in them."""
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 10,
}  # fmt: skip
MAY_GROW = 0.10
"""Allowed growth of the driver's memory and of the object store, from the second fifth of the steps to the last."""


@dataclass(frozen=True)
class Arguments:
    """Kill and freeze workers and nodes at random, and compare the coreset with an undisturbed run's."""

    steps: int = 100
    """Steps of the distillation."""
    seed: int = 0
    """Seed of the targets and the times."""
    nodes: int = 3
    """Local nodes of one CPU each."""
    every: int = 12
    """Mean steps between two hits; 0: none."""
    json: str = ""
    """File that gets the report, too."""


class Chaos:
    """Kills or freezes a random worker or node after random steps, and replaces a killed node."""

    def __init__(self, cluster: Any, every: int, seed: int):
        self.cluster, self.every, self.random = cluster, every, random.Random(seed)
        self.hits: Counter[str] = Counter()
        self.frozen: list[int] = []
        self.nodes = [self._add()]

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def fill(self, count: int) -> None:
        self.nodes += [self._add() for _ in range(count - len(self.nodes))]

    def maybe(self) -> None:
        if not self.every or self.random.random() >= 1 / self.every:
            return
        kind = self.random.choices(["worker killed", "worker frozen", "node killed"], [6, 2, 2])[0]
        node = self.random.choice(self.nodes)
        raylet = node.all_processes["raylet"][0].process.pid
        if kind == "node killed":
            os.kill(raylet, signal.SIGKILL)
            self.nodes[self.nodes.index(node)] = self._add()
        else:
            workers = gradient_workers(raylet)
            if not workers:
                return
            pid = self.random.choice(workers)
            os.kill(pid, signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP)
            self.frozen += [pid] if kind == "worker frozen" else []
        self.hits[kind] += 1


def chaos(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/chaos.py", about=__doc__)
    folder = Path(tempfile.mkdtemp(prefix="fr", dir="/tmp"))
    os.environ["RAY_TMPDIR"] = str(folder / "r")
    try:
        from fbpc_ray.execution.ray.connection import on_loopback

        with on_loopback():
            measurements = soak(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(measurements, indent=2))
    if args.json:
        files.write_text(Path(args.json).absolute(), json.dumps(measurements, indent=2) + "\n")
    if not all(measurements["holds"].values()):
        sys.exit(1)


def soak(args: Arguments, folder: Path) -> dict[str, Any]:
    """Distil twice, with hits and without; return the hits and the checks."""
    import ray
    from ray.cluster_utils import Cluster

    from fbpc_ray.execution.ray.ray_backend import RayBackend

    config = preset("digits").updated(**SMALL, steps=args.steps, experts=str(folder / "experts"))
    dataset = session.load_data(config, print)
    serial = Serial("cpu", Interruption())
    session.open_session(config, print, dataset).train_experts(serial, print)
    expected, alone = distil(config, dataset, serial, folder / "serial", lambda: None)

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        attacker = Chaos(cluster, args.every, args.seed)
        attacker.fill(args.nodes)
        backend = RayBackend(config.workers, Interruption(), print)
        provenance = capture(backend.describe())
        memory, store = [], []

        def after_step() -> None:
            memory.append(_resident())
            store.append(_store_used(cluster))
            attacker.maybe()

        images, seconds = distil(config, dataset, backend, folder / "ray", after_step)
        freed = soon(all_cpus_free, WAIT)
        raylets = [node.all_processes["raylet"][0].process.pid for node in attacker.nodes]
        gone = soon(lambda: not any(gradient_workers(raylet) for raylet in raylets), WAIT)
        gone = gone and soon(lambda: not any(_alive(pid) for pid in attacker.frozen), WAIT)
    finally:
        ray.shutdown()
        cluster.shutdown()
    growth = {name: _growth(values) for name, values in (("driver", memory), ("object store", store))}
    return {
        "steps": args.steps, "seed": args.seed, "nodes": args.nodes, "hits": dict(attacker.hits),
        "seconds": round(seconds, 1), "seconds_serial": round(alone, 1),
        "driver_bytes": [memory[0], memory[-1]], "object_store_bytes": [min(store), max(store)],
        "growth": growth,
        "holds": {
            "equal to the bit": bool(torch.equal(images, expected)),
            "all CPUs free": freed,
            "no worker left": gone,
            "memory flat": max(growth.values()) <= MAY_GROW,
        },
        **provenance._asdict(),
    }  # fmt: skip


def distil(
    config: Config, dataset: Dataset, backend: Backend, folder: Path, after_step: Any
) -> tuple[torch.Tensor, float]:
    """Return the images after all steps, and the seconds of each step."""
    opened = session.open_session(config, print, dataset)
    first = opened.initial[0]
    checkpointer = loop.Checkpointer(RunDirectory(folder), first, [], config.distillation)
    began = time.perf_counter()
    try:
        steps = opened.steps(first, backend)
        state = loop.follow(steps, checkpointer, [lambda step: after_step()], Interruption())
    finally:
        backend.stop_workers()
    return state.images, time.perf_counter() - began


def _growth(values: list[int]) -> float:
    """Return the growth of the mean from the second fifth of the values to the last."""
    fifth = max(1, len(values) // 5)
    early, late = values[fifth : 2 * fifth], values[-fifth:]
    return round(sum(late) / len(late) / max(1.0, sum(early) / len(early)) - 1, 4) if early else 0.0


def _resident() -> int:
    """Return the bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _store_used(cluster: Any) -> int:
    """Return the bytes in the object store of the driver's node, which gets the images of each step."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = cluster.head_node
    reply = get_memory_info_reply(
        get_state_from_address(cluster.address), address.node_ip_address, address.node_manager_port
    )
    return reply.store_stats.object_store_bytes_used


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main.run(chaos, sys.argv[1:])
