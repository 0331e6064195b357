"""Choose --chunk-images so that steps and chains stay within --memory-budget.

    bytes of the process = BASE + those of images, draws, parameters + PER_ACTIVATION x 4 x activations x chunk

The estimate depends on the settings and the data alone, so that the bits are the same on every machine. It stays above
what is measured (jobs/benchmark_memory.py); `memory_estimate`, which refuses runs, stays below it.
"""

import re
from collections.abc import Sequence

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.memory import gigabytes
from fbpc_ray.evaluation.chains import batch_size
from fbpc_ray.execution.memory_estimate import (
    PARAMETER_COPIES,
    NetworkSize,
    Problem,
    count_activations,
    count_parameters,
)
from fbpc_ray.models.functional import Network, Spec

BASE = 7e8
"""Of Python, torch and the libraries of compiled passes."""
PER_ACTIVATION = 2.0
"""Memory of a pass with gradient, in units of its activations as float32; measured: 1.2 to 1.9."""
COPIES_OF_IMAGES = 8
"""Of the m images: in the driver and the worker, the gradient, its momentum."""
COPIES_OF_BATCH = 12
"""Of the B images: views, augmentations with their graph."""
COPIES_OF_LOGITS = 8
"""Of the S x B x d draws of logits: noise, sums, log-probabilities, gradients."""
COPIES_OF_DATA = 2
UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNCHUNKED = ("bpc-w", "vbpc", "frepo")
"""Methods whose gradient needs the graph of the whole batch at once."""


def parse_size(text: str) -> float:
    """Return the bytes of 6GB, 6 GB, 800MB or 1.5e9. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?) *([KMGT]?B|)", text.strip(), re.IGNORECASE)
    size = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not 1e6 <= size <= 1e15:
        raise UserError(f"--memory-budget: must be a size such as 6GB or 800MB, got {text!r}")
    return size


def check(config: Config) -> None:
    """Raise UserError for a budget that can't be read, or a method that can't keep one."""
    method = config.distillation.method
    if config.networks.memory_budget:
        parse_size(config.networks.memory_budget)
    if (flag := _flag(config)) and method in UNCHUNKED:
        raise UserError(f"{flag}: the gradient of --method {method} can't be computed in chunks; leave it out")


def _flag(config: Config) -> str:
    """Return the flag that asks for chunks, with its value; "" if none does."""
    n = config.networks
    if n.memory_budget:
        return f"--memory-budget {n.memory_budget}"
    return f"--chunk-images {n.chunk_images}" if n.chunk_images else ""


NO_CHUNKS = "give --memory-budget '' --chunk-images 0"


def refuse_batchnorm(config: Config, specs: Sequence[Spec], fix: str = NO_CHUNKS) -> None:
    """Raise UserError, ending in `fix`, if passes are to be chunked, and a network has BatchNorm."""
    flag = _flag(config)
    for spec in specs if flag else ():
        if Network(spec).has_batchnorm:
            raise UserError(
                f"{flag}: {spec.architecture} has BatchNorm, whose statistics are those of a whole batch, not of its "
                f"chunks; choose -in, -gn or -ln, or {fix}"
            )


def with_chunks(
    config: Config, specs: Sequence[Spec], *, images: int, coreset: int, distils: bool, fix: str = NO_CHUNKS
) -> Config:
    """Return `config` with the --chunk-images that its --memory-budget allows, unless it has some.

    Args:
        images: number of training images.
        coreset: number of pseudocoreset images, m.
        distils: whether steps are taken; else chains alone.
        fix: how to do without chunks.

    Raises UserError for a network with BatchNorm, or a budget that is too small.
    """
    refuse_batchnorm(config, specs, fix)
    if not config.networks.memory_budget or config.networks.chunk_images:
        return config
    networks = [NetworkSize(count_parameters(spec), count_activations(spec)) for spec in specs]
    c, h, w = specs[0].image_shape
    problem = Problem(images, coreset, c * h * w, specs[0].classes, networks)
    return config.updated(chunk_images=chunk_images(config, problem, distils))


def chunk_images(config: Config, problem: Problem, distils: bool) -> int:
    """Return the most images of a pass that --memory-budget allows, at most those of the largest batch.

    Args:
        problem: with activations.
        distils: whether steps are taken; else chains alone.

    Raises UserError if not even one image fits.
    """
    d, budget = config.distillation, parse_size(config.networks.memory_budget)
    fixed = max(_of_steps(config, problem) if distils else 0.0, _of_chains(config, problem))
    per_image = PER_ACTIVATION * 4.0 * max(network.activations for network in problem.networks)
    limit = int((budget - fixed) // per_image)
    if limit < 1:
        flags = "--ipc, --mc-samples or --width" if distils else "--width"
        raise UserError(
            f"--memory-budget {config.networks.memory_budget}: images, draws and parameters take about "
            f"{gigabytes(fixed)}, a pass of one image {gigabytes(per_image)} more; raise the budget, or lower {flags}"
        )
    batch = min(d.batch_size, problem.coreset)
    batches = [batch_size(config.evaluation, problem.coreset)]
    if distils:
        batches += [batch, min(d.real_batch_size, problem.images)]
    if limit >= max(batches):
        return max(batches)
    return _divisor(batch, limit) if distils and batch > limit else limit


def _divisor(batch: int, limit: int) -> int:
    """Return a divisor of `batch` from limit / 2 to `limit`, so that all chunks are equal; `limit` if there is none."""
    fewest = -(-batch // limit)
    return next((batch // count for count in range(fewest, 2 * fewest + 1) if batch % count == 0), limit)


def _of_steps(config: Config, problem: Problem) -> float:
    """Estimate the bytes of a process that takes steps, without its passes."""
    d, pixels = config.distillation, 4.0 * problem.pixels
    batch, real = min(d.batch_size, problem.coreset), min(d.real_batch_size, problem.images)
    logits = 4.0 * d.mc_samples * batch * problem.classes
    vectors = (PARAMETER_COPIES + 1 + d.posterior_steps) * 4.0 * max(n.parameters for n in problem.networks)
    images = pixels * (COPIES_OF_IMAGES * problem.coreset + (COPIES_OF_BATCH + d.views) * batch + 4 * real)
    return _of_data(problem) + images + COPIES_OF_LOGITS * logits + vectors


def _of_chains(config: Config, problem: Problem) -> float:
    """Estimate the bytes of a process that runs a chain, without its passes."""
    e, m = config.evaluation, problem.coreset
    vectors = (PARAMETER_COPIES + e.chain_epochs // e.chain_every) * 4.0 * max(n.parameters for n in problem.networks)
    return _of_data(problem) + 4.0 * problem.pixels * COPIES_OF_IMAGES * m + vectors


def _of_data(problem: Problem) -> float:
    return BASE + COPIES_OF_DATA * problem.images * problem.pixels
