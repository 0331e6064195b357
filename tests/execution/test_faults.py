"""Nodes of a real cluster that die or join, and an object store that is full, during a run.

Each run ends with the bits of the undisturbed one and gives back all that it held. What the driver decides about
hanging workers, stragglers, missing nodes and expert sides is in test_scheduling, test_worker_pool and
test_gradient_workers.
"""

import logging
import os
import shutil
import signal
import tempfile
import threading

import numpy as np
import pytest
from support.processes import alive, all_cpus_free, gradient_workers, kill, soon
from support.runs import assert_same, run_on

from fbpc_ray.core.config import Workers
from fbpc_ray.core.signals import Interruption
from fbpc_ray.execution.serial import Serial

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 15,
}  # fmt: skip
"""A node that is gone is noticed after three seconds; one that is deaf after eighteen, since one of a busy machine may
be so for several."""
STORE = 80_000_000


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, on which the driver is; each test adds the nodes that it needs, and takes them away."""
    import ray
    from ray.cluster_utils import Cluster

    folder, before = tempfile.mkdtemp(prefix="fr", dir="/tmp"), os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    local_cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE,
        },
    )  # fmt: skip
    ray.init(address=local_cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield local_cluster
    ray.shutdown()
    local_cluster.shutdown()
    os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def add(cluster):
    """Adds a node of one CPU (or as asked); all are removed in the end."""
    import ray

    added = []

    def node(cpus: float = 1):
        added.append(cluster.add_node(num_cpus=cpus, object_store_memory=STORE))
        return added[-1]

    yield node
    for added_node in added:
        if added_node in cluster.worker_nodes:
            kill(raylet(added_node), signal.SIGCONT)
            cluster.remove_node(added_node, allow_graceful=False)
    assert soon(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def backend_on(cluster):
    """A backend on the running cluster, and the lines that it logs."""
    from fbpc_ray.execution.ray.ray_backend import RayBackend

    lines: list[str] = []
    return RayBackend(Workers(device="cpu"), Interruption(), lines.append), lines


def pool_of(backend):
    assert backend.workers is not None
    return backend.workers.pool


@pytest.fixture(scope="module")
def config(small):
    return small.updated(steps=12, checkpoint_every=3)


@pytest.fixture(scope="module")
def expected(config, digits, tmp_path_factory):
    return run_on(Serial("cpu", Interruption()), config, digits, tmp_path_factory.mktemp("serial"))


def at(step: int, act, backend, took_effect=lambda: True):
    """An `on_step` that acts once, a moment after a step: amid the next one. All workers are at work by then, and the
    run, whose steps may take no time at all, goes on past the next one only when that has had its effect."""
    timer = threading.Timer(0.02, act)

    def on_step(values, number):
        if number == step - 1:
            await_all(backend)
        if number == step:
            timer.start()
        if number == step + 1:
            timer.join()
            assert soon(took_effect)

    return on_step


def killing_node(step: int, node, backend):
    """`at` for kill -9 of a raylet. Its workers see only within a second that it is gone."""
    workers: list[int] = []

    def act():
        workers.extend(gradient_workers(raylet(node)))
        kill(raylet(node))

    return at(step, act, backend, lambda: bool(workers) and not any(map(alive, workers)))


def await_all(backend):
    """Until the last worker stands: a run begins with its first one, and can be over before there is another."""
    import ray

    references = [worker.ready_ref for worker in pool_of(backend).workers]
    assert len(ray.wait(references, num_returns=len(references), timeout=300)[0]) == len(references)


def assert_nothing_is_held(cluster):
    assert soon(all_cpus_free)
    assert soon(lambda: not gradient_workers())


def test_a_killed_node_costs_no_bit(cluster, add, config, digits, tmp_path, expected):
    """kill -9 of the raylet of one of two nodes, amid a step: the other goes on with all architectures."""
    nodes = add(), add()
    backend, lines = backend_on(cluster)
    assert_same(run_on(backend, config, digits, tmp_path, killing_node(3, nodes[1], backend)), expected)
    assert any("was lost" in line for line in lines)
    assert_nothing_is_held(cluster)


def test_a_node_that_comes_later_is_used(cluster, add, config, digits, tmp_path, expected):
    """One CPU for two architectures; a second node comes after three steps, and a second worker with it."""
    add()
    backend, _ = backend_on(cluster)
    num_ready = []

    def on_step(values, step):
        pool = pool_of(backend)
        if step == 3:
            add()
            assert soon(lambda: pool.results() == [] and pool.num_ready == 2)
        num_ready.append(pool.num_ready)

    assert_same(run_on(backend, config, digits, tmp_path, on_step), expected)
    assert (num_ready[0], num_ready[-1]) == (1, 2)
    assert_nothing_is_held(cluster)


def test_a_full_object_store_spills_and_costs_no_bit(cluster, add, config, digits, tmp_path, expected):
    """Another user of the cluster fills the store with objects that can't be dropped: Ray moves some to disk."""
    import ray

    add(2)
    references = [ray.put(np.full(STORE // 10, index, np.uint8)) for index in range(14)]
    backend, _ = backend_on(cluster)
    assert_same(run_on(backend, config, digits, tmp_path), expected)
    assert all(int(ray.get(one)[0]) == index for index, one in enumerate(references))
    del references
    assert_nothing_is_held(cluster)
