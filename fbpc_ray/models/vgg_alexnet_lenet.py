"""LeNet, AlexNet and VGG11 in the dataset-distillation literature's form for small images.

LeNet (LeCun et al., 1998) with ReLU and max-pooling; AlexNet (Krizhevsky et al., 2012) and VGG11 (Simonyan and
Zisserman, 2015) with narrow strides, and a single linear layer in the place of three. Each is a `Sequential` of
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
    """2 x (conv 5x5 - ReLU - max-pool), three linear layers. It is made for 32x32: smaller images are padded by 2, as
    the classic pads 28x28. Takes 12x12 and more."""
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
    """Five x (conv - ReLU), max-pools after conv 1, 2 and 5. Takes 8x8 and more; the paper's width is 64."""
    layers: list[nn.Module] = []
    for factor, kernel, pool in ALEXNET:
        layers += [nn.Conv2d(channels, factor * width, kernel, padding=kernel // 2), nn.ReLU()]
        channels = factor * width
        if pool:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return _network(nn.Sequential(*layers), nn.Linear(channels * size * size, classes))


def vgg11(channels: int, size: int, classes: int, *, width: int, norm: str) -> nn.Sequential:
    """Eight x (conv 3x3 - norm - ReLU) with five max-pools. The paper's width is 64.

    32x32 and more have all five pools. Of smaller images a pool is left out where it would leave a later norm less than
    2x2: instance norm makes a constant of a single value.
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
