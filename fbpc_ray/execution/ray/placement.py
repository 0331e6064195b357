"""How many workers fit where, and what each of them takes. Pure arithmetic on plain data."""

import math
from collections.abc import Sequence
from typing import NamedTuple

SHARING = 4
"""Most workers that share a GPU unless --gpus-per-actor says otherwise."""
STORE_SHARE = 0.3
"""Part of a node's object store that what is computed ahead may fill."""


class Node(NamedTuple):
    """What a node, or a bundle of a placement group, has in all."""

    cpus: float
    gpus: float
    store: float = math.inf
    """Bytes of its object store."""


class Resources(NamedTuple):
    """What one worker takes. It must find it on one node."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def resources_of(
    workers: int, nodes: Sequence[Node], *, gpu: bool, threads: int, cpus_per_actor: float, gpus_per_actor: float
) -> Resources:
    """What each of `workers` takes; 0 for either setting means as much as makes sense.

    A GPU each where there are as many, else a fraction, such that at most `SHARING` work on one. A CPU for each
    thread, as far as the largest node has them; beside a GPU one CPU, or an equal part of fewer.
    """
    if not gpu:
        return Resources(
            cpus_per_actor or min(threads, max((node.cpus for node in nodes), default=threads)) or 1.0, 0.0
        )
    total = sum(node.gpus for node in nodes)
    gpus = gpus_per_actor
    if not gpus:
        gpus = 1.0 if total >= workers or not total else _floor(1 / min(SHARING, math.ceil(workers / total)), 4)
    shares = [node.cpus / _slots(node.gpus, gpus) for node in nodes if _slots(node.gpus, gpus)]
    return Resources(cpus_per_actor or min(1.0, _floor(min(shares, default=1.0), 2)), gpus)


def capacity(nodes: Sequence[Node], need: Resources) -> int:
    """How many workers fit."""
    return sum(_fits(node, need) for node in nodes)


def share(nodes: Sequence[Node], need: Resources, units: int, trials: int) -> int:
    """How many workers each of several trials gets: an equal part of the room, one at least, `units` at most."""
    return max(1, min(units, capacity(nodes, need) // trials))


def infeasible_message(nodes: Sequence[Node], need: Resources) -> str:
    """Why not one worker fits: one line."""
    have = ", ".join(sorted({f"{node.cpus:g} CPU and {node.gpus:g} GPU" for node in nodes})) or "nothing"
    flags = "--gpus-per-actor or --cpus-per-actor" if need.gpus else "--cpus-per-actor"
    return f"one worker needs {need} on one node, the nodes of the Ray cluster have {have}: lower {flags}, or add nodes"


def steps_ahead(wanted: int, units: int, bytes_each: int, nodes: Sequence[Node]) -> int:
    """For how many steps the x sides of all units may lie in the object store at a time."""
    if not bytes_each:
        return 0
    store = min((node.store for node in nodes), default=0.0)
    return int(min(wanted, STORE_SHARE * store / (bytes_each * units)))


def _fits(node: Node, need: Resources) -> int:
    slots = [int(node.cpus / need.cpus + 1e-6)] if need.cpus else []
    if need.gpus:
        slots.append(_slots(node.gpus, need.gpus))
    return min(slots, default=1)


def _slots(gpus: float, each: float) -> int:
    """A fraction lies on one GPU; what a bundle has beyond whole ones is a part of one."""
    whole = int(gpus + 1e-6)
    if each >= 1:
        return int(gpus / each + 1e-6)
    return whole * int(1 / each + 1e-6) + int((gpus - whole) / each + 1e-6)


def _floor(value: float, digits: int) -> float:
    return math.floor(value * 10**digits + 1e-9) / 10**digits
