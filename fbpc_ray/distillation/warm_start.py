"""`--map-init warm`: a MAP solve begins at an earlier solution, not at a draw of the prior. Faster, not Algorithm 1.

Each architecture and draw has `size` solutions, taken in turn; one that was used `uses` times is begun anew from the
prior, a different one each time. Which one a step takes depends on the step alone, so a run that is resumed, or that
lost a worker, goes on with the same bits.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

Solutions = Mapping[str, Tensor]
"""{"architecture/draw/slot": (P,) float32, on the CPU}: theta_u as one vector, for each that there is."""


def name(architecture: int, draw: int, step: int, size: int) -> str:
    """Of the solution that a step's solve begins at, and leaves."""
    return f"{architecture}/{draw}/{step % size}"


def anew(step: int, size: int, uses: int) -> bool:
    """Whether the solve of `step` begins at the prior: every `uses` turns of its slot, one slot after the other."""
    turn, slot = divmod(step, size)
    return (turn + slot * uses // size) % uses == 0


def begun_at(solutions: Solutions, architecture: int, draw: int, step: int, size: int, uses: int) -> Tensor | None:
    """Where a solve begins: (P,), or None for the prior."""
    return None if anew(step, size, uses) else solutions.get(name(architecture, draw, step, size))


def remembered(solutions: Solutions, found: Sequence[tuple[str, Tensor | None]]) -> Solutions:
    """With what a step found, under its names; what it did not find stays."""
    return {**solutions, **{key: value for key, value in found if value is not None}}
