"""Time the passes that a run repeats, for seconds each, and estimate the seconds of its parts."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fbpc_ray.core import sizes
from fbpc_ray.core.config import Config
from fbpc_ray.core.numerics import numerics
from fbpc_ray.core.rng import generator
from fbpc_ray.core.sizes import Seconds
from fbpc_ray.data.datasets import Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation import network_pool, trajectory_cache
from fbpc_ray.distillation.expert_training import train_expert
from fbpc_ray.distillation.methods.common import Clock, coreset_batches
from fbpc_ray.evaluation.chains import sampling
from fbpc_ray.evaluation.last_layer import batch_images, num_networks
from fbpc_ray.execution.session import Session
from fbpc_ray.execution.worker_group import cpu_threads, trajectory_cache_bytes, trajectory_shapes
from fbpc_ray.inference.map_solve import map_solve
from fbpc_ray.inference.posterior import sgd_trajectory
from fbpc_ray.inference.solution import SolverStatus
from fbpc_ray.models.functional import Network, Spec, equal_batches
from fbpc_ray.models.passes import Passes

PROBE_SECONDS = 0.5
"""Seconds that each pass of each network is timed for, beside its first call."""
MOST_PROBE_IMAGES = 64
"""Predictions are timed on at most as many test images."""


class Timings(NamedTuple):
    """Seconds of the passes of one network, eager."""

    sgd_step: float
    """Of an expert."""
    map_step: float
    map_steps: int
    """Adam steps of a MAP solve on the initial images."""
    k_step: float
    """On real images."""
    chain_epoch: float
    prediction: float
    """Of a test image by one posterior sample."""


class Measured(NamedTuple):
    """A probe of a run."""

    timings: list[Timings]
    """Of each network."""
    seconds: Seconds
    """The estimate that follows."""


def time_network(session: Session, spec: Spec, device: str) -> Timings:
    """Time the passes of one network with the run's batches; 0 for those that the command does not make."""
    c, dataset = session.config, session.dataset
    d, augment = c.distillation, c.networks.augment
    network = Network(spec, device)
    with numerics(1, device):
        one_batch = _real(session, c.experts.expert_batch_size, device)
        training = train_expert(
            network, one_batch, epochs=10**6, learning_rate=c.experts.expert_lr,
            batch_size=c.experts.expert_batch_size, augment=augment, seed=0, index=0,
        )  # fmt: skip
        next(training)
        sgd_step = _seconds(lambda: next(training), network)
    if session.experts_alone:
        return Timings(sgd_step, 0.0, 0, 0.0, 0.0, 0.0)
    passes = Passes(network, chunk_images=c.networks.chunk_images)
    real = _real(session, d.real_batch_size, device)
    params = network.init(generator(0, "probe"))
    images, labels = (tensor.to(network.device) for tensor in _coreset(session))

    def batches(size: int, purpose: str) -> Iterator:
        return coreset_batches(images, labels, size, augment, generator(0, "probe", purpose))

    with numerics(1, device):
        chain = sampling(passes, images, labels, _endless(c), augment, 0)
        chain_epoch = _seconds(lambda: next(chain), network)
        test = _first(dataset.test, MOST_PROBE_IMAGES)
        batch = DeviceDataset(*tensors(test, device), dataset.mean, dataset.std).batch(torch.arange(len(test.labels)))
        buffers = network.statistics(params, equal_batches(images))
        prediction = _seconds(lambda: network.predict(params, buffers, batch.images), network) / len(test.labels)
    with numerics(cpu_threads(c), device):

        def solve(steps: int):
            return map_solve(
                passes.loss_and_grad, params, batches(d.batch_size, "map"), threshold=d.gamma, learning_rate=d.map_lr,
                max_steps=steps,
            )  # fmt: skip

        map_step = _seconds(lambda: solve(1), network) / 2  # one pass before the step, one after it
        most = max(1, min(200, int(4 * PROBE_SECONDS / map_step)))
        solution = solve(most)
        usual = max(most, sizes.map_steps(d.gamma))
        map_steps = solution.stats.steps if solution.status == SolverStatus.CONVERGED else usual
        stream = real.stream(d.real_batch_size, augment, generator(0, "probe", "real"))
        trajectory = sgd_trajectory(passes.loss_and_grad, params, stream, d.lambda_x)
        k_step = _seconds(lambda: next(trajectory), network)
    return Timings(sgd_step, map_step, map_steps, k_step, chain_epoch, prediction)


