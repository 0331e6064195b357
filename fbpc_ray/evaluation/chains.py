"""Evaluate a coreset by SGHMC chains on it (Eq. 27), and score their model average on test data."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.numerics import numerics
from fbpc_ray.core.progress import progress, set_part
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch, Params
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.data.whitening import WhitenedDataset, Whitening
from fbpc_ray.evaluation import ensemble
from fbpc_ray.evaluation.diagnostics import traces_of
from fbpc_ray.evaluation.ensemble import Ensemble
from fbpc_ray.evaluation.scoring import Logits, Scored, average_of, score
from fbpc_ray.inference.metrics import (
    PredictiveStats,
    Scores,
    batch_nll,
    scores,
)
from fbpc_ray.inference.sghmc import noise_variance, sghmc
from fbpc_ray.inference.uncertainty import Uncertainty, auroc
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import Passes, count_macs

LINEAGE_BATCH = 128
"""Images of a batch in `batch_nll`, which does depend on it: that of the code it is compared with."""


class CoresetArrays(NamedTuple):
    """A coreset as a worker needs it."""

    images: np.ndarray
    """(m, c, h, w) float32, normalised."""
    labels: np.ndarray
    """(m,) int64."""
    soft_labels: np.ndarray | None = None
    """(m, d) float32 logits, where labels were learned."""


class Chain(NamedTuple):
    """One chain to run. Small: the coreset travels once, in the `EvaluationContext`."""

    coreset: str
    """Key in `EvaluationContext.coresets`."""
    spec: Spec
    seed: int
    keep_samples: bool = False
    """Return the samples too."""


class ChainResult(NamedTuple):
    """Sums over the test images, or None where the chain diverged: a parameter or a prediction is not finite."""

    stats: PredictiveStats | None
    seconds: float
    batch_nll: float | None = None
    """The NLL of earlier code (`metrics.batch_nll`) of the same predictions, in the order of the split."""
    mean_sample_nll: float | None = None
    """Mean NLL of a posterior sample by itself: what the model average gains is the difference."""
    in_distribution: Uncertainty | None = None
    """Of the images of the split, if `EvaluationContext.ood` is given."""
    out_of_distribution: Uncertainty | None = None
    """Of the images of `EvaluationContext.ood`."""
    samples: list[Params] | None = None
    """On the CPU, if `Chain.keep_samples`."""
    traces: np.ndarray | None = None
    """(S, 1 + k) of `diagnostics.traces_of`: what each sample predicts."""


def posterior_samples(
    passes: Passes, images: Tensor, labels: Tensor, settings: Evaluation, augment: str, seed: int, share: float = 1.0
) -> list[Params]:
    """Sample theta after each `chain_every` epochs of SGHMC on the coreset; images and labels are on the device.

    `share` is the part of a chain's work that this is, for the progress bar.
    """
    samples, total = [], settings.chain_epochs // settings.chain_every
    for params in sampling(passes, images, labels, settings, augment, seed):
        samples.append(params)
        set_part(share * len(samples), total)
    return samples


def sampling(
    passes: Passes, images: Tensor, labels: Tensor, settings: Evaluation, augment: str, seed: int
) -> Iterator[Params]:
    """Yield the samples of `posterior_samples` one by one, as the chain of Eq. 27 reaches them.

    App. C.2: 1,000 epochs, a sample every 100, d = `chain_d` / m. The prior is one Gaussian for every m: weight decay
    `chain_weight_decay` / m on the mean loss.
    """
    m = len(labels)
    size = batch_size(settings, m)
    steps_per_epoch = -(-m // size)
    name = passes.network.spec.architecture
    eta = step_size(settings, m)
    chain = sghmc(
        passes.loss_and_grad,
        initial_params(passes.network, settings.chain_init, generator(seed, "chain", name, "init")),
        _batches(
            images, labels, size, augment if settings.chain_augment else "none", generator(seed, "chain", name, "batch")
        ),
        eta=eta,
        alpha=settings.chain_friction,
        variance=noise_variance(settings.chain_noise, eta=eta, alpha=settings.chain_friction, d=settings.chain_d / m),
        source=generator(seed, "chain", name, "noise"),
        weight_decay=settings.chain_weight_decay / m,
    )
    every = settings.chain_every * steps_per_epoch
    yield from islice(chain, every - 1, settings.chain_epochs // settings.chain_every * every, every)


def batch_size(settings: Evaluation, count: int) -> int:
    """Return the images of a step on `count` images: all of them, if they are at most --chain-full-batch."""
    return count if count <= settings.chain_full_batch else min(settings.chain_batch_size, count)


def sample_posterior(network: Network, coreset: Coreset, settings: Evaluation, augment: str, seed: int) -> Ensemble:
    """Run `settings.num_chains` chains on `coreset`, of the seeds `seed`, `seed` + 1, ...; return all their samples.

    Raises UserError if a chain diverged.
    """
    images, labels = coreset.images.to(network.device), coreset.likelihood_labels.to(network.device)
    samples, count = list[Params](), settings.num_chains * (settings.chain_epochs // settings.chain_every)
    with progress("sample", count, "sample") as bar, numerics(1, network.device):
        for number in range(seed, seed + settings.num_chains):
            for params in sampling(Passes(network), images, labels, settings, augment, number):
                if not ensemble.finite([params]):
                    raise UserError(
                        f"the chain of seed {number} on {network.spec.architecture} diverged: lower "
                        f"{flags_to_lower(settings, len(labels))}"
                    )
                samples.append(params)
                bar.update()
    return ensemble.gathered(network, samples, coreset)


def flags_to_lower(settings: Evaluation, m: int) -> str:
    """Return the flags to lower where a chain, or a network trained on m images, diverged, and what else helps."""
    if settings.inference == "sghmc":
        other = "" if settings.chain_noise == "consistent" else ", or use --chain-noise consistent"
        return f"--chain-eta (now {step_size(settings, m):g}){other}"
    return "--net-lr, or raise --net-ridge" if settings.inference == "last-layer" else "--net-lr"


def step_size(settings: Evaluation, m: int) -> float:
    """Return eta of the chains on m images."""
    return settings.chain_eta or default_step_size(m)


def default_step_size(m: int) -> float:
    """Return eta for a coreset of m images: the 0.03^2 m of earlier code, at least 0.009 and at most the paper's 0.03.

    A step on the sum of m losses, as earlier code takes it, is m times one on their mean. With eta = 0.03 chains of ten
    images at width 128 leave their start for good, with 0.0009 m those of a hundred end further from the paper's
    Random rows (`jobs/calibrate_sghmc.py`).
    """
    return min(max(0.0009 * m, 0.009), 0.03)


def initial_params(network: Network, std: float, source: torch.Generator) -> Params:
    """Draw a chain's first parameters: every one from N(0, std^2), or the network's own initialisation for std 0."""
    if not std:
        return network.init(source)
    draws = {name: torch.randn(shape, generator=source) for name, shape in network.shapes.items()}
    return {name: (std * draw).to(network.device) for name, draw in draws.items()}


class EvaluationContext(NamedTuple):
    """What all chains of an evaluation share: plain data, sent once."""

    split: Split
    """The images that score: test, or validation."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: Evaluation
    augment: str
    coresets: dict[str, CoresetArrays]
    ood: Split | None = None
    """Out-of-distribution images (`ood_split`); nobody looks at their labels."""
    compiled: str = "off"
    """`--compiled-chains`: auto | on | off."""
    whitening: Whitening | None = None
    """Of all images but those of the coresets, which have seen it."""
    chunk_images: int = 0
    """`--chunk-images`."""
    more_images: int = 0
    """Images that a chain predicts beside those of `split` and `ood`, for the progress bar."""


