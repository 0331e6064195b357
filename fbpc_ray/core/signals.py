"""Ctrl-C and SIGTERM as a flag that the driver checks between two steps."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal asked the run to end. `code` is the exit status that says which."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


class Interruption:
    """Catches SIGINT and SIGTERM once installed; a second one ends the process at once.

    With no `signals` it catches none, as a library must: Ctrl-C is the KeyboardInterrupt that a notebook expects."""

    def __init__(self, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.number: int | None = None
        self.signals = signals
        self._raise_at_once = False
        self._previous = {number: signal.getsignal(number) for number in signals}  # before ray.init sets its own
        self._installed = False

    def install(self) -> None:
        """Install the handlers, after ray.init, whose own would end the driver within seconds of a SIGTERM."""
        for number in self.signals:
            signal.signal(number, self._caught)
        self._installed = True

    def uninstall(self) -> None:
        """Give the handlers back to whoever had them when this object was made."""
        for number, handler in self._previous.items() if self._installed else ():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._installed = False

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Interrupted at once for a signal inside the block: for long work with nothing to save."""
        self._raise_at_once = True
        try:
            self.check()
            yield
        finally:
            self._raise_at_once = False

    def _caught(self, number: int, frame: FrameType | None) -> None:
        signal.alarm(0)  # Ray arms one that kills the driver after 3 s
        if self.number is not None:
            sys.exit(128 + number)
        self.number = number
        if self._raise_at_once:
            raise Interrupted(number)
        print("\nStopping after this step (again to stop at once) ...", file=sys.stderr, flush=True)


@contextmanager
def deferred_interrupt(message: str = "") -> Iterator[None]:
    """Let a Ctrl-C take effect after the block, with a `message` until then; a second one takes effect at once.

    For foreign code such as ray.init, where an exception between two bytecodes is lost in a callback, or ends the
    process with a segmentation fault. Outside of the main thread, and where Ctrl-C is ignored, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            before(number, frame)
        elif message:
            print(f"\n{message} (again to stop at once) ...", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if count == 1:
            signal.raise_signal(signal.SIGINT)
