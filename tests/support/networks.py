"""Small networks of every architecture, with images and parameters for them."""

import math

import torch

from fbpc_ray.models.functional import Network, Spec

NORMS = ("in", "gn", "ln", "bn", "none")
ALL = tuple(f"convnet-{norm}" for norm in NORMS)
OTHERS = ("lenet", "alexnet", *(f"{name}-{norm}" for name in ("vgg11", "resnet18") for norm in NORMS), "resnet34-in")
EVERY = ALL + OTHERS
SMALL = {"image_shape": (2, 8, 8), "classes": 4, "width": 8, "depth": 2}


def network(name="convnet-in", **changes):
    """A small network; LeNet's images are 12x12, the least it takes."""
    smallest: dict = {"image_shape": (2, 12, 12)} if name == "lenet" else {}
    return Network(Spec(name, **(SMALL | smallest | changes)))


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count=6, shape=(2, 8, 8), seed=1, dtype=torch.float32):
    return torch.randn(count, *shape, generator=source(seed), dtype=dtype)


def images_for(net, count=6, seed=1, dtype=torch.float32):
    return images_of(count, net.spec.image_shape, seed, dtype)


def random_params(net, seed=2, dtype=torch.float32):
    """Like the network's, but with every entry random: a weight of one or a bias of zero would hide what uses it.

    Deep networks have weights that keep the size of what passes.
    """
    noise, deep = source(seed), not net.spec.architecture.startswith("convnet")

    def entries(name, value):
        drawn = torch.randn(value.shape, generator=noise, dtype=dtype)
        if deep:
            kernel = value.ndim in (2, 4)
            return drawn * math.sqrt(2 / value[0].numel()) if kernel else drawn * 0.3 + name.endswith("weight")
        return drawn * 0.5 + 0.1

    return {name: entries(name, value) for name, value in net.init(source()).items()}
