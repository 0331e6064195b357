"""The pool on a fake cluster and a fake clock: workers that die, hang, come late or never."""

from unittest import mock

import pytest
from ray.exceptions import (
    ActorDiedError,
    LocalRayletDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from support.fake_ray import NEVER, FakeCluster, job

from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.ray import connection, worker_pool
from fbpc_ray.execution.ray.worker_pool import LOG_AFTER


def test_a_job_ends_with_its_value_and_seconds():
    cluster = FakeCluster()
    assert not cluster.pool.submit(job("a"))  # no worker is ready yet
    cluster.await_ready(2)
    assert cluster.pool.submit(job("a", 1, seconds=2.0))
    assert cluster.pool.submit(job("b", 2, seconds=1.0))
    assert not cluster.pool.submit(job("c"))  # both workers have a job
    assert cluster.pool.running() == {"a": 0.0, "b": 0.0}
    assert [(r.key, r.value, r.seconds, r.lost) for r in cluster.results(2)] == [("b", 2, 1.0, ""), ("a", 1, 2.0, "")]
    assert cluster.pool.running() == {}
    assert len(cluster.pool.idle()) == 2


def test_a_worker_that_has_had_the_affinity_gets_the_job():
    cluster = FakeCluster()
    cluster.await_ready(2)
    first, second = cluster.pool.workers
    cluster.pool.assign(second, job("a", affinity=7))
    cluster.results()
    assert cluster.pool.submit(job("b", affinity=7))
    assert second.job is not None
    assert first.job is None


@pytest.mark.parametrize(
    ("error", "reason"), [(RayActorError(), "actor"), (LocalRayletDiedError(), "local raylet died")]
)
def test_a_killed_worker_is_replaced_and_its_job_is_lost(error, reason):
    cluster = FakeCluster()
    cluster.await_ready(2)
    dead = cluster.pool.workers[0]
    cluster.pool.assign(dead, job("a", error, seconds=3.0))
    (result,) = cluster.results()
    assert (result.key, result.value, result.seconds) == ("a", None, 3.0)
    assert reason in result.lost
    assert dead.actor.killed
    assert dead not in cluster.pool.workers
    assert len(cluster.pool.workers) == 2  # at once, not at the next check of the capacity
    cluster.await_ready(2)
    assert len(cluster.actors) == 3


def test_a_hanging_worker_is_replaced_at_its_deadline():
    cluster = FakeCluster()
    cluster.await_ready(2)
    frozen, fine = cluster.pool.workers
    cluster.pool.assign(frozen, job("a", seconds=NEVER, deadline=6.0))
    cluster.pool.assign(fine, job("b", seconds=8.0, deadline=9.0))
    results = cluster.results(2)
    assert [(result.key, result.lost) for result in results] == [("a", "no answer within 6 s"), ("b", "")]
    assert 6.0 < results[0].seconds <= 6.5  # noticed at the next look
    assert frozen.actor.killed
    assert not fine.actor.killed


def test_what_is_lost_of_an_argument_or_in_the_store_costs_the_job_but_not_the_worker():
    """The worker raised it, so the worker lives."""
    cluster = FakeCluster(wanted=1)
    cluster.await_ready(1)
    for cause in (WorkerCrashedError(), ObjectStoreFullError("store full")):
        cluster.pool.submit(job("a", RayTaskError("f", "traceback", cause)))
        (result,) = cluster.results()
        assert result.lost
        assert len(cluster.pool.idle()) == 1
    assert len(cluster.actors) == 1


@pytest.mark.parametrize("error", [UserError("no such network"), OSError(28, "disk full", "/tmp/x")])
def test_an_error_of_the_user_or_of_a_disk_arrives_as_itself(error):
    cluster = FakeCluster()
    cluster.await_ready(1)
    cluster.pool.submit(job("a", RayTaskError("f", "traceback", error)))
    with pytest.raises(type(error)) as caught:
        cluster.results()
    assert caught.value is error
    assert not cluster.pool.running()


def test_a_constructor_that_raises_ends_the_run():
    class InitFailed(RayActorError):
        @property
        def actor_init_failed(self):
            return True

    cluster = FakeCluster(starts=[(1.0, InitFailed())])
    with pytest.raises(InitFailed):
        cluster.await_ready(2)


NOT_INSTALLED = RuntimeError(
    "The actor with name Worker failed to import on the worker. This may be because needed library dependencies are "
    "not installed in the worker environment:\n\nTraceback (most recent call last):\n"
    "ModuleNotFoundError: No module named 'fbpc_ray'"
)
"""As Ray words it (ray._private.function_manager)."""
TASK_ERROR = RayTaskError("Worker.__init__", f'  File "x.py"\n{NOT_INSTALLED}', NOT_INSTALLED)


@pytest.mark.parametrize("phase", ["start", "call", "task"])
def test_a_node_without_the_code_of_the_run_is_one_line(phase, monkeypatch):
    """A driver that joins a cluster ships no code, as `ray job submit --working-dir` does."""
    with pytest.raises(UserError) as caught:
        if phase == "task":
            monkeypatch.setattr("ray.get", mock.Mock(side_effect=TASK_ERROR))
            connection.get("reference")
        starts = [(1.0, ActorDiedError(TASK_ERROR))] if phase == "start" else []
        cluster = FakeCluster(wanted=1, starts=starts)
        cluster.await_ready(1)
        cluster.pool.submit(job("a", TASK_ERROR))
        cluster.results()
    assert str(caught.value) == (
        "a Ray worker cannot import the code of the run (ModuleNotFoundError: No module named 'fbpc_ray'): install it "
        "on every node, or submit the run with `ray job submit --working-dir .`"
    )
    assert caught.value.code == 1


def test_a_worker_that_dies_as_it_starts_is_replaced():
    cluster = FakeCluster(wanted=1, starts=[(1.0, RayActorError())])
    cluster.await_ready(1)
    assert [actor.killed for actor in cluster.actors] == [True, False]


def test_a_node_that_joins_late_gets_a_worker():
    """One of two workers fits; the capacity is looked at every two seconds."""
    cluster = FakeCluster(capacity=1)
    cluster.await_ready(1)
    cluster.runtime.sleep(60)
    cluster.pool.submit(job("a", seconds=4.0))
    cluster.results()
    assert len(cluster.pool.workers) == 1
    cluster.capacity = 2
    cluster.runtime.sleep(2.5)
    cluster.await_ready(2)
    cluster.capacity = 9
    cluster.runtime.sleep(2.5)
    cluster.pool.submit(job("b"))
    cluster.results()
    assert len(cluster.actors) == 2  # never more than wanted


def test_without_a_worker_the_pool_logs_once_then_gives_up():
    """No node is left: one line after ten seconds, an error after the patience; a signal is checked meanwhile."""
    cluster = FakeCluster(capacity=0, patience=20.0)
    with pytest.raises(UserError) as error:
        cluster.await_ready(1)
    assert cluster.lines == ["no worker yet: waiting for 1 CPU"]
    assert str(error.value) == (
        "no worker within 20 s: waited for 1 CPU; add nodes, end what holds them, or raise --placement-timeout"
    )
    assert error.value.code == 1
    assert 20.0 < cluster.runtime.now() <= 21.0
    assert cluster.checks > 10


def test_the_patience_counts_from_the_last_ready_worker():
    """The only node dies after a minute: the minute before does not count."""
    cluster = FakeCluster(wanted=1, capacity=1, patience=20.0)
    cluster.await_ready(1)
    cluster.pool.submit(job("a", RayActorError(), seconds=60.0))
    cluster.capacity = 0
    (result,) = cluster.results()
    assert result.lost
    with pytest.raises(UserError, match="no worker within 20 s"):
        cluster.await_ready(1)
    assert cluster.runtime.now() >= 80.0


def test_a_cluster_that_grows_is_waited_for():
    """--autoscale: the pool starts all workers at once, and waits for the one whose node comes after a minute."""
    cluster = FakeCluster(capacity=2, patience=300.0, starts=[(60.0, None), (70.0, None)])
    cluster.await_ready(2)
    assert cluster.lines == ["no worker yet: waiting for 1 CPU"]
    assert cluster.runtime.now() == 70.0
    assert LOG_AFTER < 60.0


def test_closing_ends_all_workers():
    cluster = FakeCluster()
    cluster.await_ready(1)
    cluster.pool.close()
    assert [actor.killed for actor in cluster.actors] == [True, True]
    assert cluster.pool.workers == []


def test_all_results_that_are_there_are_taken_at_once(monkeypatch):
    """Else each of n results would cost a look at n references."""
    calls = []

    def wait(references, num_returns, timeout):
        calls.append((num_returns, timeout))
        return references[:num_returns], references[num_returns:]

    monkeypatch.setattr(worker_pool.ray, "wait", wait)
    assert worker_pool.RayRuntime().wait(["a", "b", "c"], 0.5) == ["a", "b", "c"]
    assert calls == [(1, 0.5), (3, 0)]
    assert worker_pool.RayRuntime().wait(["a"], 0.5) == ["a"]
    assert calls[2:] == [(1, 0.5)]
    monkeypatch.setattr(worker_pool.ray, "wait", lambda references, num_returns, timeout: ([], references))
    assert worker_pool.RayRuntime().wait(["a", "b"], 0.5) == []


@pytest.mark.parametrize("error", [LocalRayletDiedError(), WorkerCrashedError()])
def test_a_task_that_ray_lost_is_one_line(monkeypatch, error):
    """A chain's task, whose answer comes between the death of the node manager and the watch's look at it."""

    def lost(reference):
        raise error

    monkeypatch.setattr("ray.get", lost)
    with pytest.raises(UserError, match=r"^Ray lost a task \(.*\): run the same command with --resume$") as caught:
        connection.get("reference")
    assert caught.value.code == 1


@pytest.mark.parametrize("error", [ObjectStoreFullError("full"), OutOfDiskError("no space")])
def test_a_full_object_store_is_one_line(monkeypatch, error):
    """Of the driver's node, where it cannot move objects to disk."""
    monkeypatch.setattr("ray.put", mock.Mock(side_effect=error))
    with pytest.raises(
        UserError, match=r"^Ray's object store is full \(.*\): free memory or disk, .*--resume$"
    ) as caught:
        connection.put(1)
    assert caught.value.code == 1
