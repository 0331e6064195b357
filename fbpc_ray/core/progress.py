"""Lines and progress bars for the person who watches a run.

A terminal shows a bar. A log file, a scheduler, `nohup` and `ray job submit` get lines: at most one every LINE_SECONDS,
and at least one every SILENT_SECONDS. A thread writes the lines that are due while the work itself reports nothing.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.durations import describe_seconds
from fbpc_ray.core.errors import escape_controls
from fbpc_ray.core.signals import Interrupted

Log = Callable[[str], None]
"""Takes one line. `progress` may call it from a thread."""

LINE_SECONDS, LINE_SHARE = 30.0, 0.05
"""A line is due after both so many seconds and so large a share of the work."""
SILENT_SECONDS = 55.0
"""A line is due after so many seconds in any case."""
CHECK_SECONDS = 1.0
"""Seconds between two looks of the thread at the clock."""


def log(line: str) -> None:
    """Print one line, without secrets, above the progress bar if there is one."""
    tqdm.write(escape_controls(redacted(line), exempt="\n\t"), file=_stream())
    _stream().flush()
    _watch.printed()


def _stream() -> TextIO:
    return sys.stderr if _on_stderr else sys.stdout


_on_stderr = False


def log_to_stderr(on: bool) -> None:
    """Log to standard error from now on, if `on`: standard output is for a result."""
    global _on_stderr
    _on_stderr = on


def is_terminal(stream: Any) -> bool:
    """Return whether `stream` is a terminal with columns; schedulers open some that have none."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # no stream, none of the system, or closed
        return False


