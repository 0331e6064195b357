"""Made-up trajectories, different for each (index, epoch)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fbpc_ray.core.rng import generator
from fbpc_ray.distillation.expert_format import Recipe

RECIPE = Recipe(
    data="cifar10",
    fingerprint="f00d",
    image_shape=(3, 32, 32),
    classes=10,
    architecture="convnet-bn",
    width=32,
    depth=3,
    epochs=3,
    lr=0.01,
    batch_size=256,
    augment="dsa",
    dtype="float32",
    seed=0,
)


def snapshot(index: int, epoch: int) -> dict[str, Tensor]:
    """Parameters and BatchNorm buffers as a network names them, different for each (index, epoch)."""
    source = generator(0, "snapshot", index, epoch)
    return {
        "blocks.0.conv.weight": torch.randn(4, 3, 3, 3, generator=source),
        "blocks.0.norm.running_mean": torch.randn(4, generator=source),
        "blocks.0.norm.num_batches_tracked": torch.tensor(2**40 + 10 * index + epoch),
        "temperature": torch.randn((), generator=source),
        "head.weight": torch.randn(10, 4, generator=source).t().contiguous().t(),  # not contiguous
    }


def trajectory(index: int, epochs: int = RECIPE.epochs) -> Iterator[dict[str, Tensor]]:
    return (snapshot(index, epoch) for epoch in range(epochs + 1))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names in equal order, dtypes, shapes and bits."""
    return list(left) == list(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(left.values(), right.values(), strict=True)
    )
