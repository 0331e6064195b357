"""The cores that a process may use, and what starts with as many."""

import os
import sys

import pytest
import ray

from fbpc_ray.core import cores
from fbpc_ray.execution.ray import connection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="has no os.sched_setaffinity")


@pytest.fixture
def one_core():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_a_scheduler_may_give_fewer_cores_than_the_machine_has(one_core):
    assert cores.available() == 1


@pytest.mark.parametrize("options, num_cpus", [({}, 1), ({"num_cpus": 3}, 3)])
def test_a_cluster_of_ours_starts_with_the_cores_of_its_process(one_core, monkeypatch, options, num_cpus):
    """Unless its caller says how many. Ray would take those of the machine."""
    if os.cpu_count() == 1:
        pytest.skip("the machine has one core")
    asked = {}
    monkeypatch.setattr(ray, "init", lambda **words: asked.update(words))
    reaper = connection._start(options)
    reaper.dismiss()
    assert asked["num_cpus"] == num_cpus
