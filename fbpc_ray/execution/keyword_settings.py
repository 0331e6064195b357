"""Configurations from the keyword arguments of the public functions (api.py)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from fbpc_ray.core import presets
from fbpc_ray.core.config import Config, current_names
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.sizes import LEVELS
from fbpc_ray.data.coreset import Coreset, settings_of
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.execution import validation
from fbpc_ray.execution.coreset_settings import evaluation_settings
from fbpc_ray.execution.sizing import with_sizes
from fbpc_ray.models import custom

Architecture = str | Callable[[tuple[int, int, int], int], nn.Module]
"""A name, or a function of (image_shape, classes)."""


def of_distillation(
    source: Dataset,
    changes: Mapping[str, Any],
    method: str | None,
    preset: str,
    time_budget: str | float,
    backend: str,
    log: Callable[[str], None],
) -> Config:
    """Return the settings of a distillation of `source`: `changes`, else those of the preset, else chosen sizes.

    Raises UserError.
    """
    flags = _with_names(changes)
    _check_preset(preset)
    base = presets.default(source.name, str(flags["ipc"]) if "ipc" in flags else None, preset, method)
    config = validation.canonical(base.updated(**flags, backend=backend))
    request = presets.size_request(source.name, preset, time_budget, set(current_names(flags)))
    config = with_sizes(config, source, request, log)
    validation.check(config)
    local = [name for name in config.networks.architectures if not custom.importable(name)]
    if local and backend == "ray":
        raise UserError(
            f"{local[0]} is defined in this process alone, where Ray workers cannot import it: move it to a module, "
            "or leave out backend='ray'"
        )
    return config


def of_evaluation(
    coreset: Coreset,
    architectures: Architecture | Sequence[Architecture] | None,
    preset: str,
    changes: Mapping[str, Any],
) -> Config:
    """Return the settings of networks and chains: `changes`, else those of `preset`, else those of the coreset.

    Raises UserError.
    """
    _check_preset(preset)
    if preset in LEVELS:
        raise UserError(
            f"--preset {preset}: chooses the sizes of a distillation from its data; leave it out, or give paper"
        )
    start = presets.preset(preset) if preset not in ("", presets.PAPER) else Config()
    stored = {"architectures": list(start.networks.architectures)} if preset else settings_of(coreset)
    named = architectures is not None
    start = start.updated(**evaluation_settings(stored, named))
    return start.updated(**_with_names({**changes, "architectures": architectures} if named else changes))


def _check_preset(preset: object) -> None:
    if not isinstance(preset, str):
        raise UserError(f"--preset: must be of type str, got {preset!r:.80}")


def network_names(architectures: Architecture | Sequence[Architecture]) -> tuple[str, ...]:
    """Return the names of networks; functions are registered under theirs."""
    custom.search_current_folder()
    items = [architectures] if isinstance(architectures, str) or callable(architectures) else architectures
    if not isinstance(items, Iterable):
        raise UserError(f"architectures: must be a name, a function or a list of them, got {items!r:.80}")
    return tuple(one if isinstance(one, str) else custom.register(one) for one in items)


def _with_names(changes: Mapping[str, Any]) -> dict[str, Any]:
    if "architectures" not in changes:
        return dict(changes)
    return {**changes, "architectures": network_names(changes["architectures"])}


def check_names(settings: Mapping[str, Any], function: str, *, without: Sequence[type] = (), prefix: str = "") -> None:
    """Raise UserError for a setting that `function` doesn't take.

    Args:
        without: groups of settings that it doesn't take.
        prefix: start of the names of all settings that it takes.
    """
    excluded = {f.name for group in without for f in fields(group)}
    known = [name for name in Config().flat() if name not in excluded and name.startswith(prefix)]
    for name in current_names(settings):
        if name not in known:
            raise UserError(f"{function} has no setting '{name}': {closest(name, known)}")
