"""Settings in a coreset's metadata: what an evaluation of the coreset begins with."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from fbpc_ray.core.config import Config, Evaluation, Networks, current_names
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import start_of


def coreset_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a coreset's metadata keeps, which an evaluation of the coreset begins with.

    These are preset, networks, the image size if it was chosen, and the settings of its evaluation that differ from
    the defaults, but for the number of chains.
    """
    n, d, defaults = config.networks, config.data, Evaluation()
    preset, _ = start_of(config)
    evaluation = {
        name: value for name, value in asdict(config.evaluation).items()
        if name != "num_chains" and value != getattr(defaults, name)
    }  # fmt: skip
    return {
        **({"preset": preset} if preset else {}),
        "architectures": list(n.architectures), "width": n.width, "depth": n.depth, "augment": n.augment,
        **({"image_size": d.image_size, "resize": d.resize} if d.image_size else {}), **evaluation,
    }  # fmt: skip


OF_EVALUATIONS = {f.name for group in (Networks, Evaluation) for f in fields(group)} - {"num_chains"}
OF_EVALUATIONS |= {"image_size", "resize"}
"""Settings of `coreset_settings` that an evaluation takes over."""


def evaluation_settings(stored: Mapping[str, Any], named: bool) -> dict[str, Any]:
    """Return the settings that an evaluation takes over from the metadata of a coreset.

    A coreset's file imports no code: of the networks that it names, those with an import path are left out.

    Args:
        stored: `coreset_settings`, or what a foreign file has in their place.
        named: whether the user names networks.

    Raises UserError where all networks have an import path and the user names none, and for a value of another type.
    """
    settings = {name: value for name, value in current_names(stored).items() if name in OF_EVALUATIONS}
    names = Config().updated(**settings).networks.architectures
    safe = [name for name in names if ":" not in name]
    if not (safe or named):
        raise UserError(f"the coreset was distilled on {names[0]}, but a file alone imports no code: name a network")
    if "architectures" in settings:
        settings["architectures"] = safe
    return {name: value for name, value in settings.items() if value != []}
