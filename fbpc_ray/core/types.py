"""Types that all rooms share: plain data, torch only."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Params = dict[str, Tensor]
"""Parameters of a network by name, as `nn.Module.named_parameters` names them."""

Forward = Callable[[Params, Tensor], Tensor]
"""(parameters, images (b, c, h, w)) -> logits (b, d)."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (b, d), labels of `Batch`) -> () mean loss, such as -log p(label | logits) in nats per image."""

Augment = Callable[[Tensor], Tensor]
"""One drawn augmentation: images (b, c, h, w) -> images of the same shape. Differentiable."""


class Batch(NamedTuple):
    """Images and their labels."""

    images: Tensor
    """(b, c, h, w) float32, normalised."""
    labels: Tensor
    """(b,) int64, or (b, d) float: probabilities of soft labels, or targets of a squared loss."""


LossAndGrad = Callable[[Params, Batch], tuple[Tensor, Params]]
"""(parameters, batch) -> () mean loss, of cross-entropy in nats per image, and its gradient by parameter. No graph is
left."""
