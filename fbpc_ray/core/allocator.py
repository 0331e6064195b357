"""How this process keeps memory that torch frees: half the time of a pass on a CPU is in giving it back and forth.

glibc returns large freed blocks to the system at once, and every tensor of the next pass is faulted in again page by
page. Kept, an eager forward and backward pass of a ConvNet takes half the time, to the same bits.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BELOW = 64 * 2**20
"""Bytes; blocks that are larger, like a whole data set, still go back."""


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks of up to 64 MiB for this process; False where there is no glibc to ask."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, KEPT_BELOW))


def give_back_freed_memory() -> None:
    """Return what is freed to the system now, where there is a glibc to ask: what the process holds is then in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
