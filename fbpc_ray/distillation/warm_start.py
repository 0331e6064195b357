"""Start MAP solves at earlier solutions (`--map-init warm`), not at draws of the prior. Faster, not Algorithm 1.

Each architecture and draw has `size` slots, used in turn; a slot that was used `uses` times starts from the prior
again, the slots at different steps. The slot of a step depends on the step alone, so a run that is resumed, or that
lost a worker, continues with the same bits.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

Solutions = Mapping[str, Tensor]
"""{"architecture/draw/slot": (P,) float32, on the CPU}: theta_u as one vector, by slot."""


def name(architecture: int, draw: int, step: int, size: int) -> str:
    """Return the name of the slot that the solve of `step` starts at and fills."""
    return f"{architecture}/{draw}/{step % size}"


def anew(step: int, size: int, uses: int) -> bool:
    """Whether the solve of `step` starts from the prior: every `uses` turns of its slot, one slot after the other."""
    turn, slot = divmod(step, size)
    return (turn + slot * uses // size) % uses == 0


def begun_at(solutions: Solutions, architecture: int, draw: int, step: int, size: int, uses: int) -> Tensor | None:
    """Return the start of a solve, (P,), or None for the prior."""
    return None if anew(step, size, uses) else solutions.get(name(architecture, draw, step, size))


def remembered(solutions: Solutions, found: Sequence[tuple[str, Tensor | None]]) -> Solutions:
    """Put the solutions of a step in their slots; a None leaves its slot as it is."""
    return {**solutions, **{key: value for key, value in found if value is not None}}
