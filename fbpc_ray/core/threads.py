"""torch's CPU threads, and how they treat denormal numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's CPU threads inside the block, and flush denormal numbers to zero.

    The number of threads changes the last bits of results. A prior shrinks weights without a gradient
    until they are denormal (below 1.2e-38), where one operation takes the time of many.
    """
    threads, flushed = torch.get_num_threads(), flushes_denormals()
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


def flushes_denormals() -> bool:
    """Tell whether this thread flushes denormal numbers; torch sets the mode, but does not report it."""
    return (torch.tensor(1e-20) * 1e-20).item() == 0
