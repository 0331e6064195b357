"""Check a configuration: ranges, combinations of flags, names of networks."""

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.ranges import check_ranges
from fbpc_ray.core.storage import place
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.methods.bpc import AHEAD
from fbpc_ray.distillation.methods.common import expert_epochs
from fbpc_ray.execution import memory_budget
from fbpc_ray.models import registry


def validate(config: Config) -> Config:
    """Return the configuration with canonical names of networks. Raises UserError for values that no run can use."""
    config = canonical(config)
    check(config)
    return config


def canonical(config: Config) -> Config:
    """Give each network its canonical name, so that equal networks have equal names; make --initial-coreset absolute.

    Raises UserError.
    """
    names = config.networks.architectures
    if not names:
        raise UserError("--architectures: must name a network, got none")
    canonical_names = tuple(registry.canonical(name) for name in names)
    repeated = [name for name in canonical_names if canonical_names.count(name) > 1]
    if repeated:
        raise UserError(f"--architectures {' '.join(names)}: {repeated[0]} is given twice; name each network once")
    initial = config.distillation.initial_coreset
    return config.updated(
        architectures=canonical_names, initial_coreset=str(place(initial).absolute()) if initial else ""
    )


def check(config: Config) -> None:
    """Raise UserError for values that no run can use."""
    flat = config.flat()
    check_ranges(flat)
    if flat["chain_every"] > flat["chain_epochs"]:
        raise UserError("--chain-every is above --chain-epochs: no posterior sample would be taken; lower it")
    if flat["val_every"] and not flat["validation"]:
        raise UserError(f"--val-every {flat['val_every']} needs a validation split: add --validation 0.1")
    canonical(config)
    method = config.distillation.method
    if method in network_pool.METHODS:
        if flat["draws_per_step"] > flat["pool_size"]:
            raise UserError(
                f"--draws-per-step {flat['draws_per_step']}: {method} draws that many different networks of the "
                "pool; raise --pool-size to it, or lower --draws-per-step"
            )
    elif method != "random":
        expert_epochs(flat["start_epoch"], flat["start_rule"], flat["expert_epochs"], AHEAD.get(method, 0))
    if method in network_pool.METHODS and flat["precision"] != "fp32":
        raise UserError(f"--precision {flat['precision']}: --method {method} supports fp32 alone; use --precision fp32")
    if flat["initial_coreset"]:
        check_initial_coreset(method)
    if flat["learn_labels"] and method == "random":
        raise UserError("--learn-labels: --method random learns nothing; choose another method, or --no-learn-labels")
    memory_budget.check(config)
    if method == "bpc-rkl" and flat["mc_samples"] < 2:
        raise UserError("--mc-samples: must be 2 or more for the covariance of bpc-rkl, got 1")


def check_initial_coreset(method: str) -> None:
    """Raise UserError for a method without steps that would begin with --initial-coreset."""
    if method == "random":
        raise UserError(
            "--initial-coreset: --method random learns nothing; choose another method, or score the coreset by "
            "`fbpc evaluate --coreset`"
        )
