"""Parse a command line: aliases of renamed flags, defaults, and errors of one line."""

import argparse
import contextlib
import difflib
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from fbpc_ray.commands import help
from fbpc_ray.commands.arguments import DistillArguments
from fbpc_ray.core import files
from fbpc_ray.core.config import (
    NOT_STARTED,
    RENAMED,
    RENAMED_SWITCHES,
    RENAMED_VALUES,
    Config,
    read_config,
    refuse_unasked,
    started,
)
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import PAPER, PRESETS, RECIPES, default, size_request
from fbpc_ray.core.progress import log_to_stderr
from fbpc_ray.core.ranges import check_flags
from fbpc_ray.core.sizes import LEVELS, SizeRequest
from fbpc_ray.core.storage import place

Arguments = TypeVar("Arguments")

EXPLANATIONS = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1: must be a whole number, got \2"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1: must be a number, got \2"),
    (r"Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]", r"\1: got the unexpected value \2"),
    (r"Error parsing (\S+): Exceeds the limit .*", r"\1: must be a number of at most 4300 digits, got more"),
    (r"Error parsing (\S+): (.*)", r"\1: \2"),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.", r"\2: must be one of \3, got \1"),
    (r"Missing value for argument '(\S+)'\..*", r"\1: the value is missing"),
    (r"Missing from [^:]*: (\S+).*", r"\1: missing"),
    (r"Unrecognized options: ([^,]*).*", r"\1: unexpected, or one value too many for the flag before it"),
)
"""(what tyro prints, the same in our words)."""


def current_words(words: Sequence[str], kinds: Iterable[type]) -> list[str]:
    """Replace old names of the flags of `kinds` by those of `RENAMED`, with a note on stderr for each."""
    known = {name for kind in kinds for name in flags_of(kind)}
    current: list[str] = []
    renamed_values: dict[str, str] = {}
    for number, word in enumerate(words):
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        new = RENAMED.get(name, name)
        if not flag.startswith("--"):
            current.append(renamed_values.get(word, word))
            renamed_values = {}
        elif name in RENAMED_SWITCHES and RENAMED_SWITCHES[name][0] in known:
            option, value = RENAMED_SWITCHES[name]
            current += [f"--{option}", value]
            if name != "no_resume":  # how tyro negates --resume: not an old name
                _note(flag, f"--{option} {value}")
        elif name == "resume" and not equals and "resume" in known:
            following = words[number + 1] if number + 1 < len(words) else ""
            current += [flag, "yes"] if following.startswith("-") or not following else [flag]
        elif new in known and name not in known:
            renamed_values = RENAMED_VALUES.get(name, {})
            option = f"--{new.replace('_', '-')}"
            _note(flag, option)
            current.append(f"{option}={renamed_values.get(text, text)}" if equals else option)
        else:
            renamed_values = {}
            current.append(word)
    return current


def _note(old: str, new: str) -> None:
    print(f"note: {old} is now {new}; the next release drops the old name", file=sys.stderr)


def flags_of(kind: type) -> set[str]:
    """Return the names of all fields of a class of arguments, in whichever group they are."""
    names, hints = set(), get_type_hints(kind)
    for field in fields(kind):
        groups = [hint for hint in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(hint)]
        names |= flags_of(groups[0]) if groups else {field.name}  # type: ignore[arg-type]
    return names


