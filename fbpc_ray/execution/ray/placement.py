"""The resources of a worker, and how many workers fit on a cluster. Pure arithmetic on plain data."""

import math
from collections.abc import Sequence
from typing import NamedTuple

MAX_SHARING = 4
"""Most workers that share a GPU unless --gpus-per-actor is set."""
STORE_SHARE = 0.3
"""Part of a node's object store that expert sides computed ahead may fill."""


class Node(NamedTuple):
    """Total resources of a node, or of a bundle of a placement group."""

    cpus: float
    gpus: float
    store: float = math.inf
    """Bytes of its object store."""


class Resources(NamedTuple):
    """Resources of one worker, all on one node."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def resources_of(
    workers: int, nodes: Sequence[Node], *, gpu: bool, threads: int, cpus_per_actor: float, gpus_per_actor: float
) -> Resources:
    """Return the resources of each of `workers`; 0 for either setting means the default.

    The default is one GPU for each worker if there are as many, else a fraction, such that at most `MAX_SHARING`
    workers share one; and one CPU for each thread, at most those of the largest node. Beside a GPU it is one CPU, or an
    equal part of the node's CPUs if there are fewer.
    """
    if not gpu:
        return Resources(
            cpus_per_actor or min(threads, max((node.cpus for node in nodes), default=threads)) or 1.0, 0.0
        )
    total = sum(node.gpus for node in nodes)
    gpus = gpus_per_actor
    if not gpus:
        gpus = 1.0 if total >= workers or not total else _floor(1 / min(MAX_SHARING, math.ceil(workers / total)), 4)
    shares = [node.cpus / _slots(node.gpus, gpus) for node in nodes if _slots(node.gpus, gpus)]
    return Resources(cpus_per_actor or min(1.0, _floor(min(shares, default=1.0), 2)), gpus)


def capacity(nodes: Sequence[Node], need: Resources) -> int:
    """Return how many workers fit."""
    return sum(_fits(node, need) for node in nodes)


def share(nodes: Sequence[Node], need: Resources, tasks: int, trials: int) -> int:
    """Return the workers of each trial: an equal part of the capacity, at least one, at most `tasks`."""
    return max(1, min(tasks, capacity(nodes, need) // trials))


def infeasible_message(nodes: Sequence[Node], need: Resources) -> str:
    """Return the error message for a cluster on which not one worker fits."""
    have = ", ".join(sorted({f"{node.cpus:g} CPU and {node.gpus:g} GPU" for node in nodes})) or "nothing"
    flags = "--gpus-per-actor or --cpus-per-actor" if need.gpus else "--cpus-per-actor"
    return f"one worker needs {need} on one node, the nodes of the Ray cluster have {have}: lower {flags}, or add nodes"


def steps_ahead(wanted: int, tasks: int, expert_side_bytes: int, nodes: Sequence[Node]) -> int:
    """Return for how many steps, at most `wanted`, the expert sides of all tasks fit into the object store."""
    if not expert_side_bytes:
        return 0
    store = min((node.store for node in nodes), default=0.0)
    return int(min(wanted, STORE_SHARE * store / (expert_side_bytes * tasks)))


def _fits(node: Node, need: Resources) -> int:
    """Return how many workers fit on a node."""
    slots = [int(node.cpus / need.cpus + 1e-6)] if need.cpus else []
    if need.gpus:
        slots.append(_slots(node.gpus, need.gpus))
    return min(slots)


def _slots(gpus: float, need: float) -> int:
    """Return how many workers that need `need` GPUs fit on `gpus`; a worker's fraction lies on one GPU."""
    whole = int(gpus + 1e-6)  # a bundle may have a fraction of a GPU beside whole ones
    if need >= 1:
        return int(gpus / need + 1e-6)
    return whole * int(1 / need + 1e-6) + int((gpus - whole) / need + 1e-6)


def _floor(value: float, digits: int) -> float:
    return math.floor(value * 10**digits + 1e-9) / 10**digits
