"""Posterior samples of one network, and what they say of images together.

    p(y | x) = 1/S sum_s p(y | f_theta_s(x))            (the Bayesian model average)

A file of samples is one safetensors file: `samples/S/NAME` and `statistics/S/NAME` are the tensors of sample S, the
metadata says which network they are of, the normalisation and the names of the classes, and has a checksum. The
posterior of a last layer (`--inference last-layer`) is `last_layer/features`, `/factor`, `/weights` and metadata, in
format 2. Nothing is pickled.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from fbpc_ray.core import drawing, files, inputs, storage, tensor_files
from fbpc_ray.core.errors import UserError, reason_of
from fbpc_ray.core.storage import Place
from fbpc_ray.core.types import Params
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import normalise, standardise
from fbpc_ray.inference.last_layer import LastLayer
from fbpc_ray.inference.metrics import PredictiveStats, Scores, log_mixture, log_probabilities, predictive_stats, scores
from fbpc_ray.inference.uncertainty import uncertainty_of
from fbpc_ray.models import custom
from fbpc_ray.models.functional import Network, Spec, equal_batches
from fbpc_ray.models.last_layer import closed_form_logits

if TYPE_CHECKING:
    from PIL import Image

FORMAT, FORMAT_WITH_LAYER = "1", "2"
BATCH = 500
"""Most images of one forward pass."""
BATCH_PIXELS = BATCH * 32 * 32
"""Most pixels of one forward pass, whose activation at width 128 takes 250 MiB."""

MIN_PROBABILITY = torch.finfo(torch.float64).tiny
"""Smallest normal float64, 2.2e-308; the log of smaller ones depends on whether torch flushes denormals."""


def batch_size(shape: Sequence[int]) -> int:
    """Return the images (..., h, w) of one forward pass. Scores depend on it by no more than rounding."""
    return max(1, min(BATCH, BATCH_PIXELS // (shape[-1] * shape[-2])))


def statistics_of(network: Network, samples: Sequence[Params], coreset: Tensor) -> list[Params]:
    """Estimate BatchNorm's statistics of each sample on `coreset` (m, c, h, w); empty for other networks."""
    return [network.statistics(params, equal_batches(coreset)) for params in samples]


Predict = Callable[[Params, Params, Tensor], Tensor]
"""(parameters, BatchNorm's statistics, images (b, c, h, w)) -> logits (b, d): `Network.predict`, or compiled."""


def logits_of(predict: Predict, samples: Sequence[Params], statistics: Sequence[Params], images: Tensor) -> Tensor:
    """Return logits (S, b, d) of normalised images (b, c, h, w), on the network's device."""
    return torch.stack([predict(p, s, images) for p, s in zip(samples, statistics, strict=True)])


def finite(samples: Sequence[Params]) -> bool:
    """Return whether all samples of a chain are finite."""
    return bool(torch.stack([value.isfinite().all() for params in samples for value in params.values()]).all())


class Prediction(NamedTuple):
    """What the model average says of n images. On the CPU, float64."""

    probabilities: Tensor
    """(n, d) p(y | x)."""
    entropy: Tensor
    """(n,) of p(y | x), nats: all uncertainty there is."""
    mutual_information: Tensor
    """(n,) nats: the part of it that the samples disagree about, which more images would take away."""

    def __repr__(self) -> str:
        n, d = self.probabilities.shape
        return (
            f"<prediction of {n:,} image{'' if n == 1 else 's'}, {d} classes: mean entropy {self.entropy.mean():.2f}, "
            f"mean mutual information {self.mutual_information.mean():.2f} nats>"
        )

    @property
    def labels(self) -> Tensor:
        """(n,) int64: the most probable class."""
        return self.probabilities.argmax(-1)

    def scores(self, labels: Tensor | np.ndarray) -> Scores:
        """Return accuracy (0..1), nll (nats per image), ece (0..1) and brier (0..2) against the true `labels`.

        `labels` are (n,) integers, 0 to d - 1; raises UserError for others. Probabilities below `MIN_PROBABILITY`
        underflow: an image with a larger NLL than 708 nats counts as 708, where `fbpc evaluate` takes its value.
        """
        return scores(self.stats(labels))

    def stats(self, labels: Tensor | np.ndarray) -> PredictiveStats:
        """Return the sums over images behind `scores`, among them those of the reliability diagram's bins."""
        return predictive_stats(self.probabilities.clamp(min=MIN_PROBABILITY).log(), self._checked(labels))

    def plot(self, labels: Tensor | np.ndarray | None = None, title: str = "") -> "Image.Image":
        """Draw the reliability diagram against the true `labels` (n,), or without them the uncertainties."""
        return drawing.draw(self, labels=labels, title=title)

    def _checked(self, labels: Any) -> Tensor:
        """Return true labels as (n,) int64. Raises UserError."""
        n, d = self.probabilities.shape
        try:
            values = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"labels are a {type(labels).__name__}: give the class of each image, integers") from None
        if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise UserError(
                f"labels are {values.dtype} {tuple(values.shape)}: give the class of each image, integers ({n},)"
            )
        values = values.long()
        if len(values) != n:
            raise UserError(f"got {len(values)} labels for {n} images")
        if values.min() < 0 or values.max() >= d:
            raise UserError(f"labels from {values.min()} to {values.max()}, but {d} classes, numbered from 0")
        return values