def start_of(words: Sequence[str], unused: Set[str] = frozenset()) -> tuple[Config, SizeRequest | None]:
    """Return the configuration that flags change, and the request to choose sizes once the data is loaded.

    The first is the stored one on --resume, a preset, or the defaults; the second is None where all sizes are known: a
    run that --resume continues has its sizes in config.json, and keeps them. Raises UserError.

    Args:
        unused: settings that the command doesn't use: a preset file may name destinations there.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in (
        "preset", "recipe", "time-budget", "data", "ipc", "out", "method", "address", "experts", "initial-coreset",
    ):  # fmt: skip
        early.add_argument(f"--{flag}")
    early.add_argument("--architectures", nargs="*")
    early.add_argument("--resume", nargs="?", const="yes", default="no")
    try:
        known, _ = early.parse_known_args(words)
    except argparse.ArgumentError:
        return Config(), None  # a flag without its value: `parse` refuses it
    flag_names = {name for name, value in vars(known).items() if value is not None}
    recipe = RECIPES.get(known.recipe, {})
    if known.out and (not known.preset or known.preset in LEVELS) and resumes(known.resume, known.out):
        stored = read_config(place(known.out), NOT_STARTED)
        refuse_unasked(stored, flag_names, known.out)
        # A download goes into a folder that the file names: only where the command line asks.
        return stored.updated(download=False, **recipe), None
    base = default(known.data, known.ipc, known.preset or "", known.method)
    if known.preset and known.preset not in (*PRESETS, *LEVELS, PAPER):
        refuse_unasked(base, flag_names | unused, known.preset)
    request = size_request(known.data, known.preset or "", known.time_budget or "", flags_in(words))
    return base.updated(**recipe), request


def flags_in(words: Sequence[str]) -> set[str]:
    """Return the settings that `words` name: --no-tracking is tracking."""
    names = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    return (names | {name.removeprefix("no_") for name in names}) & Config().flat().keys()


def resumes(resume: str, out: str) -> bool:
    """Return whether --resume `resume` continues a run in `out` instead of starting one there."""
    return resume == "yes" or (resume == "auto" and started(out))


def distill_arguments(words: Sequence[str], program: str = "fbpc distill") -> DistillArguments:
    """Return the arguments of `distill`. Raises UserError."""
    return parse(DistillArguments, words, program, DistillArguments(config=start_of(words)[0]))


def parse(
    kind: type[Arguments],
    words: Sequence[str],
    program: str,
    default: Arguments | None = None,
    about: str | None = None,
) -> Arguments:
    """Parse `words` into a `kind`, whose defaults are those of `default`.

    Args:
        program: The command before `words`, for --help and errors.
        about: What --help says of a program that has no page in help.py.

    Raises UserError, or SystemExit after --help.
    """
    extra: dict[str, Any] = {"description": about} if about else {}
    extra |= {} if default is None else {"default": default}
    if {"-h", "--help"} & set(words):
        if (command := program.removeprefix("fbpc ")) in help.PAGES:
            help.whole_sentences(kind)
            extra["description"] = help.description(command, kind)
    else:
        _refuse_unknown(kind, words, program)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            arguments = tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=words, prog=program, **extra)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{explanation(box.getvalue())}; see {program} --help") from None
    values = _values(arguments)
    _refuse_repeated(values, words)
    check_flags(values)
    files.check_output(values.get("json", ""))
    log_to_stderr(values.get("json") == "-")
    return arguments  # type: ignore[return-value]


def _values(arguments: Any) -> dict[str, Any]:
    """Return {flag: value} of a class of arguments, over all its groups."""
    values: dict[str, Any] = {}
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        values |= _values(value) if is_dataclass(value) else {field.name: value}
    return values


def _refuse_unknown(kind: type, words: Sequence[str], program: str) -> None:
    """Raise UserError for a word that looks like a flag and is none of `kind`."""
    known = [f"--{name.replace('_', '-')}" for name in sorted(flags_of(kind))]
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--tyro-"):  # completion for shells
            continue
        if flag.startswith("--") and flag not in known and f"--{flag.removeprefix('--no-')}" not in known:
            close = difflib.get_close_matches(flag, known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise UserError(f"{flag}: {program} has no such flag; {hint}see {program} --help")


def _refuse_repeated(values: dict[str, Any], words: Sequence[str]) -> None:
    """Raise UserError for a flag of several values that `words` hold twice: its first values would be lost."""
    given = Counter(word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple) and given[flag] > 1:
            raise UserError(f"{flag}: given {given[flag]} times; give all its values after one {flag}")


def explanation(box: str) -> str:
    """Return the error in tyro's box as one line: the text between the title and the next rule."""
    lines = [re.sub(r"^[│|]|[│|]$", "", line).strip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.match(r"[─-]{3,}$|[╭╰]", line):
            parts.append([])
        elif line:
            parts[-1].append(line)
    parts = [part for part in parts if part]
    titled = "╭" not in box and len(parts) > 1  # without box characters the title is a line above the first rule
    text = " ".join(parts[titled]) if parts else ""
    for pattern, words in EXPLANATIONS:
        if match := re.fullmatch(pattern, text):
            return match.expand(words)
    return text
