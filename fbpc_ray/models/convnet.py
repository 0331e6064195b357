"""ConvNet of the dataset-distillation literature, and the normalisation layers of Fig. 2.

depth x (conv 3x3 - norm - ReLU - average pool 2x2), then one linear layer.
"""

from collections.abc import Callable

from torch import Tensor, nn

NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "in": lambda channels, size: nn.GroupNorm(channels, channels),
    "gn": lambda channels, size: nn.GroupNorm(4, channels),
    "ln": lambda channels, size: nn.LayerNorm([channels, size, size]),
    "bn": lambda channels, size: nn.BatchNorm2d(channels),
    "none": lambda channels, size: nn.Identity(),
}
"""Norm layers by name, from (channels, side of the feature map). `in` is GroupNorm with one channel a group."""


class ConvNet(nn.Module):
    """Images (b, channels, size, size) -> logits (b, classes)."""

    def __init__(self, channels: int, size: int, classes: int, *, width: int, depth: int, norm: str):
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(depth):
            blocks += [
                nn.Conv2d(channels, width, 3, padding=1),
                NORMS[norm](width, size),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels, size = width, size // 2
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(width * size * size, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def default_depth(size: int) -> int:
    """Return the literature's depth for images of size x size: 3 at 28 and 32, 4 at 64, at least 2."""
    return max(2, round(size / 8).bit_length())
