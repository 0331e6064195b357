"""CPU cores that this process may use."""

import os


def available() -> int:
    """Return the number of CPU cores that this process may use: a scheduler may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
