"""Name arguments of the Python API, instead of flags of the command line, in messages of errors."""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from fbpc_ray.core.config import GROUPS
from fbpc_ray.core.errors import UserError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

FLAG = re.compile(r"`[^`]*`|--(?P<no>no-)?(?P<flag>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?: (?P<value>[^\s:;,)]+))?")
"""A command in backticks, which stays; or a flag with the word after it."""
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


def names_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make the errors of a public function name its arguments."""

    @wraps(function)
    def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        try:
            return function(*arguments, **named)
        except UserError as error:
            raise UserError(with_arguments(str(error)), error.code) from error.__cause__

    return call


def with_arguments(message: str) -> str:
    """Replace the flags of settings in `message` by arguments: `--width 8` by `width=8`, `--width` by `width`."""
    return FLAG.sub(_argument, message)


def _argument(match: re.Match[str]) -> str:
    name = (match["flag"] or "").replace("-", "_")
    kind = _types().get(name)
    if kind is None:
        return match[0]
    if kind is bool:
        rest = f" {match['value']}" if match["value"] else ""
        return f"{name}={not match['no']}{rest}"
    if match["value"] is None:
        return name
    if kind is not str and NUMBER.fullmatch(match["value"]):
        return f"{name}={match['value']}"
    if get_origin(kind) is Literal and match["value"] in get_args(kind):
        return f"{name}={match['value']!r}"
    return f"{name} {match['value']}"


def _types() -> dict[str, Any]:
    settings = {name: kind for group in GROUPS for name, kind in get_type_hints(group).items()}
    return settings | {"preset": str, "split": str}