class Watch:
    """The `Progress` displays open in this process, the innermost last, and the time of the last printed line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, threaded: bool = True):
        """Start with no display; if `threaded`, a thread calls `tick` while a display is open."""
        self.clock, self.threaded = clock, threaded
        self.lock = threading.RLock()
        self.last_line = clock()
        self._displays: list[Progress] = []
        self._stop = threading.Event()

    def printed(self) -> None:
        """Note that a line was printed now."""
        self.last_line = self.clock()

    def open(self, display: "Progress") -> None:
        """Add a display; start the thread with the first one."""
        with self.lock:
            self._displays.append(display)
            if self.threaded and len(self._displays) == 1:
                self._stop = threading.Event()
                threading.Thread(target=self._run, args=(self._stop,), name="progress", daemon=True).start()

    def close(self, display: "Progress") -> None:
        """Remove a display; stop the thread after the last one."""
        with self.lock:
            if display in self._displays:
                self._displays.remove(display)
            if not self._displays:
                self._stop.set()

    def innermost(self) -> "Progress | None":
        """Return the display that was opened last."""
        return self._displays[-1] if self._displays else None

    def tick(self) -> None:
        """Write the line of the innermost display if it was silent for too long."""
        with self.lock:
            if display := self.innermost():
                display.write_if_due(SILENT_SECONDS)

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(CHECK_SECONDS):
            try:
                self.tick()
            except (OSError, ValueError):  # standard output is closed: the main thread ends by it
                return


_watch = Watch()


class Progress:
    """Shows the progress of `total` units, or of an unknown number: a bar, lines, or both. A context manager."""

    def __init__(
        self, what: str, total: int | None, unit: str, done: int = 0, *, log: Log = log, bar: Any = None,
        watch: Watch | None = None,
    ):  # fmt: skip
        """Open the display.

        Args:
            what: Name of the activity, such as experts.
            unit: Name of a unit in the singular.
            done: Units that were done before.
            log: Takes the lines.
            bar: A tqdm bar.
            watch: Lines are due by its clock; None: no lines.
        """
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._log, self._bar, self._watch = log, bar, watch
        self._facts: dict[str, str] = {}
        self._part, self._first = 0.0, done
        self._start = self._updated = watch.clock() if watch else 0.0
        self._line_time, self._line_share = watch.last_line if watch else 0.0, self._share()
        if watch:
            watch.open(self)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, count: int = 1, **facts: str) -> None:
        """Add `count` finished units, and replace the facts that stand beside them, such as loss="1.23"."""
        self.done, self._part = self.done + count, 0.0
        self._facts |= facts
        if self._bar is not None:
            if facts:
                self._bar.set_postfix(facts, refresh=False)
            self._bar.update(count)
        self._advance()

    def set_part(self, share: float) -> None:
        """Set the finished share, in 0..1, of the current unit."""
        self._part = share
        self._advance()

    def close(self) -> None:
        """Remove the bar, and write no more lines."""
        if self._bar is not None:
            self._bar.close()
        if self._watch:
            self._watch.close(self)

    def write_if_due(self, after: float) -> None:
        """Write a line if the last one is older than `after` seconds."""
        if self._watch is None:
            return
        with self._watch.lock:
            now = self._watch.clock()
            if now - self._last_line() >= after:
                self._line_time, self._line_share = now, self._share()
                self._log(self.line(now))
                self._watch.printed()

    def _advance(self) -> None:
        if self._watch:
            self._updated = self._watch.clock()
            enough = not self.total or self._share() - self._line_share > LINE_SHARE - 1e-9
            self.write_if_due(LINE_SECONDS if enough else SILENT_SECONDS)

    def _last_line(self) -> float:
        return self._line_time

    def line(self, now: float) -> str:
        """Return the line of progress at the time `now`."""
        if self.total is None:
            return f"{self.what}: {self.done:,} so far"
        text = f"{self.what}: {self.unit} {self.done:,}/{self.total:,} ({int(100 * self._share())} %)"
        text += "".join(f", {name} {value}" for name, value in self._facts.items())
        units = self.done + self._part - self._first
        if units <= 0:
            return f"{text}, {describe_seconds(now - self._start)} so far"
        seconds = (self._updated - self._start) / units
        left = max(0.0, seconds * (self.total - self.done - self._part) - (now - self._updated))
        rate = f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"
        return f"{text}, {rate} s/{self.unit}, {describe_seconds(left)} left"

    def _share(self) -> float:
        return (self.done + self._part) / self.total if self.total else 0.0


class _Command(Progress):
    """A command: its lines fill the minutes in which nothing else prints one."""

    def line(self, now: float) -> str:
        return f"still working, {describe_seconds(now - self._start)} since the start"

    def _last_line(self) -> float:
        return self._watch.last_line if self._watch else 0.0


def progress(what: str, total: int | None, unit: str, done: int = 0, *, log: Log = log, delay: float = 0.0) -> Progress:
    """Show progress by a bar on a terminal or in a notebook, elsewhere by lines; not at all if TQDM_DISABLE is set.

    Args:
        delay: Seconds until the bar appears.
    """
    notebook, terminal, hidden = "ipykernel" in sys.modules, is_terminal(sys.stderr), _is_hidden()
    bar = _bar(notebook, what, total, unit, done, delay) if (notebook or terminal) and not hidden else None
    lines = not (hidden or notebook or (terminal and is_terminal(_stream())))
    return Progress(what, total, unit, done, log=log, bar=bar, watch=_watch if lines else None)


def _is_hidden() -> bool:
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


def _bar(notebook: bool, what: str, total: int | None, unit: str, done: int, delay: float) -> Any:
    bar: Any = tqdm
    if notebook:
        with warnings.catch_warnings(action="ignore"):  # without ipywidgets the bar is a line of text, which will do
            from tqdm.auto import tqdm as bar
    return bar(
        desc=what, total=total, initial=done, unit=f" {unit}", disable=False, dynamic_ncols=True, leave=False,
        delay=delay,
    )  # fmt: skip


def set_part(done: float, total: float) -> None:
    """Set the finished share of the current unit, in the innermost display of this process."""
    if display := _watch.innermost():
        display.set_part(done / total)


@contextmanager
def watched() -> Iterator[None]:
    """Print a line after each minute in which the block prints none, unless standard output is a terminal."""
    if is_terminal(_stream()):
        yield
        return
    _watch.printed()
    with _Command("", None, "", log=log, watch=_watch):
        yield


@contextmanager
def resume_hint(hint: str) -> Iterator[None]:
    """Print `hint` on standard error when a signal ends the block."""
    try:
        yield
    except Interrupted:
        print(f"stopped; {hint}", file=sys.stderr, flush=True)
        raise
