"""Ranges of numeric flags; an upper end is far above any use, below what hangs or overflows."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fbpc_ray.core.errors import UserError


class Range(NamedTuple):
    """The values that a number may have."""

    least: float
    most: float
    open_low: bool = False
    """`least` itself is not allowed."""
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Return whether `value` is in the range; NaN is in none."""
        above = value > self.least if self.open_low else value >= self.least
        return above and (value < self.most if self.open_high else value <= self.most)

    def describe(self, value: float) -> str:
        """Return the end of the range that `value` is beyond, in words; both for NaN."""
        low = f"above {_text(self.least)}" if self.open_low else f"{_text(self.least)} or more"
        high = f"below {_text(self.most)}" if self.open_high else f"at most {_text(self.most)}"
        if value > self.least:
            return high
        return low if value <= self.least else f"{low} and {high}"


def _text(bound: float) -> str:
    return f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"


LARGE = 1e9
"""Of counts in time, and of rates: the square of a rate is still a float32."""
COUNT, OPTIONAL_COUNT = Range(1, LARGE), Range(0, LARGE)
POSITIVE, NOT_NEGATIVE = Range(0, LARGE, open_low=True), Range(0, LARGE)
FRACTION = Range(0, 1, open_high=True)
IN_MEMORY = Range(1, 1e6)
"""Of what lies in memory at once."""

RANGES: dict[str, Range] = {
    "ipc": Range(1, 1e5), "steps": COUNT, "batch_size": IN_MEMORY, "posterior_steps": Range(1, 1e4),
    "mc_samples": Range(1, 1e5), "real_batch_size": IN_MEMORY, "map_max_steps": COUNT, "checkpoint_every": COUNT,
    "width": Range(1, 8192), "depth": Range(0, 16), "draws_per_step": Range(1, 1e4), "syn_steps": COUNT,
    "warm_pool_size": Range(1, 1e4), "warm_pool_uses": COUNT, "pool_size": Range(1, 1e4), "pool_steps": COUNT,
    "expert_count": Range(1, 99999), "expert_epochs": Range(1, 1e5), "expert_batch_size": IN_MEMORY,
    "num_chains": Range(1, 1e4), "chain_epochs": COUNT, "chain_every": COUNT, "chain_batch_size": IN_MEMORY,
    "chain_full_batch": Range(0, 1e6), "net_steps": OPTIONAL_COUNT, "ensemble_size": Range(1, 1e4),
    "alpha": Range(0, 1e30, open_low=True),  # a run that diverges ends with a line that names --alpha
    "gamma": POSITIVE, "map_lr": POSITIVE, "lambda_x": POSITIVE, "lambda_u": POSITIVE,
    "expert_lr": POSITIVE, "inner_lr": POSITIVE, "image_lr": POSITIVE, "pool_lr": POSITIVE,
    "net_lr": POSITIVE, "label_scale": POSITIVE, "ridge": POSITIVE, "prior_precision": POSITIVE, "net_ridge": POSITIVE,
    "net_label_scale": POSITIVE, "net_target_scale": POSITIVE, "net_precision": POSITIVE,
    "label_confidence": Range(0, 1, open_low=True, open_high=True),
    "label_lr": NOT_NEGATIVE, "lr_decay": OPTIONAL_COUNT, "kl_weight": NOT_NEGATIVE, "chain_d": NOT_NEGATIVE,
    "chain_eta": NOT_NEGATIVE, "chain_init": NOT_NEGATIVE, "chain_weight_decay": NOT_NEGATIVE,
    "inner_alpha": NOT_NEGATIVE, "weight_noise": NOT_NEGATIVE,
    "views": Range(0, 1e4), "gamma_window": Range(1, 1e4), "alpha_decay": OPTIONAL_COUNT, "image_average": Range(0, 1),
    "momentum": FRACTION, "chain_friction": FRACTION, "validation": Range(0, 0.9), "test": Range(0, 0.9),
    "image_size": Range(0, 4096), "chunk_images": Range(0, 1e6),
    "threads": Range(0, 512), "cpus_per_actor": Range(0, 1e4), "gpus_per_actor": Range(0, 1e4),
    "placement_timeout": POSITIVE, "prefetch": Range(0, 1e4), "trajectory_cache_gb": NOT_NEGATIVE,
    "val_every": OPTIONAL_COUNT, "step_deadline": NOT_NEGATIVE, "skip_stragglers": NOT_NEGATIVE,
}  # fmt: skip
"""{setting: range}. Seeds and --start-epoch have none but that of a 64-bit integer."""

OF_COMMANDS: dict[str, Range] = {
    "num_trials": Range(0, 1e5), "val_chain_epochs": OPTIONAL_COUNT, "val_chains": Range(1, 1e4),
    "workers_per_trial": Range(0, 1e4), "distill_seeds": Range(0, 1e4), "cost_steps": Range(1, 1e6),
    "port": Range(0, 65535),
}  # fmt: skip
"""{flag of a command that is no setting of a run: range}."""

INTEGER = Range(-(2**63), 2**63, open_high=True)


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raise UserError for a setting outside of its range."""
    for name, allowed in RANGES.items():
        if name in values and not allowed.holds(values[name]):
            _refuse(name, values[name], allowed)


def check_flags(values: Mapping[str, Any]) -> None:
    """Raise UserError for a number that no flag of its name takes, before the command begins.

    A 0 that means "as elsewhere" passes: the lower ends of a run's settings are left to `check_ranges`.
    """
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                whole = OF_COMMANDS.get(name) or RANGES.get(name, INTEGER)
                allowed = whole._replace(least=-math.inf) if name in RANGES else whole
                if not allowed.holds(number):
                    _refuse(name, number, whole)


def _refuse(name: str, value: float, allowed: Range) -> None:
    text = str(value) if isinstance(value, float) or abs(value) < 10**20 else "a number of more than 20 digits"
    raise UserError(f"--{name.replace('_', '-')}: must be {allowed.describe(value)}, got {text}")
