"""A user's own network by import path: `package.module:build`, found from the current folder.

    build(image_shape, classes) -> nn.Module        image_shape = (c, h, w)

The module maps normalised images (b, c, h, w) to logits (b, classes); what else it must hold to is in contract.py.
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

_GIVEN: dict[str, Callable[..., object]] = {}
"""Functions of this process that no import path leads to, such as a notebook's, by the names that `given` gave."""


def given(function: Callable[..., object]) -> str:
    """The name of a network that `function` builds: its import path, or, for one that can't be imported, the same
    pattern, known to this process alone. Raises UserError for what is no function with a name."""
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    if isinstance(function, nn.Module) or not callable(function):
        raise UserError(
            f"a network is given as {type(function).__name__}: give a function of (image_shape, classes) that builds "
            "it, for it is drawn anew for every expert and chain"
        )
    if "<lambda>" in name or name.startswith(":") or name.endswith(":"):
        raise UserError("a network is given as a function without a name: define it with def, for its experts are kept")
    with suppress(Exception):
        if pkgutil.resolve_name(name) is function and function.__module__ != "__main__":
            return name
    _GIVEN[name] = function
    return name


def importable(name: str) -> bool:
    """Whether other processes find the network called `name` too."""
    return name not in _GIVEN


def build(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """What the function at import path `name` builds. Raises UserError."""
    with users_code(name):
        make = _GIVEN.get(name) or pkgutil.resolve_name(name)
        if not callable(make):
            raise UserError(f"{name} is no function: name one that takes (image_shape, classes)")
        module = make(image_shape, classes)
    if not isinstance(module, nn.Module):
        raise UserError(f"{name} returns {type(module).__name__}: it must return a torch.nn.Module")
    return module


def named(name: str, flag: str, kind: str) -> object:
    """What `flag` names by import path, a `kind` in the user's words. Raises UserError."""
    search_current_folder()
    with users_code(name, flag, kind):
        return pkgutil.resolve_name(name)


def search_current_folder() -> None:
    """Look for modules in the current folder first, as `python -m` does. Ray gives its workers the driver's itself."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


@contextmanager
def users_code(name: str, flag: str = "--architectures", kind: str = "FUNCTION") -> Iterator[None]:
    """Around code of the user: whatever it raises is a UserError of one line that names the place in that code."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        folders = (str(Path(file).parent) for file in (torch.__file__, importlib.__file__, __file__))
        ours = "<", pkgutil.__file__, *folders
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
        where = f" at {places[-1].filename}:{places[-1].lineno}" if places else ""
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        missing = isinstance(error, ImportError | AttributeError | ValueError) and not places
        fix = f"give MODULE:{kind} as Python imports it from this folder" if missing else "fix it"
        raise UserError(f"{flag} {name} fails{where} ({what}): {fix}") from error
