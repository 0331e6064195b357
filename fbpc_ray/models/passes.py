"""Passes of a network that the inner loops repeat: eager, or compiled for each shape."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch, Params
from fbpc_ray.inference.last_layer import squared_loss
from fbpc_ray.inference.posterior import loss_and_grad
from fbpc_ray.models import chunks
from fbpc_ray.models.compiler import CompileError, Function, compile_function
from fbpc_ray.models.functional import Network
from fbpc_ray.models.precision import autocast

PARTS = {"cpu": 64, "cuda": 1024}
"""{device: most images of a pass that `Passes.features` and `squared_loss_and_grad` take without BatchNorm}. On a CPU a
larger one takes up to twice as long per image [measured]; on a GPU a small one costs its launch alone [a guess]."""


class Passes:
    """The loss with its gradient, the logits, the predictions and the features of one network on one device.

    With the precision bf16, `loss_and_grad` runs in bfloat16; its results, and all other passes, are float32.
    With `chunk_images`, larger batches pass in chunks of so many images (models/chunks.py), which changes last bits.
    With a folder for compiled functions, a pass is compiled for each number of images at its first use. Compiled and
    eager passes differ in the last bits, so a worker that can't compile raises UserError instead of going on eagerly.
    """

    def __init__(self, network: Network, folder: Path | None = None, precision: str = "fp32", chunk_images: int = 0):
        if chunk_images and network.has_batchnorm:
            raise UserError(
                f"--chunk-images {chunk_images}: {network.spec.architecture} has BatchNorm, whose statistics are those "
                "of a whole batch, not of its chunks; choose -in, -gn or -ln, or --chunk-images 0"
            )
        self.network, self.folder, self.precision, self.chunk_images = network, folder, precision, chunk_images
        self._compiled: dict[tuple[str, torch.Size], Function] = {}
        self._eager_loss_and_grad = loss_and_grad(network.forward if precision == "fp32" else self._forward_bf16)
        self._eager_squared_loss_and_grad = loss_and_grad(network.forward, squared_loss)

    def loss_and_grad(self, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Return the mean cross-entropy (), nats per image, and its gradient by parameter. A `LossAndGrad`."""
        if self._divides(batch.images):
            return chunks.mean_loss_and_grad(self._chunk_loss_and_grad, params, batch, self.chunk_images)
        return self._chunk_loss_and_grad(params, batch)

    def _chunk_loss_and_grad(self, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        arguments = (*(params[name].detach() for name in self.network.shapes), *batch)
        kind = "gradient" if batch.labels.ndim == 1 else "gradient of soft labels"
        run = self._run(kind, batch.images.shape, self._loss_and_gradients, arguments)
        if run is None:
            return self._eager_loss_and_grad(params, batch)
        loss, *gradients = run(*arguments)
        return loss, dict(zip(self.network.shapes, gradients, strict=True))

    @torch.no_grad()
    def logits(self, params: Params, images: Tensor) -> Tensor:
        """Return logits (b, d), through which no gradient flows. A `Forward`."""
        if self._divides(images):
            return chunks.concatenated(lambda chunk: self._chunk_logits(params, chunk), images, self.chunk_images)
        return self._chunk_logits(params, images)

    def forward(self, params: Params, images: Tensor) -> Tensor:
        """Return logits (b, d), eager, through which gradient flows to the images. A `Forward`."""
        if self._divides(images):
            return chunks.recomputed(self.network.forward, params, images, self.chunk_images)
        return self.network.forward(params, images)

    def _divides(self, images: Tensor) -> bool:
        return 0 < self.chunk_images < len(images)

    def _chunk_logits(self, params: Params, images: Tensor) -> Tensor:
        arguments = (*(params[name] for name in self.network.shapes), images)
        return self._call("logits", images.shape, self._logits, arguments)[0]

    @torch.no_grad()
    def predict(self, params: Params, statistics: Params, images: Tensor) -> Tensor:
        """Return logits (b, d), each image on its own; `statistics` are those of `Network.statistics`."""
        names, buffers = self.network.shapes, self.network.buffer_names
        arguments = (*(params[name] for name in names), *(statistics[name] for name in buffers), images)
        run = self._run("predict", images.shape, self._predict, arguments)
        return self.network.predict(params, statistics, images) if run is None else run(*arguments)[0]

    def features(self, params: Params, images: Tensor) -> Tensor:
        """Return the last linear layer's inputs (b, h), through which gradient flows to `images`, not to `params`."""
        values = tuple(params[name].detach() for name in self.network.shapes)
        parts = images.split(self.part_size(len(images)))
        if self.folder is None:
            return torch.cat([self._features(*values, part)[0] for part in parts])

        def forward(part: Tensor) -> Tensor:
            return self._call("features", part.shape, self._features, (*values, part))[0]

        def pullback(part: Tensor, cotangent: Tensor) -> Tensor:
            return self._call("pullback", part.shape, self._pullback, (*values, part, cotangent))[0]

        return torch.cat([_Differentiable.apply(forward, pullback, part) for part in parts])

    def squared_loss_and_grad(self, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Return the mean squared loss () of outputs and targets (b, d), the batch's labels, and its gradient."""
        size = self.part_size(len(batch.images))
        return chunks.mean_loss_and_grad(self._part_squared_loss_and_grad, params, batch, size)

    def part_size(self, count: int) -> int:
        """Return the images of each part of `count`: equal parts of at most `PARTS`, or all with BatchNorm."""
        return count if self.network.buffer_names else -(-count // -(-count // PARTS[self.network.device.type]))

    def _part_squared_loss_and_grad(self, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        arguments = (*(params[name].detach() for name in self.network.shapes), *batch)
        loss, *gradients = self._call("squared loss", batch.images.shape, self._squared_loss_and_gradients, arguments)
        return loss, dict(zip(self.network.shapes, gradients, strict=True))

    def _call(
        self, kind: str, shape: torch.Size, function: Callable[..., list[Tensor]], arguments: tuple[Tensor, ...]
    ) -> list[Tensor]:
        return (self._run(kind, shape, function, arguments) or function)(*arguments)

    def _run(
        self, kind: str, shape: torch.Size, function: Callable[..., list[Tensor]], arguments: tuple[Tensor, ...]
    ) -> Function | None:
        if self.folder is None:
            return None
        key = kind, shape
        if key not in self._compiled:
            try:
                self._compiled[key] = compile_function(function, arguments, self.folder)
            except CompileError as error:
                raise UserError(
                    f"the passes of {self.network.spec.architecture} cannot be compiled here ({error}): fix that on "
                    "every node, or start again with --compiled off --compiled-chains off",
                    code=1,
                ) from error
        return self._compiled[key]

    def _loss_and_gradients(self, *arguments: Tensor) -> list[Tensor]:
        *values, images, labels = arguments
        if self.precision == "bf16":  # where it is compiled, channels_last saves reordering
            images = images.contiguous(memory_format=torch.channels_last)
        loss, gradients = self._eager_loss_and_grad(self._params(values), Batch(images, labels))
        if self.precision == "bf16":  # the next call's parameters must have the strides of this call's
            return [loss, *(gradient.contiguous() for gradient in gradients.values())]
        return [loss, *gradients.values()]

    def _forward_bf16(self, params: Params, images: Tensor) -> Tensor:
        with autocast(self.precision, self.network.device.type):
            return self.network.forward(params, images).float()

    def _logits(self, *arguments: Tensor) -> list[Tensor]:
        *values, images = arguments
        return [self.network.forward(self._params(values), images)]

    def _predict(self, *arguments: Tensor) -> list[Tensor]:
        *values, images = arguments
        count = len(self.network.shapes)
        statistics = dict(zip(self.network.buffer_names, values[count:], strict=True))
        return [self.network.predict(self._params(values[:count]), statistics, images)]

    def _squared_loss_and_gradients(self, *arguments: Tensor) -> list[Tensor]:
        *values, images, targets = arguments
        loss, gradients = self._eager_squared_loss_and_grad(self._params(values), Batch(images, targets))
        return [loss, *gradients.values()]

    def _features(self, *arguments: Tensor) -> list[Tensor]:
        *values, images = arguments
        return [self.network.features(self._params(values), images)[0]]

    def _pullback(self, *arguments: Tensor) -> list[Tensor]:
        """Differentiate `_features`, times a cotangent (b, h), by the images."""
        *values, images, cotangent = arguments
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            return list(torch.autograd.grad(self._features(*values, leaf)[0], leaf, cotangent))

    def _params(self, values: list[Tensor]) -> Params:
        return dict(zip(self.network.shapes, values, strict=True))


class _Differentiable(torch.autograd.Function):
    """forward(images), whose gradient is pullback(images, cotangent): for compiled functions, which have none."""

    @staticmethod
    def forward(
        ctx: Any, forward: Callable[[Tensor], Tensor], pullback: Callable[[Tensor, Tensor], Tensor], images: Tensor
    ) -> Tensor:
        ctx.pullback = pullback
        ctx.save_for_backward(images)
        return forward(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[override]
        return None, None, ctx.pullback(*ctx.saved_tensors, grad_outputs[0].contiguous())


def count_macs(network: Network) -> int:
    """Count the multiply-accumulates of one image's forward pass, in convolutions and linear layers."""
    total = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module.weight, Tensor)
        total += output[0].numel() * module.weight[0].numel()

    module = network.module(generator(0, "count")).eval()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(torch.zeros(1, *network.spec.image_shape, device=network.device))
    return total
