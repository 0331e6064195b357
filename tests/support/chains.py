"""An evaluation of one coreset called x, and what the tests of chains share."""

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core import progress
from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.rng import generator
from fbpc_ray.data.coreset import balanced
from fbpc_ray.data.datasets import Dataset, Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.evaluation.chains import CoresetArrays, EvaluationContext, evaluation_context

Pair = tuple[Tensor, Tensor]
SETTINGS = Evaluation(chain_epochs=30, chain_every=10, chain_eta=0.03, chain_d=0.01, chain_weight_decay=0.05)
"""Settings of a short chain."""
BRIEF = Evaluation(net_steps=10, net_lr=0.01, ensemble_size=2, chain_epochs=4, chain_every=2, chain_augment=False)
"""Settings under which every inference takes a moment."""


def context_of(
    dataset: Dataset, split: str, settings: Evaluation, images: np.ndarray, labels: np.ndarray,
    ood: Split | None = None, compiled: str = "off",
) -> EvaluationContext:  # fmt: skip
    """Collect what the chains on the coreset (images, labels) share, with DSA."""
    return evaluation_context(dataset, split, settings, "dsa", {"x": CoresetArrays(images, labels)}, ood, compiled)


def brief_context(dataset: Dataset, inference: str) -> EvaluationContext:
    """Collect what an evaluation by `inference` on two real images per class shares, with the settings `BRIEF`."""
    real = DeviceDataset(*tensors(dataset.train, "cpu"), dataset.mean, dataset.std)
    images, labels = real.batch(balanced(real.labels, 2, dataset.classes, generator(0)))
    settings = Evaluation(**{**BRIEF.__dict__, "inference": inference})
    return context_of(dataset, "test", settings, images.numpy(), labels.numpy())


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def arrays(two_per_class: Pair) -> tuple[np.ndarray, np.ndarray]:
    return two_per_class[0].numpy(), two_per_class[1].numpy()


class Display(progress.Progress):
    """Keeps the shares of the current chain."""

    def __init__(self):
        super().__init__("evaluate", 1, "chain", watch=progress.Watch(threaded=False))
        self.shares: list[float] = []

    def set_part(self, share):
        self.shares.append(share)


def open_display(monkeypatch) -> Display:
    """Open a display that keeps the shares of a chain, the only one of this process."""
    watch = progress.Watch(threaded=False)
    monkeypatch.setattr(progress, "_watch", watch)
    display = Display()
    watch.open(display)
    return display