def evaluation_context(
    dataset: Dataset, split: str, settings: Evaluation, augment: str, coresets: dict[str, CoresetArrays],
    ood: Split | None = None, compiled: str = "off", chunk_images: int = 0,
) -> EvaluationContext:  # fmt: skip
    """Collect what the chains share; `split` is test or validation."""
    return EvaluationContext(
        getattr(dataset, split), dataset.mean, dataset.std, settings, augment, coresets, ood, compiled,
        chunk_images=chunk_images,
    )  # fmt: skip


class Predictor(NamedTuple):
    """What was learned from a coreset."""

    logits: Logits
    samples: list[Params]
    """Parameters behind the predictions, on the device."""


def sample_predictor(context: EvaluationContext, chain: Chain, device: str) -> Predictor | None:
    """Sample one chain; return its model average, None for a chain that diverged."""
    passes = passes_of(context, chain, device)
    images, samples = sample_chain(context, chain, passes, device)
    return Predictor(average_of(passes, samples, images), samples) if ensemble.finite(samples) else None


def run_chain(context: EvaluationContext, chain: Chain, device: str) -> ChainResult:
    """Sample one chain and score its model average."""
    start = time.perf_counter()
    predictor = sample_predictor(context, chain, device)
    return chain_result(context, chain, predictor, device, start)