def _coreset(session: Session) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a coreset that a run begins with, or that an evaluation scores."""
    if session.coresets:
        one = session.coresets[session.scored[-1]]
        return one.images, one.labels
    return session.current.images, session.labels


def _seconds(call: Callable[[], object], network: Network) -> float:
    """Return the mean seconds of `call` after its first one, or of the first one where that takes too long."""
    clock = Clock(network.device)
    call()
    first = clock.lap()
    if first > 2 * PROBE_SECONDS:
        return first
    total, count = 0.0, 0
    while total < PROBE_SECONDS and count < 100:
        call()
        total, count = total + clock.lap(), count + 1
    return total / count


def _first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def _real(session: Session, count: int, device: str) -> DeviceDataset:
    dataset = session.dataset
    return DeviceDataset(*tensors(_first(dataset.train, count), device), dataset.mean, dataset.std)


def _endless(config: Config):
    """Return the settings of a chain that gives its parameters after every epoch, and never ends."""
    return config.updated(chain_epochs=10**9, chain_every=1).evaluation


def estimate(session: Session, timings: list[Timings], device: str, cores: int) -> Seconds:
    """Estimate the seconds of the parts of a run on this machine from the timings of its networks."""
    config = session.config
    d, n = config.distillation, len(session.dataset.train.labels)
    parallel = max(1, cores) if device == "cpu" and config.workers.backend == "ray" else 1
    experts = distillation = chains = 0.0
    for number, timing in enumerate(timings):
        per_epoch = -(-n // config.experts.expert_batch_size)
        if session.stores:
            missing = len(session.stores[number].missing(config.experts.expert_count))
            experts += missing * config.experts.expert_epochs * per_epoch * timing.sgd_step
        distillation += session.num_steps * d.draws_per_step * _gradient(config, timing)
        if d.method == "fbpc":
            distillation += timing.k_step * d.posterior_steps * _trajectories(session, session.specs[number])
        chains += _chain(session, timing)
    at_once = min(parallel, len(timings) * d.draws_per_step)
    chains *= len(session.scored) * config.evaluation.num_chains
    return Seconds(experts / parallel, distillation / at_once, chains / parallel)


def snapshots_met(config: Config) -> float:
    """Return the expected different snapshots of a network that a run meets."""
    d, e = config.distillation, config.experts
    epochs = e.expert_epochs - d.start_epoch + 1 if d.start_rule == "from" else d.start_epoch
    return sizes.snapshots_met(d.steps * d.draws_per_step, max(1, e.expert_count * epochs))


def _trajectories(session: Session, spec: Spec) -> float:
    """Return how often the K steps on real images are computed: once for each snapshot that the cache keeps."""
    config, d = session.config, session.config.distillation
    (shape,) = trajectory_shapes(config, [spec])
    if trajectory_cache.fits(shape, trajectory_cache_bytes(config, session.specs)):
        return snapshots_met(config)
    return session.num_steps * d.draws_per_step


def _gradient(config: Config, timing: Timings) -> float:
    """Return the seconds of a gradient, without the K steps on real images."""
    d = config.distillation
    if d.method in network_pool.METHODS:
        return timing.k_step / 3 + 4 * timing.map_step  # real images forwards alone; u and its mirror images, twice
    if d.method.startswith("bpc-"):
        draws = {"bpc-fkl": max(d.views, d.mc_samples), "bpc-rkl": d.mc_samples}.get(d.method, 0)
        return (d.syn_steps * (3 if d.method == "bpc-w" else 1) + 2 * draws) * timing.map_step
    k_steps, views = 0 if d.method == "fbpc-isotropic" else d.posterior_steps, d.views or 1
    on_views = (0.7 * k_steps + 3) * views  # .7: the logits of both sides after each of the K steps
    return (timing.map_steps + k_steps + on_views) * timing.map_step


def _chain(session: Session, timing: Timings) -> float:
    """Return the seconds of one chain, or of the networks that are trained for one seed, and of their predictions."""
    e, tests = session.config.evaluation, len(session.dataset.test.labels) * timing.prediction
    if e.inference == "sghmc":
        return e.chain_epochs * timing.chain_epoch + e.chain_epochs // e.chain_every * tests
    m = len(_coreset(session)[1])
    return num_networks(e) * (e.net_steps * timing.chain_epoch * batch_images(e, m) / m + tests)


def measure(session: Session, device: str, cores: int) -> Measured:
    """Time the networks of a run and estimate its parts."""
    timings = [time_network(session, spec, device) for spec in session.specs]
    return Measured(timings, estimate(session, timings, device, cores))
