"""The one exception that a user is meant to read."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or a bad machine. The message is one line: the cause, then the mend. The command line prints it
    without a traceback and exits with `code`."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def closest(name: str, known: list[str]) -> str:
    """`known` as text, with the names nearest to `name` first: ' Did you mean a, b? Known: ...'."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}known: {', '.join(known)}"


@contextmanager
def undamaged(path: object, mend: str) -> Iterator[None]:
    """Inside the block `path` is read, a file of ours; what fails there is a UserError that says so, and `mend`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r:.80}): {mend}") from None