def chain_result(
    context: EvaluationContext, chain: Chain, predictor: Predictor | None, device: str, start: float
) -> ChainResult:
    """Score the predictions of a chain that began at `start`, on the split and the out-of-distribution images."""
    if predictor is None:
        return ChainResult(None, time.perf_counter() - start)
    logits, samples = predictor
    scored = score(logits, on_device(context.split, context, device))
    outside = None if context.ood is None else score(logits, on_device(context.ood, context, device))
    result = scored_result(scored, outside)._replace(seconds=time.perf_counter() - start)
    if result.stats is None:
        return result
    if chain.keep_samples:
        result = result._replace(samples=[{k: value.cpu() for k, value in params.items()} for params in samples])
    return result._replace(traces=traces_of(scored.losses.numpy()))


def scored_result(scored: Scored, outside: Scored | None = None) -> ChainResult:
    """Return the numbers of a chain's predictions, without its seconds; no sums where a prediction is not finite.

    Args:
        scored: for the images of the split.
        outside: for the out-of-distribution images, if there are some.
    """
    if not (scored.finite and (outside is None or outside.finite)):
        return ChainResult(None, 0.0)
    result = ChainResult(scored.stats, 0.0, batch_nll(scored.losses, LINEAGE_BATCH), float(scored.losses.mean()))
    if outside is None:
        return result
    return result._replace(in_distribution=scored.uncertainty, out_of_distribution=outside.uncertainty)


def likelihood_labels(arrays: CoresetArrays) -> np.ndarray:
    """Return labels as cross-entropy takes them: (m,) int64, or (m, d) float32 probabilities of soft labels."""
    return arrays.labels if arrays.soft_labels is None else torch.tensor(arrays.soft_labels).softmax(1).numpy()


def arrays_of(coreset: Coreset) -> CoresetArrays:
    """Return a coreset as workers take it."""
    soft_labels = None if coreset.soft_labels is None else coreset.soft_labels.numpy()
    return CoresetArrays(coreset.images.numpy(), coreset.labels.numpy(), soft_labels)


def sample_chain(context: EvaluationContext, chain: Chain, passes: Passes, device: str) -> tuple[Tensor, list[Params]]:
    """Sample a chain; return the coreset's images on the device, and the posterior samples."""
    arrays = context.coresets[chain.coreset]
    images, labels = (torch.tensor(array, device=device) for array in (arrays.images, likelihood_labels(arrays)))
    share = fitting_share(*image_passes(context, chain), context)
    return images, posterior_samples(passes, images, labels, context.settings, context.augment, chain.seed, share)


def on_device(split: Split, context: EvaluationContext, device: str) -> DeviceDataset:
    """Return images and labels of `split` on the device, normalised and whitened as the coreset is."""
    if context.whitening is not None:
        return WhitenedDataset(*tensors(split, device), context.mean, context.std, context.whitening)
    return DeviceDataset(*tensors(split, device), context.mean, context.std)


