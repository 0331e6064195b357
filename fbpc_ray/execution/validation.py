"""Check a configuration: ranges, combinations of flags, names of networks."""

from collections.abc import Callable
from typing import Any

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.methods.bpc import AHEAD
from fbpc_ray.distillation.methods.common import expert_epochs
from fbpc_ray.models import registry

_COUNT = ("1 or more", lambda value: value >= 1)
_POSITIVE = ("above 0 and finite", lambda value: 0 < value < float("inf"))
_NOT_NEGATIVE = ("0 or more", lambda value: 0 <= value < float("inf"))
_FRACTION = ("from 0 to below 1", lambda value: 0 <= value < 1)
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "ipc": _COUNT, "steps": _COUNT, "batch_size": _COUNT, "posterior_steps": _COUNT, "mc_samples": _COUNT,
    "real_batch_size": _COUNT, "map_max_steps": _COUNT, "checkpoint_every": _COUNT, "width": _COUNT,
    "expert_count": _COUNT, "expert_epochs": _COUNT, "expert_batch_size": _COUNT, "num_chains": _COUNT,
    "warm_pool_size": _COUNT, "warm_pool_uses": _COUNT,
    "chain_epochs": _COUNT, "syn_steps": _COUNT, "chain_every": _COUNT, "chain_batch_size": _COUNT,
    "alpha": _POSITIVE, "gamma": _POSITIVE, "map_lr": _POSITIVE, "lambda_x": _POSITIVE, "lambda_u": _POSITIVE,
    "expert_lr": _POSITIVE, "inner_lr": _POSITIVE, "chain_eta": _POSITIVE,
    "threads": _NOT_NEGATIVE, "depth": _NOT_NEGATIVE, "cpus_per_actor": _NOT_NEGATIVE,
    "gpus_per_actor": _NOT_NEGATIVE, "placement_timeout": _POSITIVE, "prefetch": _NOT_NEGATIVE,
    "trajectory_cache_gb": _NOT_NEGATIVE, "val_every": _NOT_NEGATIVE,
    "step_deadline": _NOT_NEGATIVE, "skip_stragglers": _NOT_NEGATIVE, "draws_per_step": _COUNT,
    "image_lr": _POSITIVE, "label_lr": _NOT_NEGATIVE, "lr_decay": _NOT_NEGATIVE, "label_scale": _POSITIVE,
    "ridge": _POSITIVE,
    "precision": _POSITIVE, "kl_weight": _NOT_NEGATIVE, "pool_size": _COUNT, "pool_steps": _COUNT,
    "pool_lr": _POSITIVE, "net_steps": _NOT_NEGATIVE, "net_lr": _POSITIVE, "net_label_scale": _POSITIVE,
    "net_ridge": _POSITIVE, "net_precision": _POSITIVE, "ensemble_size": _COUNT,
    "chain_d": _NOT_NEGATIVE, "chain_init": _NOT_NEGATIVE, "chain_weight_decay": _NOT_NEGATIVE,
    "inner_alpha": _NOT_NEGATIVE, "weight_noise": _NOT_NEGATIVE,
    "chain_full_batch": _NOT_NEGATIVE, "momentum": _FRACTION, "chain_friction": _FRACTION, "validation": _FRACTION,
}  # fmt: skip
"""What each flag may be."""


def validate(config: Config) -> Config:
    """Return the configuration with canonical names of networks. Raises UserError for values that no run can use."""
    config = canonical(config)
    check(config)
    return config


def canonical(config: Config) -> Config:
    """Give each network its canonical name, so that equal networks have equal names. Raises UserError."""
    names = config.networks.architectures
    if not names:
        raise UserError("--architectures is empty: name a network")
    canonical_names = tuple(registry.canonical(name) for name in names)
    repeated = [name for name in canonical_names if canonical_names.count(name) > 1]
    if repeated:
        raise UserError(f"--architectures {' '.join(names)}: {repeated[0]} is there twice; name each network once")
    return config.updated(architectures=canonical_names)


def check(config: Config) -> None:
    """Raise UserError for values that no run can use."""
    flat = config.flat()
    for name, (allowed, holds) in RANGES.items():
        if not holds(flat[name]):
            raise UserError(f"--{name.replace('_', '-')} is {flat[name]}: it must be {allowed}")
    if flat["chain_every"] > flat["chain_epochs"]:
        raise UserError("--chain-every is above --chain-epochs: no posterior sample would be taken; lower it")
    if flat["val_every"] and not flat["validation"]:
        raise UserError(f"--val-every {flat['val_every']} looks at the validation split: add --validation 0.1")
    canonical(config)
    method = config.distillation.method
    if method in network_pool.METHODS:
        if flat["draws_per_step"] > flat["pool_size"]:
            raise UserError(
                f"--draws-per-step {flat['draws_per_step']}: {method} draws networks of the pool without replacement; "
                "raise --pool-size to it, or lower it"
            )
    elif method != "random":
        expert_epochs(flat["start_epoch"], flat["start_rule"], flat["expert_epochs"], AHEAD.get(method, 0))
    if method == "bpc-rkl" and flat["mc_samples"] < 2:
        raise UserError("--mc-samples is 1: the covariance of bpc-rkl needs 2 or more draws")
