"""What `RayBackend` decides, on a fake cluster and a fake clock: waits, resources, number of workers."""

from types import SimpleNamespace

import pytest

from fbpc_ray.core.config import Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.ray import mapping, ray_backend
from fbpc_ray.execution.ray.placement import Node, Resources
from fbpc_ray.execution.ray.ray_backend import RayBackend


class Cluster:
    """A cluster without processes: tasks end at `end`, and its worker node is away from `dies` to `back`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, dies: float, back: float, end: float):
        self.now, self.cancelled, self.lines = 0.0, [], []
        self._down, self._end = (dies, back), end
        monkeypatch.setattr(ray_backend, "nodes", self._nodes)
        monkeypatch.setattr(ray_backend, "free", lambda: "0 CPU and 0 GPU")
        monkeypatch.setattr(ray_backend.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(mapping, "put", lambda value: value)
        monkeypatch.setattr(mapping, "get", lambda reference: reference)
        task = SimpleNamespace(remote=lambda function, shared, item, device: item)
        monkeypatch.setattr(mapping, "_task", SimpleNamespace(options=lambda **need: task))
        ray = SimpleNamespace(wait=self._wait, cancel=lambda reference, force: self.cancelled.append(reference))
        monkeypatch.setattr(mapping, "ray", ray)
        self.backend = object.__new__(RayBackend)  # not connected
        self.backend.settings, self.backend.device = Workers(placement_timeout=60.0), "cpu"
        self.backend.workers, self.backend.log = None, self.lines.append
        self.backend.check = lambda: None

    def _nodes(self) -> list[Node]:
        dies, back = self._down
        return [Node(0, 0)] if dies <= self.now < back else [Node(0, 0), Node(2, 0)]

    def _wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        self.now += timeout
        assert self.now < 10_000, "a real driver would wait without end"
        return (references[:1], references[1:]) if self.now >= self._end else ([], references)


def test_tasks_whose_node_died_are_not_waited_for_without_end(monkeypatch):
    """Ray keeps them pending; the head has no CPU for them."""
    cluster = Cluster(monkeypatch, dies=1000.0, back=9e9, end=9e9)
    with pytest.raises(
        UserError, match=r"the Ray cluster had no 1 CPU free within 6\d s: .*--placement-timeout"
    ) as error:
        list(cluster.backend.map(max, None, ["a", "b"]))
    assert error.value.code == 1
    assert 1060.0 <= cluster.now < 1065.0  # of the long task before, no second counts
    assert cluster.lines == ["waiting for 1 CPU; the Ray cluster has 0 CPU and 0 GPU free"]
    assert cluster.cancelled == ["a", "b"]


def test_a_node_that_comes_back_within_the_timeout_ends_the_wait(monkeypatch):
    cluster = Cluster(monkeypatch, dies=10.0, back=50.0, end=500.0)
    assert dict(cluster.backend.map(max, None, ["a", "b"])) == {0: "a", 1: "b"}
    assert cluster.cancelled == []


@pytest.mark.parametrize("autoscale, num_nodes, others", [(False, 1, False), (False, 2, True), (True, 1, True)])
def test_a_cluster_that_has_or_starts_other_nodes_uses_other_machines(monkeypatch, autoscale, num_nodes, others):
    backend = object.__new__(RayBackend)
    backend.settings = Workers(autoscale=autoscale)
    monkeypatch.setattr(ray_backend, "num_nodes", lambda: num_nodes)
    assert backend.uses_other_machines is others


@pytest.mark.parametrize("autoscale, nodes, gpus, workers", [
    (True, [Node(0, 0)], 1.0, 4),  # the head alone: the workers that do not fit make the cluster start nodes
    (True, [Node(0, 0), Node(4, 1)], 1.0, 4),
    (False, [Node(0, 0), Node(4, 1)], 0.25, 4),  # four share the only GPU
    (False, [Node(4, 1), Node(4, 1)], 0.5, 4),
])  # fmt: skip
def test_a_cluster_that_starts_nodes_is_asked_for_a_gpu_for_each_worker(monkeypatch, autoscale, nodes, gpus, workers):
    backend = object.__new__(RayBackend)
    backend.settings, backend.device = Workers(autoscale=autoscale, device="cuda"), "cuda"
    backend.check, backend.log, backend.owns_cluster = lambda: None, print, False
    monkeypatch.setattr(ray_backend, "nodes", lambda: nodes)
    need = backend.need(4, 1)
    assert need == Resources(1.0, gpus)
    options, limits = [], []
    actor = SimpleNamespace(remote=lambda **arguments: None)
    monkeypatch.setattr(ray_backend, "_Worker", SimpleNamespace(options=lambda **needs: options.append(needs) or actor))
    monkeypatch.setattr(
        ray_backend, "WorkerPool", lambda start, wanted, capacity, *rest, **more: limits.append((wanted, capacity()))
    )
    backend._worker_pool(SimpleNamespace(worker=SimpleNamespace(_asdict=dict)), 4, need)  # type: ignore[arg-type]
    assert options == [{"num_cpus": 1.0, "num_gpus": gpus}]
    assert limits == [(4, workers)]
