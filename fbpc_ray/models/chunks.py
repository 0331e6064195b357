"""Pass a large batch in chunks: less memory, and the same values and gradients but for rounding.

The mean over a batch is the sum of its chunks' means, weighted by their numbers of images. BatchNorm's statistics are
those of the whole batch, so networks with BatchNorm can't be chunked.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fbpc_ray.core.types import Batch, Forward, LossAndGrad, Params


def mean_loss_and_grad(loss_and_grad: LossAndGrad, params: Params, batch: Batch, size: int) -> tuple[Tensor, Params]:
    """Return the mean loss () of `batch` and its gradient by parameter, from chunks of at most `size` images."""
    loss: Tensor | float = 0.0
    total: Params = {}
    for images, labels in zip(batch.images.split(size), batch.labels.split(size), strict=True):
        part, gradients = loss_and_grad(params, Batch(images, labels))
        share = len(labels) / len(batch.labels)
        loss = loss + share * part
        for name, gradient in gradients.items():
            if name in total:
                total[name].add_(gradient, alpha=share)
            else:
                total[name] = share * gradient
    return torch.as_tensor(loss), total


def concatenated(forward: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Return logits (b, d) of `images` (b, c, h, w), through which no gradient flows."""
    return torch.cat([forward(chunk) for chunk in images.split(size)])


def recomputed(forward: Forward, params: Params, images: Tensor, size: int) -> Tensor:
    """Return logits (b, d) through which gradient flows to `images` (b, c, h, w), not to `params`.

    The backward pass computes a chunk's activations again, and frees them before the next chunk's.
    """
    return torch.cat([
        checkpoint(forward, params, chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in images.split(size)
    ])  # fmt: skip