@dataclass(frozen=True)
class Ensemble:
    """S posterior samples of one network: what `posterior` of api.py returns, and an MLflow model holds."""

    spec: Spec
    samples: list[Params]
    """The parameters of each."""
    statistics: list[Params]
    """BatchNorm's, of each: of the coreset that it was sampled on."""
    mean: tuple[float, ...]
    """Of the normalisation that the coreset, and so the samples, know: pixels in 0..1 are images * std + mean."""
    std: tuple[float, ...]
    classes: tuple[str, ...]
    device: str = "cpu"
    last_layer: LastLayer | None = None
    """The posterior of the last layer of the one sample, by which it predicts; None: by the average of all."""

    def __repr__(self) -> str:
        if self.last_layer is not None:
            return f"<last-layer posterior of {self.spec.architecture}, {len(self.classes)} classes>"
        return f"<{len(self.samples)} posterior samples of {self.spec.architecture}, {len(self.classes)} classes>"

    @cached_property
    def network(self) -> Network:
        return Network(self.spec, self.device)

    def predict(self, images: Tensor | np.ndarray) -> Prediction:
        """Predict the classes of images (n, c, h, w), or of one (c, h, w), which this method normalises.

        Tensors or arrays: uint8, or floats in 0..1 as of torchvision's ToTensor. Raises UserError for others.
        """
        if not isinstance(images, Tensor | np.ndarray):
            raise UserError(f"images are a {type(images).__name__}: give a tensor or an array (n, c, h, w)")
        pixels = torch.as_tensor(images)
        shape = self.spec.image_shape
        if tuple(pixels.shape) == shape:
            pixels = pixels[None]
        if tuple(pixels.shape[1:]) != shape or not len(pixels):
            raise UserError(
                f"images of {tuple(pixels.shape)}: {self.spec.architecture} takes (n, c, h, w) = n x {shape}"
            )
        if pixels.dtype != torch.uint8 and not (
            pixels.is_floating_point() and bool(pixels.min() >= 0 and pixels.max() <= 1)
        ):
            raise UserError(
                f"images are {pixels.dtype} from {pixels.min():g} to {pixels.max():g}: give uint8, or floats in 0..1 "
                "before any normalisation"
            )
        parts = [self._predict(batch.to(self.device)) for batch in pixels.split(batch_size(shape))]
        return Prediction._make(torch.cat(column) for column in zip(*parts, strict=True))

    def _predict(self, pixels: Tensor) -> Prediction:
        bytes_ = pixels.dtype == torch.uint8
        images = (normalise if bytes_ else standardise)(pixels if bytes_ else pixels.float(), self.mean, self.std)
        log_probs = log_probabilities(self._logits(images))
        mean = log_mixture(log_probs)
        return Prediction(mean.exp().cpu(), *uncertainty_of(log_probs, mean))

    def _logits(self, images: Tensor) -> Tensor:
        if self.last_layer is None:
            return logits_of(self.network.predict, self.samples, self.statistics, images)
        return closed_form_logits(self.network, self.samples[0], self.statistics[0], self.last_layer, images)


