"""Search spaces in the words of ray.tune, and the configurations that are drawn from them. Needs no cluster."""

from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants

from fbpc_ray.core.config import Config

DIGITS = 4
"""Significant digits of a drawn number: what is written down is what was run."""


def default_space(config: Config, classes: int) -> dict[str, Any]:
    """The hyperparameters of Table 4 around those of `config`."""
    d, last = config.distillation, config.experts.expert_epochs
    m = d.ipc * classes
    return {
        "start_epoch": tune.choice(sorted({max(1, d.start_epoch // 2), d.start_epoch, min(2 * d.start_epoch, last)})),
        "gamma": tune.loguniform(d.gamma / 4, d.gamma * 4),
        "lambda_x": tune.loguniform(d.lambda_x / 4, d.lambda_x * 4),
        "lambda_u": tune.loguniform(d.lambda_u / 4, d.lambda_u * 4),
        "steps": tune.choice(sorted({max(1, d.steps // 2), d.steps, 2 * d.steps})),
        "alpha": tune.loguniform(d.alpha / 8, d.alpha * 8),
        "batch_size": tune.choice(sorted({min(m, size) for size in (max(1, d.batch_size // 2), d.batch_size)})),
    }


def gridded(space: dict[str, Any], grid: dict[str, list[Any]]) -> dict[str, Any]:
    """`space` with all values of `grid` in turn."""
    return space | {name: tune.grid_search(values) for name, values in grid.items()}


def variants(space: dict[str, Any], samples: int, seed: int) -> list[dict[str, Any]]:
    """The flags of each trial: `samples` draws of each combination of the grids in `space`. The same for a seed."""
    functions = {name: value for name, value in space.items() if callable(value) and not isinstance(value, Domain)}
    drawn = {name: value for name, value in space.items() if name not in functions}
    source, found = np.random.default_rng(seed), []
    for _ in range(samples):
        for _, flags in generate_variants(drawn, random_state=source):
            flags = {name: _plain(value, isinstance(drawn[name], Domain)) for name, value in flags.items()}
            for name, function in functions.items():
                flags[name] = _plain(function(dict(flags)), True)
            found.append({name: flags[name] for name in space})
    return found


def _plain(value: Any, drawn: bool) -> Any:
    """A value as JSON holds it."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.{DIGITS}g}") if drawn and isinstance(value, float) else value
