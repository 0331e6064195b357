"""Who fits where, by hand."""

import pytest

from fbpc_ray.execution.ray.placement import Node, Resources, capacity, infeasible_message, resources_of, steps_ahead


def need(workers, nodes, **changes):
    defaults = {"gpu": False, "threads": 1, "cpus_per_actor": 0.0, "gpus_per_actor": 0.0}
    return resources_of(workers, nodes, **(defaults | changes))


LAPTOP, GPU_BOX = [Node(2, 0)], [Node(16, 1)]


@pytest.mark.parametrize(
    "workers, nodes, changes, share, fit",
    [
        (1, LAPTOP, {}, Resources(1, 0), 2),
        (4, LAPTOP, {}, Resources(1, 0), 2),  # four architectures take turns on two CPUs
        (4, [Node(16, 0)], {"threads": 2}, Resources(2, 0), 8),
        (2, [Node(1, 0), Node(1, 0)], {"threads": 4}, Resources(1, 0), 2),  # a worker does not reach over two nodes
        (2, [Node(2, 0), Node(4, 0)], {"threads": 8}, Resources(4, 0), 1),  # at most the largest node
        (2, LAPTOP, {"cpus_per_actor": 0.5}, Resources(0.5, 0), 4),
        (1, [Node(0.5, 0)], {}, Resources(0.5, 0), 1),
        (4, [Node(0, 0), Node(8, 4)], {"gpu": True}, Resources(1, 1), 4),  # a GPU each
        (1, GPU_BOX, {"gpu": True}, Resources(1, 1), 1),
        (2, GPU_BOX, {"gpu": True}, Resources(1, 0.5), 2),
        (3, GPU_BOX, {"gpu": True}, Resources(1, 0.3333), 3),
        (4, GPU_BOX, {"gpu": True}, Resources(1, 0.25), 4),
        (9, GPU_BOX, {"gpu": True}, Resources(1, 0.25), 4),  # at most four on one: the others take turns
        (4, [Node(8, 2)], {"gpu": True}, Resources(1, 0.5), 4),
        (3, [Node(8, 2)], {"gpu": True}, Resources(1, 0.5), 4),
        (4, [Node(2, 1)], {"gpu": True}, Resources(0.5, 0.25), 4),  # two CPUs beside it: a half each
        (6, [Node(8, 4), Node(1, 2)], {"gpu": True}, Resources(0.5, 1), 6),  # a half CPU beside each GPU of the second
        (3, [Node(16, 8)], {"gpu": True, "gpus_per_actor": 2.0}, Resources(1, 2), 4),
        (
            2,
            [Node(8, 1), Node(8, 1)],
            {"gpu": True, "gpus_per_actor": 0.6},
            Resources(1, 0.6),
            2,
        ),  # .4 + .4 is no place
        (2, [Node(2, 0)], {"gpu": True}, Resources(1, 1), 0),  # a cluster that starts from no GPU
    ],
)
def test_what_a_worker_takes_and_how_many_fit(workers, nodes, changes, share, fit):
    result = need(workers, nodes, **changes)
    assert result == share
    assert capacity(nodes, result) == fit


def test_what_does_not_fit_is_refused_with_need_and_capacity():
    assert capacity(LAPTOP, Resources(4, 0)) == 0
    assert infeasible_message(LAPTOP, Resources(4, 0)) == (
        "one worker needs 4 CPU on one node, the nodes of the Ray cluster have 2 CPU and 0 GPU: "
        "lower --cpus-per-actor, or add nodes"
    )
    assert "1 CPU and 2 GPU" in infeasible_message(GPU_BOX, Resources(1, 2))
    assert "--gpus-per-actor" in infeasible_message(GPU_BOX, Resources(1, 2))
    assert "have nothing" in infeasible_message([], Resources(1, 0))


def test_what_is_computed_ahead_is_bounded_by_the_object_store():
    """.3 of a store of 1,000 bytes holds 300: three blocks of 100, for two units one step of 200."""
    nodes = [Node(2, 0, 1000), Node(2, 0, 5000)]
    assert steps_ahead(2, 1, 100, nodes) == 2
    assert steps_ahead(9, 1, 100, nodes) == 3
    assert steps_ahead(2, 2, 100, nodes) == 1
    assert steps_ahead(2, 1, 301, nodes) == 0
    assert steps_ahead(2, 1, 0, nodes) == 0  # a method that has nothing to compute ahead
    assert steps_ahead(0, 1, 100, nodes) == 0
