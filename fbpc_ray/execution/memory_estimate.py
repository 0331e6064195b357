"""Estimate the memory of a run from its settings, and refuse a run that cannot fit.

    a pass with gradient       PER_ACTIVATION x 4 bytes x activations of an image x images
    a network at work          PARAMETER_COPIES x 4 bytes x parameters

The estimates stay below what a run takes (measured: 1.1 to 1.7 times as much), so that no run is refused that
would fit. Memory of a GPU is not estimated.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fbpc_ray.core import cores, memory
from fbpc_ray.core.config import Config
from fbpc_ray.core.rng import generator
from fbpc_ray.distillation import network_pool
from fbpc_ray.evaluation.chains import batch_size
from fbpc_ray.models.functional import Network, Spec, build
from fbpc_ray.models.passes import PARTS

PER_ACTIVATION = 1.1
"""Memory of a pass with gradient, in units of its activations as float32; measured in workers: 1.2 to 1.9."""
MODULES = 3
"""Copies of the parameters that a `Network` holds."""
PARAMETER_COPIES = MODULES + 4
"""Of a network at work: with theta, its gradient, Adam's two moments."""
IMAGE_COPIES = 4
"""Of the pseudocoreset in the driver: its start, u, its velocity, the gradient."""
REFERENCE = Config().flat()
"""Usual values: of several flags that multiply, the one furthest above its usual value is named."""


class NetworkSize(NamedTuple):
    """Numbers of float32 values of a network."""

    parameters: int
    activations: int = 0
    """Outputs of all layers for one image; 0 while only parameters count."""


@dataclass(frozen=True)
class Problem:
    """Sizes that the memory depends on."""

    images: int
    """Training images."""
    coreset: int
    """m."""
    pixels: int
    """c h w."""
    classes: int
    networks: Sequence[NetworkSize]
    workers: int = 1
    """Gradients that this machine computes at the same time; 0 where other machines or GPUs do."""
    chains: int = 1
    """Chains, or trained networks, that this machine runs at the same time."""


class Need(NamedTuple):
    """Memory for one purpose."""

    bytes: float
    name: str
    flags: tuple[str, ...]
    """Settings that it grows with."""


@lru_cache(maxsize=1024)
def count_parameters(spec: Spec) -> int:
    """Count parameters without allocating them; a user's own network is built. Raises UserError if it can't be."""
    if _is_own(spec):
        return Network(spec).parameter_count
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(value.numel() for value in build(spec).parameters())


@lru_cache(maxsize=1024)
def count_activations(spec: Spec) -> int:
    """Count the outputs of all layers for one image, in a forward pass.

    A pass on torch's meta device would take no memory, but imports sympy, for ten seconds.
    """
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel()

    module = Network(spec).module(generator(0, "count"))
    for layer in module.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module.eval()(torch.zeros(1, *spec.image_shape))
    return total


def network_needs(config: Config, problem: Problem) -> Iterator[Need]:
    """Yield the memory of building the largest network."""
    yield Need(MODULES * 4.0 * _largest(problem), "copies of a network", ("width",))


def expert_needs(config: Config, problem: Problem) -> Iterator[Need]:
    """Yield the memory of the training of experts."""
    size = min(config.experts.expert_batch_size, problem.images)
    widest = max(problem.networks, key=lambda network: network.activations)
    yield _pass(widest, size, "passes of expert training", "expert_batch_size", "width", "image_size")
    yield _parameters(problem)


