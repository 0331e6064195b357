"""`TaskRunner`: the interface between a driver and the processes that compute for it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskRunner(Protocol):
    """Runs independent tasks: in this process or on a cluster."""

    device: str
    """cpu or cuda."""

    @property
    def uses_other_machines(self) -> bool:
        """Whether tasks may run where the local paths of this process name other folders."""
        ...

    def map(
        self, function: Callable[[Any, Item, str], Result], shared: Any, items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, function(shared, item, device)) as each task ends, each on one CPU thread."""
        ...
