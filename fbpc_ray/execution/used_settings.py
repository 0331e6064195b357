"""Which settings the result of a run depends on, by its method and its inference."""

from dataclasses import fields

from fbpc_ray.core.config import Config, Experts
from fbpc_ray.distillation import network_pool
from fbpc_ray.execution.session import uses_experts

FBPC, BPC, POOL = ("fbpc", "fbpc-isotropic"), ("bpc-fkl", "bpc-rkl", "bpc-w"), network_pool.METHODS
_SETTINGS_OF = {
    (*FBPC, *BPC, *POOL): "steps initial_coreset draws_per_step image_average label_lr lr_decay",
    (*FBPC, *BPC): "alpha momentum alpha_decay batch_size start_epoch start_rule learn_labels label_confidence",
    FBPC: "gamma gamma_window map_lr map_max_steps map_init warm_pool_size warm_pool_uses",
    ("fbpc",): "posterior_steps lambda_x lambda_u",
    ("fbpc", "bpc-rkl", *POOL): "real_batch_size",
    (*FBPC, "bpc-fkl", "bpc-rkl"): "mc_samples",
    (*FBPC, "bpc-fkl"): "views",
    BPC: "syn_steps inner_lr",
    ("bpc-w",): "inner_alpha",
    ("bpc-fkl", "bpc-rkl"): "weight_noise",
    ("bpc-rkl",): "rkl_estimator",
    POOL: "image_lr label_scale ridge mirror pool_size pool_steps pool_lr",
    ("vbpc",): "prior_precision kl_weight",
}
_METHODS = {name: methods for methods, names in _SETTINGS_OF.items() for name in names.split()}
"""{setting of the distillation: methods that use it}, without those that all methods use."""
_EXPERTS = {f.name for f in fields(Experts)}


def uses(config: Config, name: str) -> bool:
    """Return whether the coreset of a run, or its scores, depend on the setting `name`."""
    d, e = config.distillation, config.evaluation
    if name in _METHODS:
        return d.method in _METHODS[name] and _is_on(config, name)
    if name in _EXPERTS:
        return uses_experts(config)
    if name == "resize":
        return config.data.image_size > 0
    if name == "augment":
        return uses_experts(config) or (e.inference == "sghmc" and e.chain_augment)
    if name.startswith("chain_"):  # batches of trained networks have the sizes of a chain's
        return e.inference == "sghmc" or name in ("chain_batch_size", "chain_full_batch")
    if name in ("net_ridge", "net_precision"):
        return e.inference == "last-layer"
    if name == "ensemble_size":
        return e.inference == "ensemble"
    return e.inference != "sghmc" or not name.startswith("net_")


def _is_on(config: Config, name: str) -> bool:
    """Return whether the part of its method that a setting is of is switched on."""
    d = config.distillation
    if name in ("warm_pool_size", "warm_pool_uses"):
        return d.map_init == "warm"
    if name in ("label_lr", "lr_decay"):
        return d.learn_labels or d.method in POOL
    return name != "label_confidence" or d.learn_labels