def distillation_needs(config: Config, problem: Problem) -> Iterator[Need]:
    """Yield the memory of the steps: the driver's, and that of the workers on this machine."""
    d, m, networks = config.distillation, problem.coreset, problem.networks
    images = 4.0 * m * problem.pixels
    draws = d.draws_per_step * len(networks)
    yield Need(IMAGE_COPIES * images, "copies of the pseudocoreset", ("ipc", "image_size"))
    if draws > 1:
        yield Need(draws * images, "gradients of a step", ("draws_per_step", "ipc", "image_size"))
    parameters = 4.0 * sum(network.parameters for network in networks)
    pooled = d.method in network_pool.METHODS
    if pooled:
        yield Need(3 * d.pool_size * parameters, "networks of the pool", ("pool_size", "width"))
    elif d.map_init == "warm":
        count = d.warm_pool_size * d.draws_per_step
        yield Need(count * parameters, "warm starts", ("warm_pool_size", "draws_per_step", "width"))
    if not problem.workers:
        return
    widest = max(networks, key=lambda network: network.activations)
    batch, real = min(d.batch_size, m), min(d.real_batch_size, problem.images)
    chunk = config.networks.chunk_images or math.inf
    gradients: list[list[Need]] = []
    if pooled:
        num_images = m * (2 if d.mirror else 1)
        kernel = Need(3 * 8.0 * num_images**2, "kernels of the last layer", ("ipc",))
        at_once = num_images if config.workers.compiled == "off" else min(num_images, PARTS["cpu"])  # no graph is kept
        gradients.append([_pass(widest, at_once, "passes of the pseudocoreset", "ipc", "width", "image_size"), kernel])
        gradients.append([Need(2 * 4.0 * real * problem.pixels, "real images", ("real_batch_size", "image_size"))])
    else:
        both = _pass(widest, min(2 * batch, chunk), "passes of the pseudocoreset", "batch_size", "width", "image_size")
        samples = Need(
            3 * 4.0 * d.mc_samples * batch * problem.classes, "Monte-Carlo draws", ("mc_samples", "batch_size")
        )
        views = Need(4.0 * d.views * batch * problem.pixels, "views", ("views", "batch_size", "image_size"))
        if d.method.startswith("fbpc"):
            gradients.append([both, samples, views])
        elif d.method == "bpc-w":
            unrolled = _pass(widest, d.syn_steps * batch, "unrolled steps", "syn_steps", "batch_size", "width")
            gradients.append([unrolled])
        else:
            gradients.append([both])
        if d.method == "fbpc":
            num_images = min(real, chunk)
            gradients.append(
                [_pass(widest, num_images, "passes of real images", "real_batch_size", "width", "image_size")]
            )
    for need in (*max(gradients, key=_total), _parameters(problem)):
        yield need._replace(bytes=need.bytes * problem.workers)


def evaluation_needs(config: Config, problem: Problem) -> Iterator[Need]:
    """Yield the memory of the chains that run at the same time, or of networks trained on the pseudocoreset."""
    for need in _needs_of_a_chain(config, problem):
        yield need._replace(bytes=need.bytes * problem.chains)


def _needs_of_a_chain(config: Config, problem: Problem) -> Iterator[Need]:
    e, m = config.evaluation, problem.coreset
    chains = e.inference == "sghmc"
    num_images = m if chains or not e.net_mirror else 2 * m
    size = batch_size(e, num_images)
    size = min(size, (config.networks.chunk_images or size) if chains else PARTS["cpu"])
    flag = "chain_full_batch" if num_images <= e.chain_full_batch else "chain_batch_size"
    widest = max(problem.networks, key=lambda network: network.activations)
    largest = _largest(problem)
    yield _pass(widest, size, "passes of a chain", flag, "width", "image_size")
    yield Need(4.0 * m * problem.pixels, "copies of the pseudocoreset", ("ipc", "image_size"))
    if chains:
        count = e.chain_epochs // e.chain_every
        yield Need(4.0 * count * largest, "posterior samples", ("chain_epochs", "width"))
    elif e.inference == "ensemble":
        yield Need(4.0 * e.ensemble_size * largest, "networks of the ensemble", ("ensemble_size", "width"))
    elif e.inference == "last-layer":
        yield Need(3 * 8.0 * num_images**2, "kernels of the last layer", ("ipc",))
    yield _parameters(problem)


def check(
    config: Config, specs: Sequence[Spec], phases: Sequence[str], *, images: int = 0, coreset: int = 0, chains: int = 1,
    source: str = "",
) -> None:  # fmt: skip
    """Raise UserError if the networks, or a phase of a run, cannot fit into this machine's memory.

    A user's own network is not estimated: building it runs its code.

    Args:
        phases: names of `PHASES`.
        images: number of training images.
        coreset: number of pseudocoreset images, m.
        chains: chains of an evaluation; those run at the same time for which this machine has cores.
        source: path of a finished coreset, whose number of images no flag changes.
    """
    specs = [spec for spec in specs if not _is_own(spec)]
    if not specs:
        return
    problem = _problem(config, specs, images, coreset)
    if problem.workers and config.workers.backend == "ray":
        problem = replace(problem, chains=max(1, min(chains, cores.available())))
    refuse_too_large(config, list(network_needs(config, problem)))  # before any is built
    if phases:
        problem = _with_activations(problem, specs)
    for phase in phases:
        if phase in IN_DRIVER or problem.workers:
            refuse_too_large(config, list(PHASES[phase](config, problem)), source, coreset)


