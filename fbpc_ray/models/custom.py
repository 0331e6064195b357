"""Build a user's own network by import path, `package.module:build`, relative to the current folder.

    build(image_shape, classes) -> nn.Module        image_shape = (c, h, w)

The module maps normalised images (b, c, h, w) to logits (b, classes); checks.py lists its further requirements.
"""

import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interrupted

_REGISTERED: dict[str, Callable[..., object]] = {}
"""Functions of this process that can't be imported, such as a notebook's, by the names that `register` returned."""


def register(function: Callable[..., object]) -> str:
    """Return the name of the network that `function` builds: its import path.

    The path of a function that can't be imported is registered, for this process alone.

    Raises:
        UserError: `function` is no function, or has no name.
    """
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    if isinstance(function, nn.Module) or not callable(function):
        raise UserError(
            f"a network must be a function, got {type(function).__name__}: pass a function of (image_shape, classes) "
            "that builds the network; every expert and chain calls it for a new initialisation"
        )
    if "<lambda>" in name or name.startswith(":") or name.endswith(":"):
        raise UserError("a network's function must have a name, under which its experts are stored: define it with def")
    with suppress(Exception):
        if pkgutil.resolve_name(name) is function and function.__module__ != "__main__":
            return name
    _REGISTERED[name] = function
    return name


def importable(name: str) -> bool:
    """Tell whether other processes can build the network called `name`."""
    return name not in _REGISTERED


def build(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Call the function at import path `name`. Raises UserError if that fails or returns no module."""
    with user_code(name):
        make = _REGISTERED.get(name) or pkgutil.resolve_name(name)
        if not callable(make):
            raise UserError(f"{name} is not a function: name one that takes (image_shape, classes)")
        module = make(image_shape, classes)
    if not isinstance(module, nn.Module):
        raise UserError(f"{name} must return a torch.nn.Module, got {type(module).__name__}")
    return module


def import_object(name: str, flag: str, kind: str) -> object:
    """Import the object that `flag` names, of `kind` as `--help` calls it. Raises UserError."""
    search_current_folder()
    with user_code(name, flag, kind):
        return pkgutil.resolve_name(name)


def search_current_folder() -> None:
    """Put the current folder first on sys.path, as `python -m` does; Ray does so for its workers."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


@contextmanager
def user_code(name: str, flag: str = "--architectures", kind: str = "FUNCTION") -> Iterator[None]:
    """Turn any exception of the user's code into a UserError of one line, with its place in that code."""
    try:
        yield
    except (UserError, Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit and GeneratorExit too: they would end the program without a word
        folders = (str(Path(file).parent) for file in (torch.__file__, importlib.__file__, __file__))
        ours = "<", pkgutil.__file__, *folders
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
        where = f" at {places[-1].filename}:{places[-1].lineno}" if places else ""
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        missing = isinstance(error, ImportError | AttributeError | ValueError) and not places
        fix = f"give MODULE:{kind} as Python imports it from this folder" if missing else "fix it"
        code = 2 if isinstance(error, Exception) else 1
        raise UserError(f"{flag} {name} fails{where} ({reason}): {fix}", code) from error
