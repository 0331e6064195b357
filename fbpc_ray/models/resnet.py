"""ResNet18 and ResNet34 (He et al., 2016) with a stem for small images: one 3x3 conv, no pool.

stem (conv 3x3 - norm - ReLU), four stages of blocks with 1, 2, 4, 8 x width channels, mean over the map, one linear
layer. No convolution has a bias. The paper's width is 64.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from fbpc_ray.models.convnet import NORMS


class Block(nn.Module):
    """Residual block, relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    Maps (b, channels, size, size) to (b, width, size / stride, size / stride). The first convolution has the stride;
    the shortcut is x, or norm(conv 1x1 of x) where the shape changes.
    """

    def __init__(self, channels: int, width: int, size: int, stride: int, norm: str):
        super().__init__()
        size = -(-size // stride)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = NORMS[norm](width, size)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = NORMS[norm](width, size)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), NORMS[norm](width, size))

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images (b, channels, size, size) -> logits (b, classes).

    `blocks` are those of each stage: 2, 2, 2, 2 for ResNet18, 3, 4, 6, 3 for ResNet34.

    Stages 2 to 4 start by halving the feature map, rounded up, except where less than 2x2 would be left (the last stage
    for images of 8x8): instance norm would turn a single value into a constant.
    """

    def __init__(self, channels: int, size: int, classes: int, *, width: int, blocks: Sequence[int], norm: str):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), NORMS[norm](width, size), nn.ReLU()
        )
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 and size > 2 else 1
                layers.append(Block(channels, width << stage, size, stride, norm))
                channels, size = width << stage, -(-size // stride)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(self.stem(images)).mean((2, 3)))
