"""Real images on the device: one uint8 tensor, normalised and augmented batch by batch."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from fbpc_ray.core.types import Batch
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.data.datasets import normalise


class DeviceDataset:
    """The training images as one uint8 tensor on the device, normalised batch by batch."""

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]):
        """images (n, c, h, w) uint8 and labels (n,) int64, on the device that computes."""
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> Batch:
        """Return normalised float32 images and labels of `index` (b,), an int64 tensor on the CPU."""
        index = index.to(self.images.device)
        return Batch(normalise(self.images[index], self.mean, self.std), self.labels[index])

    def epoch(self, size: int, augment: str, source: torch.Generator) -> Iterator[Batch]:
        """Yield every image once, shuffled, in augmented batches of `size`; the last may be smaller."""
        for index in torch.randperm(len(self), generator=source).split(size):
            batch = self.batch(index)
            yield batch._replace(images=AUGMENTATIONS[augment](len(index), source)(batch.images))

    def stream(self, size: int, augment: str, source: torch.Generator) -> Iterator[Batch]:
        """Yield endless batches of exactly min(size, n) images: epoch after epoch, without the remainders."""
        size = min(size, len(self))
        while True:
            yield from islice(self.epoch(size, augment, source), len(self) // size)
