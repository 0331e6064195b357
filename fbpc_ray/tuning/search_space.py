"""Draw the flags of trials from search spaces of ray.tune. Needs no cluster."""

from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants

from fbpc_ray.core.config import Config
from fbpc_ray.distillation import network_pool

DIGITS = 4
"""Significant digits of a drawn number, so that the number in the files is the one that ran."""


def default_space(config: Config, classes: int) -> dict[str, Any]:
    """Return the search space of Table 4's hyperparameters, or of vbpc's, around the values of `config`."""
    d, last = config.distillation, config.experts.expert_epochs
    if d.method in network_pool.METHODS:
        rates = ("image_lr", "label_lr", "label_scale", "ridge")
        return {name: tune.loguniform(value / 4, value * 4) for name in rates if (value := getattr(d, name))}
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


def with_grid(space: dict[str, Any], grid: dict[str, list[Any]]) -> dict[str, Any]:
    """Add a grid over all values of `grid` to `space`."""
    return space | {name: tune.grid_search(values) for name, values in grid.items()}


def draw_trials(space: dict[str, Any], samples: int, seed: int) -> list[dict[str, Any]]:
    """Return the flags of each trial: `samples` draws of each combination of the grids in `space`."""
    functions = {name: value for name, value in space.items() if callable(value) and not isinstance(value, Domain)}
    drawn = {name: value for name, value in space.items() if name not in functions}
    source, trials = np.random.default_rng(seed), []
    for _ in range(samples):
        for _, flags in generate_variants(drawn, random_state=source):
            flags = {name: _plain(value, isinstance(drawn[name], Domain)) for name, value in flags.items()}
            for name, function in functions.items():
                flags[name] = _plain(function(dict(flags)), True)
            trials.append({name: flags[name] for name in space})
    return trials


def _plain(value: Any, drawn: bool) -> Any:
    """Return a value for JSON; round a drawn float to `DIGITS` significant digits."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.{DIGITS}g}") if drawn and isinstance(value, float) else value
