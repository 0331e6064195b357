"""Name arguments of Python, or overrides of `fbpc reproduce`, not flags, in errors and the log."""

import inspect
import re
from collections.abc import Callable, Mapping, Set
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from fbpc_ray.core.config import GROUPS
from fbpc_ray.core.errors import UserError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

FLAG = re.compile(
    r"`[^`]*`|--(?P<no>no-)?(?P<flag>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?: (?P<value>[^\s:;,)|]+(?: \| [^\s:;,)|]+)*))?"
)
"""A command in backticks, which stays; or a flag with the word after it, or with alternatives such as `a | b`."""
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
NEXT_OVERRIDE = re.compile(r"( \w+=[^\s:;,)]+) --override(?= )")
"""An override right after another: both are values of one flag."""
RERUN = re.compile(r"run (the same command( again)?|again)( with --resume)?\b")
"""Advice to run a command once more; a function has no run directory, which --resume needs."""

OTHER_NAMES = {"data_root": "root", "data_seed": "seed"}
"""{setting: argument of `dataset`} where the names differ."""
OTHER_ARGUMENTS = {
    "preset": Literal["quick", "laptop", "gpu", "paper"], "split": Literal["test", "validation"], "time_budget": str,
    "pixels": Literal["auto", "normalised", "unit"],
}  # fmt: skip
"""{argument that is no setting: its type}."""


def names_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make the errors of a public function, and the lines that its argument `log` gets, name its arguments."""
    parameter = inspect.signature(function).parameters.get("log")

    @wraps(function)
    def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        if parameter is not None:
            log: Any = named.get("log", parameter.default)
            named["log"] = lambda line: log(with_arguments(line))
        try:
            return function(*arguments, **named)
        except UserError as error:
            raise UserError(with_arguments(str(error)), error.code) from error.__cause__

    return call


def with_arguments(message: str) -> str:
    """Replace the flags of settings in `message` by arguments: `--width 8` by `width=8`, `--width` by `width`.

    A flag that two spaces follow is the cell of a table: the columns after it stay where they are.
    """
    return FLAG.sub(_aligned, RERUN.sub("call the function again", message))


def _aligned(match: re.Match[str]) -> str:
    text = _argument(match)
    return text.ljust(len(match[0])) if match.string.startswith("  ", match.end()) else text


def with_overrides(message: str, flags: Set[str], fixed: Mapping[str, str]) -> str:
    """Replace the flags of settings in `message` by overrides: `--width 8` by `--override width=8`.

    Args:
        flags: names of flags that the command has, which stay.
        fixed: {setting that no override changes: what stands for its flag}; before a value its name stands.
    """

    def override(match: re.Match[str]) -> str:
        name, value = (match["flag"] or "").replace("-", "_"), match["value"]
        kind = _types().get(name)
        if kind is None or name in OTHER_ARGUMENTS or name in flags:
            return match[0]
        rest = f" {value}" if value else ""
        if name in fixed:
            return f"{name}{rest}" if value else fixed[name]
        if kind is bool:
            return f"--override {name}={'false' if match['no'] else 'true'}{rest}"
        if value and _literal(kind, value):
            return f"--override {name}={value}"
        return f"--override {name}=...{rest}"

    return NEXT_OVERRIDE.sub(r"\1", FLAG.sub(override, message))


def _argument(match: re.Match[str]) -> str:
    name, value = (match["flag"] or "").replace("-", "_"), match["value"]
    kind = _types().get(name)
    if kind is None:
        return match[0]
    name = OTHER_NAMES.get(name, name)
    if kind is bool:
        return f"{name}={not match['no']}{f' {value}' if value else ''}"
    if value is None:
        return name
    text = _literal(kind, value)
    return f"{name}={text}" if text else f"{name} {value}"


def _literal(kind: Any, value: str) -> str:
    """Write the words after a flag of type `kind` as Python does; empty for words of a sentence."""
    if value == "''":
        return value
    if NUMBER.fullmatch(value):
        return "" if kind is str else value
    words = value.split(" | ")
    if get_origin(kind) is Literal and all(word in get_args(kind) for word in words):
        return " | ".join(map(repr, words))
    return repr(value) if kind is str and any(char.isdecimal() for char in value) else ""


def _types() -> dict[str, Any]:
    settings = {name: kind for group in GROUPS for name, kind in get_type_hints(group).items()}
    return settings | OTHER_ARGUMENTS