def estimate(
    config: Config, specs: Sequence[Spec], phases: Sequence[str], *, images: int, coreset: int, at_once: int = 1
) -> float:
    """Return the bytes of the phase that needs most on this machine, beside the processes and the data set.

    Args:
        phases: names of `PHASES`.
        images: number of training images.
        coreset: number of pseudocoreset images, m.
        at_once: experts, or chains, that this machine computes at the same time.
    """
    problem = _with_activations(_problem(config, specs, images, coreset), specs)
    sizes = [0.0]
    for phase in phases:
        if phase in IN_DRIVER:
            sizes.append(_total(list(PHASES[phase](config, problem))))
        elif problem.workers:
            sizes.append(at_once * _total(list(PHASES[phase](config, problem))))
    return max(sizes)


def _is_own(spec: Spec) -> bool:
    """Return whether the architecture is a user's own: module:function."""
    return ":" in spec.architecture


def _problem(config: Config, specs: Sequence[Spec], images: int, coreset: int) -> Problem:
    """Collect the sizes, without activations: no network is built but a user's own."""
    (c, h, w), x = specs[0].image_shape, config.workers
    on_gpu = x.device == "cuda" or (x.device == "auto" and torch.cuda.is_available())
    elsewhere = on_gpu or (x.backend == "ray" and (x.address or os.environ.get("RAY_ADDRESS", "local")) != "local")
    workers = 0 if elsewhere else 1
    if workers and x.backend == "ray":
        tasks = len(specs) * config.distillation.draws_per_step
        workers = max(1, min(tasks, cores.available() // (x.threads or 1)))
    networks = [NetworkSize(count_parameters(spec)) for spec in specs]
    return Problem(images, coreset, c * h * w, specs[0].classes, networks, workers)


def _with_activations(problem: Problem, specs: Sequence[Spec]) -> Problem:
    """Add the activations of each network, which a forward pass counts."""
    pairs = zip(problem.networks, specs, strict=True)
    return replace(problem, networks=[size._replace(activations=count_activations(spec)) for size, spec in pairs])


def refuse_too_large(config: Config, needs: Sequence[Need], source: str = "", images: int = 0) -> None:
    """Raise UserError if what needs memory at the same time cannot fit; it names the largest.

    Args:
        source: path of a finished coreset, if there is one, and
        images: its number of images.
    """
    flat = config.flat()
    largest = max(needs, key=lambda need: need.bytes)
    known = flat.keys() - ({"ipc", "image_size"} if source else set())
    flags = sorted((name for name in largest.flags if name in known), key=lambda name: -_times_usual(flat, name))
    if not flags:
        memory.require(_total(needs), f"{source}: {images:,} images", largest.name, "the number of its images")
        return
    words = [f"--{name.replace('_', '-')}" for name in flags]
    memory.require(_total(needs), f"{words[0]} {flat[flags[0]]}", largest.name, " or ".join(words))


def _times_usual(flat: dict[str, object], name: str) -> float:
    value, usual = flat[name], REFERENCE[name]
    return float(value) / max(float(usual), 1.0) if isinstance(value, int | float) else 0.0


def _total(needs: Sequence[Need]) -> float:
    return sum(need.bytes for need in needs)


def _pass(network: NetworkSize, images: float, name: str, *flags: str) -> Need:
    return Need(PER_ACTIVATION * 4.0 * network.activations * images, name, flags)


def _parameters(problem: Problem) -> Need:
    return Need(PARAMETER_COPIES * 4.0 * _largest(problem), "copies of a network", ("width",))


def _largest(problem: Problem) -> int:
    return max(network.parameters for network in problem.networks)


PHASES = {"experts": expert_needs, "distillation": distillation_needs, "evaluation": evaluation_needs}
"""Parts of a run, one after the other."""
IN_DRIVER = ("distillation",)
"""Phases that also take the driver's memory, wherever the workers are."""
