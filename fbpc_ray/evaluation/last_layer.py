"""Evaluate a coreset by networks with squared loss: `--inference last-layer | mse | ensemble`.

    last-layer   one network; its last layer is replaced by its posterior in closed form (inference/last_layer.py)
    mse          the softmax of that network's own outputs
    ensemble     the mean softmax of R such networks

Targets are the soft labels of the coreset, or --net-label-scale times the centred one-hot labels; all of them times
--net-target-scale. No augmentation but the mirror images.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.progress import set_part
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Params
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.evaluation import ensemble
from fbpc_ray.evaluation.chains import (
    Chain,
    ChainResult,
    CoresetArrays,
    EvaluationContext,
    Predictor,
    arrays_of,
    batch_size,
    chain_result,
    fitting_share,
    sample_predictor,
)
from fbpc_ray.evaluation.ensemble import Ensemble
from fbpc_ray.evaluation.scoring import Logits, average_of
from fbpc_ray.inference.adam import adam_start
from fbpc_ray.inference.last_layer import LastLayer, one_hot_targets
from fbpc_ray.inference.vectors import flatten, unflatten
from fbpc_ray.models import last_layer
from fbpc_ray.models.functional import Network, equal_batches
from fbpc_ray.models.last_layer import Targets
from fbpc_ray.models.passes import Passes


def run_networks(context: EvaluationContext, chain: Chain, device: str) -> ChainResult:
    """Train the networks of one seed on the coreset, and score their predictions; as `run_chain`."""
    start = time.perf_counter()
    return chain_result(context, chain, fit_networks(context, chain, device), device, start)


def fit_networks(context: EvaluationContext, chain: Chain, device: str) -> Predictor | None:
    """Train the networks of one seed on the coreset; return what they predict, None where training diverged."""
    settings, network = context.settings, Network(chain.spec, device)
    data = targets_of(context, chain, device)
    fitted = 3 * settings.net_steps * batch_size(settings, len(data.images))
    share = fitting_share(fitted, len(context.split.labels), context)
    samples = [
        train_network(network, data, settings, chain.seed, member, share) for member in range(num_networks(settings))
    ]
    if not ensemble.finite(samples):
        return None
    if settings.inference == "last-layer":
        return Predictor(closed_form(network, samples[0], data, settings), samples)
    return Predictor(average_of(Passes(network), samples, data.images), samples)


def num_networks(settings: Evaluation) -> int:
    """Return the networks that are trained for one seed."""
    return settings.ensemble_size if settings.inference == "ensemble" else 1


def batch_images(settings: Evaluation, m: int) -> int:
    """Return the images of a training step on a coreset of m images, mirror images included."""
    return batch_size(settings, 2 * m if settings.net_mirror else m)


def targets_of(context: EvaluationContext, chain: Chain, device: str) -> Targets:
    """Return the coreset's images with their regression targets, with the mirror images if --net-mirror."""
    return _targets(context.coresets[chain.coreset], chain.spec.classes, context.settings, device)


def _targets(arrays: CoresetArrays, classes: int, settings: Evaluation, device: str) -> Targets:
    if arrays.soft_labels is None:
        targets = one_hot_targets(torch.tensor(arrays.labels), classes, settings.net_label_scale)
    else:
        targets = torch.tensor(arrays.soft_labels)
    targets = settings.net_target_scale * targets.to(device)
    data = Targets(torch.tensor(arrays.images, device=device), targets)
    return data.with_mirror_images() if settings.net_mirror else data


def train_network(
    network: Network, data: Targets, settings: Evaluation, seed: int, member: int, share: float = 1.0
) -> Params:
    """Return the parameters after `net_steps` Adam steps on the squared loss, from a draw of the prior.

    `share` is the part of the work for one seed that training its networks is, for the progress bar.
    """
    name = network.spec.architecture
    passes = Passes(network)
    state = adam_start(flatten(network.init(generator(seed, "network", name, member))))
    total = settings.net_steps * num_networks(settings)
    batches = _batches(len(data.images), settings, generator(seed, "network", name, member, "batch"))
    for step, index in enumerate(batches, 1):
        batch = data if index is None else Targets(data.images[index], data.targets[index])
        state = last_layer.train_step(passes, state, batch, settings.net_lr)
        set_part(share * (member * settings.net_steps + step), total)
    return unflatten(state.value, network.shapes)


def closed_form(network: Network, params: Params, data: Targets, settings: Evaluation) -> Logits:
    """Return the function of images to logits (1, b, d) by the last layer's posterior given the coreset."""
    statistics = network.statistics(params, equal_batches(data.images))
    layer = layer_of(network, params, statistics, data, settings)
    return lambda images: last_layer.closed_form_logits(network, params, statistics, layer, images)


def layer_of(network: Network, params: Params, statistics: Params, data: Targets, settings: Evaluation) -> LastLayer:
    """Return the posterior of the last layer of a trained network."""
    features = last_layer.scaled_features(network, params, statistics, data.images)
    return last_layer.posterior(features, data.targets, settings.net_ridge, settings.net_precision)


def gathered(network: Network, samples: Sequence[Params], coreset: Coreset, settings: Evaluation) -> Ensemble:
    """Return trained networks as an ensemble that predicts as they were scored: BatchNorm's statistics are those of
    the coreset with its mirror images, and `last-layer` brings the posterior of its last layer."""
    data = _targets(arrays_of(coreset), network.spec.classes, settings, str(network.device))
    trained_ensemble = ensemble.gathered(network, samples, coreset._replace(images=data.images))
    if settings.inference != "last-layer":
        return trained_ensemble
    layer = layer_of(network, samples[0], trained_ensemble.statistics[0], data, settings)
    return replace(trained_ensemble, last_layer=layer)


def _batches(size: int, settings: Evaluation, source: torch.Generator) -> Iterator[Tensor | None]:
    """Yield the indices of each step's batch; None for all images, if they are at most --chain-full-batch."""
    whole, count = size <= settings.chain_full_batch, settings.chain_batch_size
    for _ in range(settings.net_steps):
        yield None if whole else torch.randperm(size, generator=source)[:count]


RUNNERS: dict[str, Callable[[EvaluationContext, Chain, str], ChainResult]] = {
    "last-layer": run_networks, "mse": run_networks, "ensemble": run_networks,
}  # fmt: skip
"""Values of `--inference`, beside sghmc."""

PREDICTORS: dict[str, Callable[[EvaluationContext, Chain, str], Predictor | None]] = {
    "sghmc": sample_predictor, **dict.fromkeys(RUNNERS, fit_networks)
}  # fmt: skip
"""Inference alone, without its scores, for every value of `--inference`."""
