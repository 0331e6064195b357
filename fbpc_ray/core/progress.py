"""Lines and progress bars for the person who watches a run."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import escape_controls
from fbpc_ray.core.signals import Interrupted

Log = Callable[[str], None]
"""Takes one line."""


def log(line: str) -> None:
    """Print one line, without secrets, above the progress bar if there is one."""
    tqdm.write(escape_controls(redacted(line), kept="\n\t"), file=_stream())
    _stream().flush()


def _stream() -> TextIO:
    return sys.stderr if _on_stderr else sys.stdout


_on_stderr = False


def log_to_stderr(on: bool) -> None:
    """Log to standard error from now on, if `on`: standard output is for a result."""
    global _on_stderr
    _on_stderr = on


def progress(what: str, total: int, unit: str, done: int = 0) -> Any:
    """Return a progress bar for a terminal or a notebook; elsewhere it shows nothing."""
    bar, disable = tqdm, None
    if "ipykernel" in sys.modules:
        with warnings.catch_warnings(action="ignore"):  # without ipywidgets the bar is a line of text, which will do
            from tqdm.auto import tqdm as bar
        disable = False
    return bar(desc=what, total=total, initial=done, unit=f" {unit}", disable=disable, dynamic_ncols=True, leave=False)


@contextmanager
def resume_hint(hint: str) -> Iterator[None]:
    """Print `hint` on standard error when a signal ends the block."""
    try:
        yield
    except Interrupted:
        print(f"stopped; {hint}", file=sys.stderr, flush=True)
        raise
