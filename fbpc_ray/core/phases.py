"""Seconds of a command by phase."""

import time

from fbpc_ray.core.durations import describe_seconds

_began = time.perf_counter()


def begin() -> None:
    """Start the clock of the first phase: a command does so before it imports torch."""
    global _began
    _began = time.perf_counter()


class Phases:
    """Measures the phases of a command, one after the other; the first one begins at `begin`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = _began

    def end(self, name: str) -> None:
        """End the current phase, which is called `name`, and begin the next."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """Write the sum, and the phases of a second or more: 41 s: start 7 s, experts 22 s, distillation 12 s."""
        long = {name: seconds for name, seconds in self.seconds.items() if seconds >= 1}
        parts = ", ".join(f"{name} {describe_seconds(seconds)}" for name, seconds in long.items())
        total = describe_seconds(sum(self.seconds.values()))
        return f"{total}: {parts}" if parts else total
