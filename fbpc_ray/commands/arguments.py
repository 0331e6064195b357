"""The words of a command line, before they are parsed: old names of flags, and --resume without a value."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

from fbpc_ray.core.config import RENAMED, RENAMED_VALUES

RESUME = ("no", "yes", "auto")


def current_words(words: Sequence[str], kinds: Iterable[type]) -> list[str]:
    """Replace old names of the flags of `kinds` by those of `RENAMED`, with a note on stderr for each."""
    known = {name for kind in kinds for name in flags_of(kind)}
    current: list[str] = []
    values: dict[str, str] = {}
    for place, word in enumerate(words):
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        new = RENAMED.get(name, name)
        if not flag.startswith("--"):
            current.append(values.get(word, word))
            values = {}
        elif name in ("again", "no_again", "no_resume") and "resume" in known:
            current += ["--resume", "auto" if name == "again" else "no"]
            if name != "no_resume":
                _note("--again", "--resume auto")
        elif name == "resume" and not equals and "resume" in known:
            value = words[place + 1] if place + 1 < len(words) else ""
            current += [flag] if value in RESUME else [flag, "yes"]
        elif new in known and name not in known:
            values = RENAMED_VALUES.get(name, {})
            option = f"--{new.replace('_', '-')}"
            _note(flag, option)
            current.append(f"{option}={values.get(text, text)}" if equals else option)
        else:
            values = {}
            current.append(word)
    return current


def flags_of(kind: type) -> set[str]:
    """Return the names of all flags of a class of arguments, whichever group they are in."""
    names, hints = set(), get_type_hints(kind)
    for field in fields(kind):
        nested = [each for each in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(each)]
        names |= flags_of(nested[0]) if nested else {field.name}  # type: ignore[arg-type]
    return names


def _note(old: str, new: str) -> None:
    print(f"note: {old} is now {new}; the next release drops the old name", file=sys.stderr)
