"""Values of settings that no run can use are refused with their flag; those at the end of a range pass."""

import re

import pytest

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.validation import check

NAN, INF = float("nan"), float("inf")
COUNTS = (
    "ipc", "steps", "batch_size", "map_max_steps", "posterior_steps", "real_batch_size", "mc_samples",
    "checkpoint_every", "width", "expert_count", "expert_epochs", "expert_batch_size", "num_chains", "chain_epochs",
    "chain_every", "chain_batch_size", "syn_steps", "draws_per_step", "gamma_window",
)  # fmt: skip
POSITIVE = (
    "alpha", "gamma", "map_lr", "lambda_x", "lambda_u", "expert_lr", "inner_lr", "placement_timeout",
)  # fmt: skip
NOT_NEGATIVE = (
    "cpus_per_actor", "gpus_per_actor", "chain_d", "chain_eta", "chain_init", "chain_weight_decay", "inner_alpha",
    "weight_noise", "views", "alpha_decay", "image_average", "prefetch", "step_deadline", "skip_stragglers",
)  # fmt: skip
FRACTION = ("momentum", "chain_friction", "validation")


def refused(**changes) -> str:
    with pytest.raises(UserError) as caught:
        check(Config().updated(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.code == 2
    return message


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, bad) for name in COUNTS for bad in (0, -3)),
        *((name, bad) for name in POSITIVE for bad in (0.0, -0.1, NAN, INF)),
        *((name, bad) for name in NOT_NEGATIVE for bad in (-0.1, NAN, INF)),
        *((name, -1) for name in ("threads", "depth", "chain_full_batch")),
        *((name, bad) for name in FRACTION for bad in (-0.1, 1.0, 1.5, NAN, INF)),
    ],
)
def test_a_value_that_no_run_can_use_is_refused_with_its_flag(name, bad):
    """One line that names the flag as the command line spells it, and the value."""
    message = refused(**{name: bad})
    assert re.search(f"--{name.replace('_', '-')}(?![a-z-])", message), message
    assert str(bad) in message


def test_every_number_has_a_range():
    """-1 is refused everywhere but as a seed: a new flag is not forgotten."""
    for name, value in Config().flat().items():
        if type(value) in (int, float) and name not in ("seed", "data_seed", "expert_seed"):
            assert f"--{name.replace('_', '-')}" in refused(**{name: -1}), name


@pytest.mark.parametrize("name", [*COUNTS, *POSITIVE])
def test_the_smallest_values_pass(name):
    """1 of what is counted, and anything above 0 of what is measured."""
    check(Config().updated(**{"chain_every": 1, name: 1 if name in COUNTS else 1e-9}))


@pytest.mark.parametrize("name", ["threads", "depth", "chain_full_batch", *NOT_NEGATIVE, *FRACTION])
def test_zero_passes_where_it_means_something(name):
    """0 threads or depth is automatic; no noise, no prior, no momentum and no validation split are choices."""
    check(Config().updated(**{name: 0}))


def test_a_chain_without_a_sample_is_refused():
    """A sample every 101 steps of 100 would be none; every 100 of 100 is one."""
    message = refused(chain_every=101, chain_epochs=100)
    assert "--chain-every" in message
    assert "--chain-epochs" in message
    check(Config().updated(chain_every=100, chain_epochs=100))


@pytest.mark.parametrize("names", [(), ("convnet-in", "convnet-in"), ("convnet-in", "convnet-gn", "convnet-in")])
def test_no_or_repeated_architectures_are_refused(names):
    """A network named twice would be summed twice and logged over itself."""
    assert "--architectures" in refused(architectures=names)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"start_epoch": 50}, True),
        ({"start_epoch": 51}, False),
        ({"start_epoch": 0}, True),
        ({"start_epoch": -1}, False),
        ({"start_epoch": 21, "expert_epochs": 20}, False),
        ({"start_rule": "before", "start_epoch": 0}, False),
        ({"start_rule": "before", "start_epoch": 1}, True),
        ({"start_rule": "before", "start_epoch": -1}, False),
    ],
)
def test_experts_must_have_an_epoch_to_start_from(changes, passes):
    """from: T..50 must not be empty; before: 0..T-1 must not be. The method `random` needs no expert."""
    if passes:
        check(Config().updated(**changes))
    else:
        assert "--start-epoch" in refused(**changes)
        check(Config().updated(**changes, method="random"))
