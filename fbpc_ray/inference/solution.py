"""`Solution`, the result of every solver and chain: (value, status, stats)."""

from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")
Stats = TypeVar("Stats")


class SolverStatus(StrEnum):
    """How a solver or a chain ended."""

    CONVERGED = "converged"
    """The stopping rule was met."""
    MAX_STEPS = "max_steps"
    """All steps were taken: the only good end of a chain, a failure of a solver with a stopping rule."""
    NONFINITE = "nonfinite"
    """A loss or a parameter was infinite or not a number."""


class Solution(NamedTuple, Generic[Value, Stats]):
    """The result of a solver or a chain."""

    value: Value
    """What was solved for. No gradient flows."""
    status: SolverStatus
    stats: Stats
    """A NamedTuple of plain numbers."""
