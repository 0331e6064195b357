"""What a cluster does to a run: nodes that die, freeze or come, workers that hang, memory that ends. Each run ends with
the bits of the undisturbed one, or with one line and a checkpoint, and gives back all that it held."""

import logging
import os
import shutil
import signal
import tempfile
import threading
import time

import numpy as np
import pytest
from support.processes import alive, all_cpus_free, gradient_workers, kill, soon
from support.runs import assert_same, run_on

from fbpc_ray.core.config import Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation.run_directory import RunDirectory
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
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE,
        },
    )  # fmt: skip
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    yield made
    ray.shutdown()
    made.shutdown()
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
    for each in added:
        if each in cluster.worker_nodes:
            kill(raylet(each), signal.SIGCONT)
            cluster.remove_node(each, allow_graceful=False)
    assert soon(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def backend_on(cluster, on_line=lambda line: None, **settings):
    """A backend on the cluster that is there; what it says is kept in `lines`."""
    from fbpc_ray.execution.ray.ray_backend import RayBackend

    lines: list[str] = []

    def log(line):
        lines.append(line)
        on_line(line)

    return RayBackend(Workers(device="cpu", **settings), Interruption(), log), lines


def pool_of(backend):
    assert backend.pool is not None
    return backend.pool


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

    def on_step(values, done):
        if done == step - 1:
            await_all(backend)
        if done == step:
            timer.start()
        if done == step + 1:
            timer.join()
            assert soon(took_effect)

    return on_step


def killing_node(step: int, node, backend, first=lambda: None):
    """`at` for kill -9 of a raylet. Its workers see only within a second that it is gone."""
    workers: list[int] = []

    def act():
        first()
        workers.extend(gradient_workers(raylet(node)))
        kill(raylet(node))

    return at(step, act, backend, lambda: bool(workers) and not any(map(alive, workers)))


def await_all(backend):
    """Until the last worker stands: a run begins with its first one, and can be over before there is another."""
    import ray

    births = [member.ready_ref for member in pool_of(backend).members]
    assert len(ray.wait(births, num_returns=len(births), timeout=300)[0]) == len(births)


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


def test_a_frozen_node_costs_no_bit(cluster, add, config, digits, tmp_path, expected):
    """SIGSTOP of a raylet and of its workers: Ray declares the node dead."""
    nodes = add(), add()
    backend, lines = backend_on(cluster)

    def freeze():
        for pid in [*gradient_workers(raylet(nodes[1])), raylet(nodes[1])]:
            kill(pid, signal.SIGSTOP)

    assert_same(run_on(backend, config, digits, tmp_path, at(3, freeze, backend)), expected)
    assert any("was lost" in line for line in lines)
    for pid in gradient_workers(raylet(nodes[1])):
        kill(pid)  # they can't see that their raylet is gone as long as they are stopped
    kill(raylet(nodes[1]))
    assert_nothing_is_held(cluster)


def test_a_frozen_worker_is_replaced_after_the_deadline(cluster, add, config, digits, tmp_path, expected):
    add(2)
    backend, lines = backend_on(cluster, step_deadline=6.0)
    freeze = at(3, lambda: kill(gradient_workers()[0], signal.SIGSTOP), backend)
    assert_same(run_on(backend, config, digits, tmp_path, freeze), expected)
    assert any("no answer within 6 s" in line for line in lines)
    assert_nothing_is_held(cluster)


def test_a_straggler_is_skipped_on_request_and_said(cluster, add, config, digits, tmp_path):
    """One worker stops until it is given up: without the request it is waited for (the test above); with it, the step
    goes on without its gradient, reports that, and the run takes all its steps. On a busy machine a step may well take
    several times what it usually does: that alone is no reason to be skipped here."""
    add(2)
    backend, lines = backend_on(cluster, skip_stragglers=30.0)
    skipped, frozen = [], []

    def on_step(values, step):
        if step == 1:
            await_all(backend)
        if "skipped" in values:
            skipped.append(step)
            for pid in frozen:
                kill(pid, signal.SIGCONT)
        if step == 6:
            frozen.append(gradient_workers()[0])
            kill(frozen[0], signal.SIGSTOP)

    images, rows = run_on(backend, config, digits, tmp_path, on_step)
    assert skipped
    assert min(skipped) > 6
    assert any(f"step {skipped[0]}: " in line and "is skipped after" in line for line in lines)
    assert len(rows) == 24 - len(skipped)
    assert np.isfinite(images.numpy()).all()
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
            assert soon(lambda: pool.outcomes() == [] and pool.num_ready == 2)
        num_ready.append(pool.num_ready)

    assert_same(run_on(backend, config, digits, tmp_path, on_step), expected)
    assert (num_ready[0], num_ready[-1]) == (1, 2)
    assert_nothing_is_held(cluster)


def test_without_any_node_left_the_run_ends_with_a_checkpoint(cluster, add, config, digits, tmp_path, expected):
    """The only node dies: one line within the patience, the steps saved; resumed on a new node to the same bits."""
    node = add()
    backend, lines = backend_on(cluster)

    def lose_patience():
        pool_of(backend)._patience = 20.0  # the first worker may take longer than that to start

    with pytest.raises(UserError, match="no worker within 20 s: waited for 1 CPU; the Ray cluster has 0 CPU"):
        run_on(backend, config, digits, tmp_path, killing_node(4, node, backend, lose_patience))
    assert any("no worker yet: waiting for 1 CPU" in line for line in lines)
    labels = np.arange(10)
    restored = RunDirectory(tmp_path).restore(labels, (1, 8, 8))  # type: ignore[arg-type]
    assert restored is not None
    state, rows = restored
    assert state.step >= 4
    add()
    backend, _ = backend_on(cluster)
    assert_same(run_on(backend, config, digits, tmp_path, state=state, rows=rows), expected)
    assert_nothing_is_held(cluster)


def test_no_place_is_said_within_seconds(cluster, config, digits, tmp_path):
    """No node but the head, which has no CPU. Nothing is waited for, as it is where a place may come."""
    began = time.monotonic()
    backend, _ = backend_on(cluster)
    with pytest.raises(UserError, match="one worker needs 1 CPU on one node, the nodes of the Ray cluster have 0 CPU"):
        run_on(backend, config, digits, tmp_path)
    assert time.monotonic() - began < backend.settings.placement_timeout / 3


def test_a_cluster_that_grows_by_itself_is_waited_for(cluster, add, config, digits, tmp_path, expected):
    """--autoscale: nothing is there at first; the node comes once it is said that it is waited for."""
    backend, lines = backend_on(
        cluster, lambda line: add(2) if "no worker yet" in line else None, autoscale=True, placement_timeout=300.0
    )
    assert_same(run_on(backend, config, digits, tmp_path), expected)
    assert any("waiting for 1 CPU" in line for line in lines)
    assert_nothing_is_held(cluster)


def test_a_worker_to_spare_computes_ahead_and_changes_no_bit(cluster, add, config, digits, tmp_path, expected):
    """Four CPUs for two gradients: two compute x sides, one of them dies on the way; a bounded number is kept."""
    add(4)
    backend, _ = backend_on(cluster, prefetch=2)
    used, kept = [], []

    def on_step(values, step):
        if step == 1:
            await_all(backend)
            assign = pool_of(backend).assign

            def watched(member, job):
                if job.key[0] == "gradient":
                    used.append(job.key[1:] in backend._expert_sides)
                assign(member, job)

            pool_of(backend).assign = watched
        kept.append(len(backend._expert_sides))
        if step == 5:
            threading.Timer(0.02, lambda: kill(gradient_workers()[-1])).start()
        time.sleep(0.3)  # time to compute ahead

    assert_same(run_on(backend, config, digits, tmp_path, on_step), expected)
    assert sum(used) > len(used) // 2
    assert 0 < max(kept) <= 2 * 2 + 2
    assert_nothing_is_held(cluster)


def test_several_draws_are_the_same_on_any_number_of_workers(cluster, add, config, digits, tmp_path):
    add(3)
    config = config.updated(draws_per_step=3, steps=3)
    backend, _ = backend_on(cluster)
    serial = run_on(Serial("cpu", Interruption()), config, digits, tmp_path / "serial")
    assert_same(run_on(backend, config, digits, tmp_path / "ray"), serial)
    assert [(row["step"], row["architecture"], row["draw"]) for row in serial[1][:6]] == [
        (1, name, draw) for name in ("convnet-in", "convnet-bn") for draw in range(3)
    ]
    assert_nothing_is_held(cluster)


def test_a_full_object_store_spills_and_costs_no_bit(cluster, add, config, digits, tmp_path, expected):
    """Another user of the cluster fills the store with objects that can't be dropped: Ray moves some to disk."""
    import ray

    add(2)
    held = [ray.put(np.full(STORE // 10, index, np.uint8)) for index in range(14)]
    backend, _ = backend_on(cluster)
    assert_same(run_on(backend, config, digits, tmp_path), expected)
    assert all(int(ray.get(one)[0]) == index for index, one in enumerate(held))
    del held
    assert_nothing_is_held(cluster)
