"""Your own images and network: distil drawn shapes into one image per class, and compare it with random images.

python examples/own.py                   # about a minute on two cores
python examples/own.py --steps 200       # a better coreset
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fbpc_ray import dataset, distill, posterior, save

CLASSES = ("disc", "square", "cross")


class Shapes(Dataset[tuple[Tensor, int]]):
    """Discs, squares and crosses of any place and size, on noise: (1, 16, 16) floats in 0..1, drawn from the index.

    Any torch Dataset of (image, label) will do, those of torchvision too (with ToTensor, without Normalize).
    """

    classes = CLASSES

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = torch.Generator().manual_seed(index), index % 3
        y, x, size = (float(value) for value in torch.rand(3, generator=source) * torch.tensor([3, 3, 2]))
        down, right = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        down, right, size = (down - 6 - y).abs(), (right - 6 - x).abs(), 3 + size
        near, far = torch.minimum(down, right), torch.maximum(down, right)
        inside = (down**2 + right**2 < size**2, far < 0.9 * size, (near < 1) & (far < size))[label]
        return (0.7 * inside + 0.3 * torch.rand(16, 16, generator=source))[None], label


def network(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Any module without Dropout; the function is called again for each expert and chain."""
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.GELU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), classes),
    )  # fmt: skip


def main(images: int, steps: int, experts: str, out: str, quick: bool) -> None:
    train, test = Subset(Shapes(images), range(images // 3, images)), Subset(Shapes(images), range(images // 3))
    data = dataset(train, test, classes=CLASSES, name="shapes")
    settings: dict[str, Any] = {"preset": "digits", "width": 16, "expert_count": 2, "expert_epochs": 20}
    if quick:
        settings |= {"expert_epochs": 5, "gamma": 0.5, "posterior_steps": 3, "mc_samples": 3, "map_max_steps": 50}
    settings |= {"steps": steps, "experts": experts}

    coreset = distill(data, [network, "convnet-in"], ipc=1, **settings)
    path = Path(out) / "coreset.safetensors"
    save(coreset, path)
    coresets = {"random": distill(data, network, ipc=1, method="random", **settings), "distilled": coreset}
    print(f"\n{'3 images':<11}accuracy %  NLL    (own network, {len(test)} test images, 3 chains as one ensemble)")
    short: dict[str, Any] = {"chain_epochs": 20, "chain_every": 10} if quick else {}
    for name, coreset in coresets.items():
        samples = posterior(coreset, network, num_chains=3, **short)
        scores = samples.predict(data.test.images).scores(data.test.labels)
        print(f"{name:<11}{100 * scores.accuracy:<12.1f}{scores.nll:.3f}")
    print(f"\ncoreset: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600, help="a third of them are for the test")
    parser.add_argument("--steps", type=int, default=40, help="updates of the coreset")
    parser.add_argument("--experts", default="experts", help="folder that keeps the expert trajectories")
    parser.add_argument("--out", default="outputs/own", help="folder of the coreset")
    parser.add_argument("--quick", action="store_true", help="weak experts and short chains: no result")
    main(**vars(parser.parse_args()))
