"""UserError: the one exception whose message is for the user."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, or a machine that can't do the work: one line with the cause and the fix.

    The command line prints the message without a traceback and exits with `code`.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def closest(name: str, known: list[str]) -> str:
    """List the names nearest to `name`, then all known ones: 'did you mean a or b? known: ...'."""
    import difflib

    lower = {one.lower(): one for one in reversed(known)}
    near = [lower[one] for one in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}known: {', '.join(known)}"


def reason_of(error: Exception) -> str:
    """Return why a file can't be read: the first line of an error, its class where it has none."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def undamaged(path: object, fix: str) -> Iterator[None]:
    """Turn errors of the block, which reads our file `path`, into a UserError that ends with `fix`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error!r:.80}): {fix}") from None


def escape_controls(text: str, exempt: str = "") -> str:
    """Escape control characters not in `exempt`, and characters that UTF-8 lacks: a name stays in its line."""
    escaped = "".join(
        char if char in exempt or not (ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u2028\u2029")
        else char.encode("unicode_escape").decode() for char in text
    )  # fmt: skip
    return escaped.encode("utf-8", "backslashreplace").decode()
