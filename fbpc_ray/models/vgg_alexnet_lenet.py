"""LeNet, AlexNet and VGG11 in the dataset-distillation literature's form for small images.

LeNet (LeCun et al., 1998) with ReLU and max-pooling; AlexNet (Krizhevsky et al., 2012) and VGG11 (Simonyan and
Zisserman, 2015) with narrow strides, and a single linear layer instead of three. Each is a `Sequential` of
`features` and `head`: images (b, channels, size, size) -> logits (b, classes).
"""

from collections import OrderedDict

from torch import nn

from fbpc_ray.models.convnet import NORMS

ALEXNET = ((2, 5, True), (3, 5, True), (4, 3, False), (3, 3, False), (3, 3, True))
"""(channels / width, kernel, pool?) of each convolution."""
VGG11 = ((1,), (2,), (4, 4), (8, 8), (8, 8))
"""Channels / width of the convolutions before each pool."""


def lenet(channels: int, size: int, classes: int) -> nn.Sequential:
    """Build LeNet: 2 x (conv 5x5 - ReLU - max-pool), three linear layers. Takes 12x12 and more.

    The network is made for 32x32: smaller images are padded by 2, as is usual for 28x28.
    """
    padding = 2 if size < 32 else 0
    last = ((size + 2 * padding - 4) // 2 - 4) // 2
    features = nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
    )
    head = nn.Sequential(
        *(nn.Linear(16 * last * last, 120), nn.ReLU()), *(nn.Linear(120, 84), nn.ReLU()), nn.Linear(84, classes)
    )
    return _network(features, head)


def alexnet(channels: int, size: int, classes: int, *, width: int) -> nn.Sequential:
    """Build AlexNet: 5 x (conv - ReLU), max-pools after conv 1, 2 and 5. Takes 8x8 and more.

    The paper's width is 64.
    """
    layers: list[nn.Module] = []
    for factor, kernel, pool in ALEXNET:
        layers += [nn.Conv2d(channels, factor * width, kernel, padding=kernel // 2), nn.ReLU()]
        channels = factor * width
        if pool:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return _network(nn.Sequential(*layers), nn.Linear(channels * size * size, classes))


def vgg11(channels: int, size: int, classes: int, *, width: int, norm: str) -> nn.Sequential:
    """Build VGG11: 8 x (conv 3x3 - norm - ReLU) with five max-pools. Width 64 in the paper.

    Images of 32x32 and more get all five pools. For smaller images, a pool is left out if a later norm would see less
    than 2x2: instance norm would turn a single value into a constant.
    """
    layers: list[nn.Module] = []
    for stage, factors in enumerate(VGG11, 1):
        for factor in factors:
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), NORMS[norm](factor * width, size), nn.ReLU()]
            channels = factor * width
        if stage == len(VGG11) or size >= 4:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return _network(nn.Sequential(*layers), nn.Linear(channels * size * size, classes))


def _network(features: nn.Module, head: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), head=head))
