"""What a coreset is worth: SGHMC chains on it (Eq. 27), and the scores of their model average on test data."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.config import Evaluation
from fbpc_ray.inference.metrics import PredictiveStats, log_mean_probability, predictive_stats
from fbpc_ray.inference.sghmc import cross_entropy_potential, noise_variance, sghmc
from fbpc_ray.rng import generator
from fbpc_ray.types import Batch, Params
from fbpc_ray.vision.augment import AUGMENTATIONS
from fbpc_ray.vision.datasets import Dataset, Split, tensors
from fbpc_ray.vision.realdata import RealData
from fbpc_ray.vision.zoo import Network, Spec

TEST_BATCH = 500


class Chain(NamedTuple):
    """One chain to run: plain data."""

    coreset: str
    """Name of the coreset, for the reader."""
    images: np.ndarray
    """(m, c, h, w) float32, normalised."""
    labels: np.ndarray
    spec: Spec
    seed: int


class ChainResult(NamedTuple):
    """Sums over the test images, or None where the chain left the finite numbers."""

    stats: PredictiveStats | None
    seconds: float


def posterior_samples(
    network: Network, images: Tensor, labels: Tensor, settings: Evaluation, augment: str, seed: int
) -> list[Params]:
    """theta after each `chain_every` epochs of SGHMC on the coreset (images, labels), which are on the device."""
    m = len(labels)
    size = m if m <= settings.chain_full_batch else min(settings.chain_batch_size, m)
    steps_per_epoch = -(-m // size)
    name = network.spec.architecture
    chain = sghmc(
        cross_entropy_potential(network.forward, settings.chain_weight_decay),
        network.init(generator(seed, "chain", name, "init")),
        _batches(
            images, labels, size, augment if settings.chain_augment else "none", generator(seed, "chain", name, "batch")
        ),
        eta=settings.chain_eta,
        alpha=settings.chain_friction,
        variance=noise_variance(
            settings.chain_noise, eta=settings.chain_eta, alpha=settings.chain_friction, d=settings.chain_d / m
        ),
        source=generator(seed, "chain", name, "noise"),
    )
    samples = []
    for step, params in enumerate(chain, 1):
        if step % (settings.chain_every * steps_per_epoch) == 0:
            samples.append(params)
        if step == settings.chain_steps * steps_per_epoch:
            break
    return samples


def predictive(network: Network, samples: list[Params], coreset: Tensor, test: RealData) -> PredictiveStats:
    """Scores of the model average of `samples` on `test`; BatchNorm's statistics come from `coreset` (m, c, h, w)."""
    statistics = [network.statistics(params, coreset.split(256)) for params in samples]
    total: PredictiveStats | None = None
    for index in torch.arange(len(test)).split(TEST_BATCH):
        batch = test.batch(index)
        logits = torch.stack([network.predict(p, s, batch.images) for p, s in zip(samples, statistics, strict=True)])
        stats = predictive_stats(log_mean_probability(logits), batch.labels)
        total = stats if total is None else total + stats
    assert total is not None
    return total


class Judge(NamedTuple):
    """What all chains of an evaluation share: plain data, sent once."""

    split: Split
    """The images that score: test, or validation."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: Evaluation
    augment: str


def run_chain(judge: Judge, chain: Chain, device: str) -> ChainResult:
    """One task: sample a chain, score its model average."""
    start = time.perf_counter()
    network = Network(chain.spec, device)
    images, labels = torch.tensor(chain.images, device=device), torch.tensor(chain.labels, device=device)
    samples = posterior_samples(network, images, labels, judge.settings, judge.augment, chain.seed)
    if not all(bool(torch.isfinite(value).all()) for params in samples for value in params.values()):
        return ChainResult(None, time.perf_counter() - start)
    test = RealData(*tensors(judge.split, device), judge.mean, judge.std)
    stats = predictive(network, samples, images, test)
    return ChainResult(stats, time.perf_counter() - start)


def judge(dataset: Dataset, split: str, settings: Evaluation, augment: str) -> Judge:
    """A Judge on the split named test or validation."""
    return Judge(getattr(dataset, split), dataset.mean, dataset.std, settings, augment)


def _batches(images: Tensor, labels: Tensor, size: int, augment: str, source: torch.Generator) -> Iterator[Batch]:
    """Endless augmented batches: the whole coreset, or shuffled minibatches where `size` is below m."""
    m = len(labels)
    while True:
        order = torch.arange(m) if size == m else torch.randperm(m, generator=source)
        for index in order.split(size):
            yield Batch(AUGMENTATIONS[augment](len(index), source)(images[index]), labels[index])