def gathered(network: Network, samples: Sequence[Params], coreset: Coreset) -> Ensemble:
    """Build the ensemble of `samples`, with their BatchNorm statistics on the `coreset` of their chain."""
    statistics = statistics_of(network, samples, coreset.images.to(network.device))
    facts = coreset.mean, coreset.std, coreset.classes
    return Ensemble(network.spec, list(samples), statistics, *facts, str(network.device))


# ---- files

LAYER_TENSORS = ("features", "factor", "weights")
"""Tensors of a `LastLayer`."""


def _layer(file: Any, facts: dict[str, str], device: str) -> LastLayer:
    """Read the last layer's posterior. Raises ValueError for tensors that don't fit together."""
    ridge, precision = map(float, inputs.parse_json(facts["last_layer"]))
    tensors = [file.get_tensor(f"last_layer/{name}").clone().to(device) for name in LAYER_TENSORS]
    features, factor, weights = tensors
    n = len(features)
    if factor.shape != (n, n) or len(weights) != n or any(tensor.dtype != torch.float64 for tensor in tensors):
        raise ValueError("its last layer does not fit together")
    return LastLayer(features, factor, weights, ridge, precision)


def save(ensemble: Ensemble, path: Place, facts: dict[str, str] | None = None) -> None:
    """Write the samples to `path`, whole or not at all; `facts` are kept in the file's header."""
    tensors = {
        f"{kind}/{number}/{name}": value.detach().cpu().contiguous().clone()
        for kind in ("samples", "statistics")
        for number, params in enumerate(getattr(ensemble, kind))
        for name, value in params.items()
    }
    head = {name: getattr(ensemble, name) for name in ("spec", "mean", "std", "classes")}
    layer = ensemble.last_layer
    header = {"format": FORMAT if layer is None else FORMAT_WITH_LAYER, "count": str(len(ensemble.samples))}
    if layer is not None:
        tensors |= {f"last_layer/{name}": getattr(layer, name).cpu().contiguous() for name in LAYER_TENSORS}
        head["last_layer"] = [float(layer.ridge), layer.precision]
    header |= {name: json.dumps(value) for name, value in head.items()}
    files.write_bytes(path, tensor_files.dumps(tensors, {**(facts or {}), **header}))


def load(path: Place, network: str = "", device: str = "cpu") -> Ensemble:
    """Read the samples that `save` wrote to `path`. Raises UserError for any other file.

    A file alone imports no code: for a network of the user's own, `network` repeats its name, MODULE:FUNCTION.
    """
    try:
        with storage.local(path) as near, tensor_files.open_checked(near) as file:
            facts = file.metadata() or {}
            if facts["format"] not in (FORMAT, FORMAT_WITH_LAYER):
                raise ValueError(f"format {facts['format']}, this version reads {FORMAT} and {FORMAT_WITH_LAYER}")
            spec, mean, std, classes = (inputs.parse_json(facts[name]) for name in ("spec", "mean", "std", "classes"))
            architecture, shape, *rest = spec
            spec = Spec(architecture, tuple(shape), *map(int, rest))
            tensors: dict[str, list[Params]] = {
                kind: [{} for _ in range(int(facts["count"]))] for kind in ("samples", "statistics")
            }
            layer = _layer(file, facts, device) if facts["format"] == FORMAT_WITH_LAYER else None
            for key in file.keys():  # noqa: SIM118  no mapping
                if key.startswith("last_layer/"):
                    continue
                kind, number, name = key.split("/", 2)
                tensors[kind][int(number)][name] = file.get_tensor(key).clone().to(device)  # clone: out of the map
    except FileNotFoundError:
        raise UserError(f"{path}: samples not found; check the path") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} holds no posterior samples ({reason_of(error)}): give a file of theirs") from error
    if ":" in spec.architecture and network != spec.architecture:
        raise UserError(
            f"{path} holds samples of {spec.architecture}, but a file alone imports no code: name that network too"
        )
    custom.search_current_folder()
    ensemble = Ensemble(
        spec, tensors["samples"], tensors["statistics"], tuple(mean), tuple(std), tuple(classes), device, layer
    )
    for params, statistics in zip(ensemble.samples, ensemble.statistics, strict=True):
        fits = {name: value.shape for name, value in params.items()} == ensemble.network.shapes
        if not fits or statistics.keys() != ensemble.network.buffer_names:
            raise UserError(f"{path} holds samples of another {spec.architecture}: give the network that was sampled")
    return ensemble
