"""What a coreset is worth: SGHMC chains on it (Eq. 27), and the scores of their model average on test data."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch, Params
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.data.datasets import Dataset, Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.evaluation import ensemble
from fbpc_ray.evaluation.ensemble import logits_of, statistics_of
from fbpc_ray.inference.metrics import (
    PredictiveStats,
    Scores,
    batch_nll,
    log_mean_probability,
    predictive_stats,
    sample_losses,
    scores,
)
from fbpc_ray.inference.sghmc import noise_variance, potential_gradient, sghmc
from fbpc_ray.inference.uncertainty import Uncertainty, auroc, uncertainty
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import Passes, count_macs

TEST_BATCH = ensemble.BATCH
LINEAGE_BATCH = 256
"""Images of a batch in `batch_nll`, which does depend on it: that of the code it is compared with."""


class Chain(NamedTuple):
    """One chain to run: plain data."""

    coreset: str
    """Name of the coreset, for the reader."""
    images: np.ndarray
    """(m, c, h, w) float32, normalised."""
    labels: np.ndarray
    spec: Spec
    seed: int
    keep: bool = False
    """Send the samples back too."""


class ChainResult(NamedTuple):
    """Sums over the test images, or None where the chain left the finite numbers."""

    stats: PredictiveStats | None
    seconds: float
    batch_nll: float | None = None
    """The lineage's NLL (`metrics.batch_nll`) of the same predictions, in the order of the split."""
    mean_sample_nll: float | None = None
    """Mean NLL of a posterior sample by itself: what the model average gains is the difference."""
    familiar: Uncertainty | None = None
    """Of the images of the split, where `Judge.ood` is given; else not sent."""
    strange: Uncertainty | None = None
    """Of the images of `Judge.ood`."""
    samples: list[Params] | None = None
    """On the CPU, where `Chain.keep` asks for them."""


def posterior_samples(
    passes: Passes, images: Tensor, labels: Tensor, settings: Evaluation, augment: str, seed: int
) -> list[Params]:
    """theta after each `chain_every` epochs of SGHMC on the coreset (images, labels), which are on the device."""
    return list(sampling(passes, images, labels, settings, augment, seed))


