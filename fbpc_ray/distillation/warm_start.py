"""Start MAP solves at earlier solutions (`--map-init warm`), not at draws of the prior.

Faster than Algorithm 1, but not the same algorithm.

Each pair of architecture and draw has a pool of `size` slots, used in turn. After `uses` solves a slot starts from the
prior again; different slots do so at different steps. The slot of a step depends on the step alone, so a run that is
resumed, or that lost a worker, continues with the same bits.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

Solutions = Mapping[str, Tensor]
"""{"architecture/draw/slot": theta_u as one vector, (P,) float32 on the CPU}."""


def slot_of(architecture: int, draw: int, step: int, size: int) -> str:
    """Return the name of the slot that the solve of `step` starts from and then fills."""
    return f"{architecture}/{draw}/{step % size}"


def starts_from_prior(step: int, size: int, uses: int) -> bool:
    """Tell whether the solve of `step` starts from the prior: once in `uses` turns of its slot."""
    turn, slot = divmod(step, size)
    return (turn + slot * uses // size) % uses == 0


def start_of(solutions: Solutions, architecture: int, draw: int, step: int, size: int, uses: int) -> Tensor | None:
    """Return the start of a solve, (P,), or None for the prior."""
    return None if starts_from_prior(step, size, uses) else solutions.get(slot_of(architecture, draw, step, size))


def with_solutions(solutions: Solutions, of_step: Sequence[tuple[str, Tensor | None]]) -> Solutions:
    """Put the solutions of a step in their slots; None leaves a slot unchanged."""
    return {**solutions, **{slot: solution for slot, solution in of_step if solution is not None}}