COMPILE_FROM = 5e11
"""Floating-point operations of a chain and its predictions, half a minute of CPU time, from which its passes are
compiled: each takes half a minute once, and then serves the chains of all seeds, runs and machines alike."""


def compiles(context: EvaluationContext, chain: Chain, network: Network) -> bool:
    """Return whether the passes of a chain on its `network` are compiled, on a CPU.

    It depends on the chain and its split alone, not on other work, because it changes the last bits of results.
    """
    images = sum(image_passes(context, chain))
    return context.compiled == "on" or (context.compiled == "auto" and 2 * count_macs(network) * images >= COMPILE_FROM)


def image_passes(context: EvaluationContext, chain: Chain) -> tuple[int, int]:
    """Return the images that sampling a chain passes through its network (backward counts two), and predicting."""
    e, m = context.settings, len(context.coresets[chain.coreset].labels)
    return 3 * e.chain_epochs * m, e.chain_epochs // e.chain_every * len(context.split.labels)


def fitting_share(fitted: int, predicted: int, context: EvaluationContext) -> float:
    """Return the share of a chain's work that fitting the coreset is; the rest is predicting the images that score.

    Args:
        fitted: images passed to fit the coreset.
        predicted: images passed to predict the split; other images come on top.
    """
    others = context.more_images + (0 if context.ood is None else len(context.ood.labels))
    predicted += predicted * others // len(context.split.labels)
    return fitted / (fitted + predicted)


def passes_of(context: EvaluationContext, chain: Chain, device: str) -> Passes:
    """Build the passes of the chain's network."""
    network = Network(chain.spec, device)
    compiled = network.device.type == "cpu" and compiles(context, chain, network)
    return Passes(network, compiling.folder() if compiled else None, chunk_images=context.chunk_images)


def without_impossible_compilation(
    context: EvaluationContext, chains: Sequence[Chain], device: str, log: Callable[[str], None]
) -> EvaluationContext:
    """Turn compilation off, and say so, where chains should be compiled and this machine can't."""
    sizes = {(chain.spec, len(context.coresets[chain.coreset].labels)): chain for chain in chains}
    compiles_any = device == "cpu" and any(compiles(context, chain, Network(chain.spec)) for chain in sizes.values())
    if compiles_any and not compiling.can_compile("the passes of chains", log):
        return context._replace(compiled="off")
    return context


def quantities(context: EvaluationContext) -> tuple[str, ...]:
    """Return the names of `values` for a chain of `context`, in order."""
    ood = tuple(f"ood_auroc_{name}" for name in Uncertainty._fields) if context.ood is not None else ()
    return (*Scores._fields, "batch_nll", "mean_sample_nll", *ood)


def values(result: ChainResult) -> dict[str, float]:
    """Return a chain's numbers by name; empty for a chain that diverged.

    They are those of `metrics.Scores`, the NLL of earlier code, the mean NLL of a sample, and with out-of-distribution
    images the AUROC of each uncertainty.
    """
    if result.stats is None:
        return {}
    numbers: dict[str, float] = dict(scores(result.stats)._asdict())
    for name in ("batch_nll", "mean_sample_nll"):
        if (value := getattr(result, name)) is not None:
            numbers[name] = value
    inside, outside = result.in_distribution, result.out_of_distribution
    if inside is not None and outside is not None:
        for name in Uncertainty._fields:
            numbers[f"ood_auroc_{name}"] = auroc(getattr(inside, name), getattr(outside, name))
    return numbers


def _batches(images: Tensor, labels: Tensor, size: int, augment: str, source: torch.Generator) -> Iterator[Batch]:
    """Yield endless augmented batches: the whole coreset, or shuffled minibatches if `size` is below m."""
    m = len(labels)
    while True:
        order = torch.arange(m) if size == m else torch.randperm(m, generator=source)
        for index in order.split(size):
            yield Batch(AUGMENTATIONS[augment](len(index), source)(images[index]), labels[index])
