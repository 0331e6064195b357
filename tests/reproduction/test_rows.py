"""Keys of the rows of a reproduction: those of earlier versions, whatever settings came later."""

from dataclasses import fields

import pytest

from fbpc_ray.core.config import ELSEWHERE, Config, Data, Distillation, Experts, Networks
from fbpc_ray.core.presets import preset, with_method
from fbpc_ray.reproduction.rows import cell_key, coreset_key

EARLIER = {"chain_d": 0.01, "chain_eta": 0.03, "chain_weight_decay": 0.05, "chain_init": 0.0}
"""Chains of the version before vbpc."""
UNUSED = {
    "image_lr": 0.5, "lr_decay": 7, "pool_size": 3, "mirror": False, "net_steps": 3, "ensemble_size": 2,
    "net_target_scale": 2.0,
}  # fmt: skip


def cell(config: Config) -> str:
    return cell_key("table1", "FBPC", "CIFAR10 ipc 1", "test", config)


@pytest.mark.parametrize(
    ("config", "of_coreset", "of_cell"),
    [
        (Config(), "60a5da43dc2072c2", "1a07ec1e3c1166b2"),
        (preset("cifar10-ipc10").updated(map_init="warm"), "1788609e18334751", "d8acee620c34b7c0"),
        (preset("digits").updated(method="random"), "3e84b09e0e068f35", "4c12e1f5f61e5fe0"),
    ],
    ids=["defaults", "warm", "random"],
)
def test_keys_are_those_of_the_version_before_vbpc(config, of_coreset, of_cell):
    """Written down at commit be9dee1; settings of vbpc and of trained networks change nothing where unused."""
    config = config.updated(**EARLIER)
    for same in (config, config.updated(**UNUSED)):
        assert (coreset_key(same), cell(same)) == (of_coreset, of_cell)


def test_settings_that_are_used_change_the_keys():
    vbpc = with_method(preset("cifar10-ipc1"), "vbpc", 1)
    assert coreset_key(vbpc.updated(pool_size=3)) != coreset_key(vbpc)
    assert coreset_key(vbpc.updated(net_steps=3)) == coreset_key(vbpc)
    assert cell(vbpc.updated(net_steps=3)) != cell(vbpc)
    assert cell(Config().updated(inference="mse")) != cell(Config())
    assert cell(Config().updated(chain_init=0.1)) != cell(Config())
    networks = Config().updated(inference="mse")
    assert cell(networks.updated(net_target_scale=1.4)) != cell(networks)
    assert cell(networks.updated(chain_d=0.5, chain_init=0.1, chain_epochs=7)) == cell(networks)


def test_sizes_of_batches_change_the_keys_of_trained_networks():
    """They are those of a chain; at their defaults the key is that of the version that left them out."""
    networks = Config().updated(inference="mse")
    assert cell(networks) == "12766cfe3e2b0045"
    changed = [networks.updated(chain_full_batch=9), networks.updated(chain_batch_size=9)]
    assert len({cell(config) for config in (networks, *changed)}) == 3
    assert {coreset_key(config) for config in changed} == {coreset_key(networks)}


WORDS = {
    "data": "cifar10", "normalisation": "computed", "resize": "stretch", "label_column": "x", "image_column": "x",
    "architectures": ("lenet",), "augment": "none", "precision": "bf16", "memory_budget": "6GB",
    "expert_dtype": "float16", "method": "bpc-fkl", "initial_coreset": "x.npz", "start_rule": "before",
    "map_init": "warm", "rkl_estimator": "authors",
}  # fmt: skip
"""Other values of the settings that are no numbers."""
OF_LABELS, OF_WARM_STARTS, OF_RESIZING = {"label_lr", "lr_decay"}, {"warm_pool_size", "warm_pool_uses"}, {"resize"}
OF_POOLS = {
    "image_lr", "label_scale", "ridge", "prior_precision", "kl_weight", "mirror", "pool_size", "pool_steps", "pool_lr",
}  # fmt: skip
SETTINGS = {f.name for group in (Data, Networks, Experts, Distillation) for f in fields(group)} - ELSEWHERE


def settings_that_count(config: Config) -> set[str]:
    """Settings that change the key of a coreset of `config`, each alone."""
    values, counting = config.flat(), set[str]()
    for name in SETTINGS:
        value = values[name]
        other = WORDS[name] if name in WORDS else not value if isinstance(value, bool) else value + 1
        if coreset_key(config.updated(**{name: other})) != coreset_key(config):
            counting.add(name)
    return counting


def test_every_setting_counts_where_it_is_used():
    """A setting without effect on a coreset would only make it again; one that is forgotten gives a stale coreset."""
    unused = OF_LABELS | OF_WARM_STARTS | OF_RESIZING | OF_POOLS | {"label_confidence"}
    assert SETTINGS - settings_that_count(Config()) == unused
    for changes, used in (
        ({"learn_labels": True}, OF_LABELS | {"label_confidence"}),
        ({"map_init": "warm"}, OF_WARM_STARTS),
        ({"image_size": 8}, OF_RESIZING),
        ({"method": "vbpc"}, OF_POOLS | OF_LABELS),
    ):
        assert settings_that_count(Config().updated(**changes)) & unused == used