def sampling(
    passes: Passes, images: Tensor, labels: Tensor, settings: Evaluation, augment: str, seed: int
) -> Iterator[Params]:
    """`posterior_samples` one by one, each as it is there."""
    m = len(labels)
    size = m if m <= settings.chain_full_batch else min(settings.chain_batch_size, m)
    steps_per_epoch = -(-m // size)
    name = passes.network.spec.architecture
    chain = sghmc(
        potential_gradient(passes.loss_and_grad, settings.chain_weight_decay / m),
        passes.network.init(generator(seed, "chain", name, "init")),
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
    last = settings.chain_epochs * steps_per_epoch
    for step, params in enumerate(islice(chain, last), 1):
        if step % (settings.chain_every * steps_per_epoch) == 0:
            yield params


class Scored(NamedTuple):
    """The predictions of S samples for n images, scored."""

    stats: PredictiveStats
    losses: Tensor
    """(S, n) -log p_s(y_i | x_i) of each sample by itself, float64, in the order of the images."""
    uncertainty: Uncertainty


def predictive(passes: Passes, samples: list[Params], coreset: Tensor, test: DeviceDataset) -> Scored:
    """The predictions of `samples` for `test`; BatchNorm's statistics come from `coreset` (m, c, h, w)."""
    network = passes.network
    statistics = statistics_of(network, samples, coreset)
    parts: list[Scored] = []
    for index in torch.arange(len(test)).split(TEST_BATCH):
        batch = test.batch(index)
        whole = len(index) == TEST_BATCH  # a last, smaller batch is not worth compiling for
        logits = logits_of(passes.predict if whole else network.predict, samples, statistics, batch.images)
        stats = predictive_stats(log_mean_probability(logits), batch.labels)
        parts.append(Scored(stats, sample_losses(logits, batch.labels), uncertainty(logits)))
    stats, unsure = parts[0].stats, parts[0].uncertainty
    for part in parts[1:]:
        stats, unsure = stats + part.stats, unsure + part.uncertainty
    return Scored(stats, torch.cat([part.losses for part in parts], 1), unsure)


class EvaluationContext(NamedTuple):
    """What all chains of an evaluation share: plain data, sent once."""

    split: Split
    """The images that score: test, or validation."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: Evaluation
    augment: str
    ood: Split | None = None
    """Images that are strange to the networks (`ood_split`); their labels are not looked at."""
    compiled: str = "off"
    """`--compiled-chains`: auto | on | off."""


def run_chain(judge: EvaluationContext, chain: Chain, device: str) -> ChainResult:
    """One task: sample a chain, score its model average."""
    start = time.perf_counter()
    passes = passes_of(judge, chain, device)
    images, labels = torch.tensor(chain.images, device=device), torch.tensor(chain.labels, device=device)
    samples = posterior_samples(passes, images, labels, judge.settings, judge.augment, chain.seed)
    if not ensemble.finite(samples):
        return ChainResult(None, time.perf_counter() - start)
    test = DeviceDataset(*tensors(judge.split, device), judge.mean, judge.std)
    found = predictive(passes, samples, images, test)
    familiar = strange = None
    if judge.ood is not None:
        others = DeviceDataset(*tensors(judge.ood, device), judge.mean, judge.std)
        familiar, strange = found.uncertainty, predictive(passes, samples, images, others).uncertainty
    return ChainResult(
        found.stats,
        time.perf_counter() - start,
        batch_nll(found.losses, LINEAGE_BATCH),
        float(found.losses.mean()),
        familiar,
        strange,
        [{name: value.cpu() for name, value in params.items()} for params in samples] if chain.keep else None,
    )


COMPILE_FROM = 5e11
"""Floating-point operations of a chain and its predictions, half a minute of CPU time, from which its passes are
compiled: each takes half a minute once, and is then there for the chains of all seeds, runs and machines alike."""


def compiles(judge: EvaluationContext, chain: Chain, network: Network) -> bool:
    """Whether the passes of a chain on its `network` are compiled, on a CPU. It depends on the chain and its split
    alone, not on what runs beside it, for it is part of the bits."""
    e, count = judge.settings, len(judge.split.labels)
    images = 3 * e.chain_epochs * len(chain.labels) + e.chain_epochs // e.chain_every * count  # a backward counts two
    return judge.compiled == "on" or (judge.compiled == "auto" and 2 * count_macs(network) * images >= COMPILE_FROM)


def passes_of(judge: EvaluationContext, chain: Chain, device: str) -> Passes:
    """Those of the chain's network."""
    network = Network(chain.spec, device)
    on = network.device.type == "cpu" and compiles(judge, chain, network)
    return Passes(network, compiling.folder() if on else None)


def judge(
    dataset: Dataset, split: str, settings: Evaluation, augment: str, ood: Split | None = None, compiled: str = "off"
) -> EvaluationContext:
    """A Judge on the split named test or validation; `ood` from `ood_split`."""
    return EvaluationContext(getattr(dataset, split), dataset.mean, dataset.std, settings, augment, ood, compiled)


def feasible(
    judge: EvaluationContext, chains: Sequence[Chain], device: str, log: Callable[[str], None]
) -> EvaluationContext:
    """`judge`, its chains eager where they should be compiled and can't be here, which is said."""
    kinds = {(chain.spec, len(chain.labels)): chain for chain in chains} if device == "cpu" else {}
    wanted = any(compiles(judge, chain, Network(chain.spec)) for chain in kinds.values())
    return judge._replace(compiled="off") if wanted and not compiling.possible("the passes of chains", log) else judge


def ood_split(dataset: Dataset, strange: Dataset, resize: bool = False) -> Split:
    """The test images of `strange` as a network of `dataset` can see them: grey ones in three channels, where it has
    three, and with `resize` at its size (bilinear, antialiased). Labels are all 0, their classes being others.

    Raises UserError for images of another size without `resize` (how they are resized is part of the result, so it is
    asked for), and for coloured images where the networks see grey.
    """
    channels, *size = dataset.image_shape
    images = strange.test.images
    if images.shape[1] != channels:
        if (images.shape[1], channels) != (1, 3):
            raise UserError(
                f"{strange.name} has images of {images.shape[1]} channels, {dataset.name} of {channels}: "
                "choose out-of-distribution data with as many channels"
            )
        images = images.repeat(3, axis=1)
    if list(images.shape[2:]) != size:
        if not resize:
            raise UserError(
                f"{strange.name} has images of {images.shape[2]}x{images.shape[3]}, {dataset.name} of "
                f"{size[0]}x{size[1]}: choose out-of-distribution data of that size, or add --ood-resize"
            )
        images = np.concatenate([_resized(images[at : at + 1024], size) for at in range(0, len(images), 1024)])
    return Split(np.ascontiguousarray(images), np.zeros(len(images), np.int64))


def quantities(judge: EvaluationContext) -> tuple[str, ...]:
    """The names that `values` gives for a chain of `judge`, in order."""
    ood = tuple(f"ood_auroc_{name}" for name in Uncertainty._fields) if judge.ood is not None else ()
    return (*Scores._fields, "batch_nll", "mean_sample_nll", *ood)


def values(result: ChainResult) -> dict[str, float]:
    """A chain's numbers by name: those of `metrics.Scores`, the NLLs of the lineage and of a sample, and where strange
    images were given, how well each uncertainty tells them from the familiar. Empty for a chain that diverged."""
    if result.stats is None:
        return {}
    found: dict[str, float] = dict(scores(result.stats)._asdict())
    for name in ("batch_nll", "mean_sample_nll"):
        if (value := getattr(result, name)) is not None:
            found[name] = value
    if result.familiar is not None and result.strange is not None:
        for name in Uncertainty._fields:
            found[f"ood_auroc_{name}"] = auroc(getattr(result.familiar, name), getattr(result.strange, name))
    return found


def _resized(images: np.ndarray, size: list[int]) -> np.ndarray:
    """(n, c, h, w) uint8 -> (n, c, *size) uint8."""
    pixels = torch.tensor(images, dtype=torch.float32)
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


def _batches(images: Tensor, labels: Tensor, size: int, augment: str, source: torch.Generator) -> Iterator[Batch]:
    """Endless augmented batches: the whole coreset, or shuffled minibatches where `size` is below m."""
    m = len(labels)
    while True:
        order = torch.arange(m) if size == m else torch.randperm(m, generator=source)
        for index in order.split(size):
            yield Batch(AUGMENTATIONS[augment](len(index), source)(images[index]), labels[index])
