"""What a method is said not to use changes no bit of its coreset; what an inference is said not to use, no score."""

from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from support.runs import SMALL, silent

from fbpc_ray import api
from fbpc_ray.core.config import ELSEWHERE, Config, Distillation, Evaluation, Experts
from fbpc_ray.execution.used_settings import uses

METHODS, INFERENCES = (
    get_args(get_type_hints(group)[name]) for group, name in ((Distillation, "method"), (Evaluation, "inference"))
)
WORDS = {"start_rule": "before", "map_init": "warm", "rkl_estimator": "authors", "expert_dtype": "float16",
         "chain_noise": "gradient"}  # fmt: skip
"""Other values of the settings that are no numbers."""


def other_values(config: Config, names: set[str]) -> dict[str, Any]:
    """Values in range that differ from those of `config`."""
    flat = config.flat()
    return {
        name: WORDS[name] if name in WORDS else not flat[name] if isinstance(flat[name], bool)
        else flat[name] + 2 if isinstance(flat[name], int) else 0.5 * flat[name] + 0.05
        for name in names
    }  # fmt: skip


def config_of(small: Config, method: str) -> Config:
    e = small.experts
    return Config().updated(
        **SMALL | {"architectures": ("convnet-in",), "steps": 2}, method=method, syn_steps=2, pool_size=2,
        experts=e.experts, expert_lr=e.expert_lr, expert_batch_size=e.expert_batch_size,
    )  # fmt: skip


def distilled(config: Config, digits, **changes: Any) -> api.Coreset:
    groups = (config.networks, config.experts, config.distillation)
    settings = {name: value for group in groups for name, value in asdict(group).items()}
    return api.distill(digits, **settings | {"threads": 1, "trajectory_cache_gb": 0.0} | changes, log=silent)


def same(one: api.Coreset, other: api.Coreset) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.likelihood_labels, other.likelihood_labels)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_use_changes_no_bit(method, small, digits):
    """All such settings at once, those of the experts too."""
    config = config_of(small, method)
    names = {f.name for group in (Distillation, Experts) for f in fields(group)} - ELSEWHERE
    unused = {name for name in names if not uses(config, name)}
    unused -= {"initial_coreset", "learn_labels"} if method == "random" else set()  # are refused
    assert len(unused) >= 7
    assert same(distilled(config, digits), distilled(config, digits, **other_values(config, unused)))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("fbpc", ("lambda_u", "views")), ("fbpc-isotropic", ("mc_samples", "map_lr")), ("bpc-fkl", ("views",)),
        ("bpc-rkl", ("real_batch_size", "rkl_estimator")), ("bpc-w", ("inner_alpha",)),
        ("vbpc", ("kl_weight", "label_lr")), ("frepo", ("real_batch_size",)),
    ],
)  # fmt: skip
def test_what_a_method_uses_changes_its_coreset(method, names, small, digits):
    config = config_of(small, method)
    first = distilled(config, digits)
    for name, value in other_values(config, set(names)).items():
        assert uses(config, name) and not same(first, distilled(config, digits, **{name: value}))


@pytest.mark.parametrize("inference", INFERENCES)
def test_what_an_inference_does_not_use_changes_no_score(inference, digits):
    """And the sizes of the batches, which trained networks share with chains, change the scores of all."""
    coreset = api.distill(digits, "convnet-in", method="random", ipc=2, width=8, log=silent)
    brief = {"inference": inference, "num_chains": 1, "chain_epochs": 4, "chain_every": 2, "net_steps": 3}
    config = Config().updated(**brief, ensemble_size=2)
    settings = asdict(config.evaluation) | {"architectures": "convnet-in", "width": 8, "log": silent}
    unused = {f.name for f in fields(Evaluation) if not uses(config, f.name)}
    assert len(unused) >= 5
    first = api.evaluate(coreset, digits, **settings)
    assert first == api.evaluate(coreset, digits, **settings | other_values(config, unused))
    batches: dict[str, Any] = {"chain_full_batch": 3, "chain_batch_size": 3}
    assert all(uses(config, name) for name in batches)
    assert first != api.evaluate(coreset, digits, **settings | batches)
