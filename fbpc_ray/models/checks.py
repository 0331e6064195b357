"""Requirements on a user's network, tested on two images before a run starts.

* Its initial parameters are drawn from torch's global generator alone; nothing else in the network is random. The
  logits in p(y | f_theta(x)) are a function of parameters and images alone, the same in `train()` and `eval()`. So
  Dropout is refused; only BatchNorm may differ (batch statistics in training, see functional.py).
* Gradients reach the images and every parameter; no parameter is frozen.
* The prediction for an image doesn't depend on the other images of the batch.
"""

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator, seeded_globally
from fbpc_ray.core.types import Params
from fbpc_ray.models import custom
from fbpc_ray.models.functional import Network, Spec


def check(spec: Spec) -> None:
    """Raise UserError if a network can't be built, or is a user's own and violates a requirement."""
    if ":" not in spec.architecture:
        Network(spec)
        return
    custom.search_current_folder()
    with custom.user_code(spec.architecture), torch.random.fork_rng(devices=[]):
        network = Network(spec)
        violation = first_violation(network)
    if violation:
        raise UserError(f"{spec.architecture} cannot be used: {violation}")


def first_violation(network: Network) -> str:
    """Describe the first violated requirement and its fix; return "" if there is none."""
    source = generator(0, "contract", "inputs")
    # Every parameter random: a zero would hide what it multiplies.
    params = {n: v + 0.1 * torch.randn(v.shape, generator=source) for n, v in network.init(source).items()}
    images = torch.randn(2, *network.spec.image_shape, generator=source)
    return (
        _initialisation(network)
        or _logits(network, params, images)
        or _purity(network, params, images)
        or _independence(network, params, images)
    )


def _initialisation(network: Network) -> str:
    first, again, other = (network.module(generator(seed, "contract")) for seed in (0, 0, 1))
    frozen = [name for name, value in first.named_parameters() if not value.requires_grad]
    if frozen:
        return f"its parameter {frozen[0]} is frozen (requires_grad=False); make it trainable, or a buffer"
    if not _same(dict(first.state_dict()), dict(again.state_dict())):
        return "its initialisation uses another generator than torch's global one; use torch.nn.init or torch.randn"
    if _same(dict(first.named_parameters()), dict(other.named_parameters())):
        return "its initial parameters are the same for every seed; make them random, and set no seed in the network"
    if not _same(dict(first.named_buffers()), dict(other.named_buffers())):
        return "it has a random buffer; make it a parameter or a constant"
    return ""


def _logits(network: Network, params: Params, images: Tensor) -> str:
    expected = (2, network.spec.classes)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    images = images.clone().requires_grad_()
    logits = network.forward(leaves, images)
    if not isinstance(logits, Tensor) or logits.shape != expected or logits.dtype != torch.float32:
        description = f"{tuple(logits.shape)} {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        return f"for 2 images it returns {description}; it must return logits {expected} torch.float32"
    names, weights = ["the images", *leaves], torch.linspace(-1, 1, logits.numel()).view(expected)
    gradients = torch.autograd.grad((logits * weights).sum(), [images, *leaves.values()], allow_unused=True)
    detached = [name for name, value in zip(names, gradients, strict=True) if value is None]
    return f"no gradient reaches {detached[0]}; use it without detaching, or remove it" if detached else ""


def _purity(network: Network, params: Params, images: Tensor) -> str:
    module, logits = network.module(generator(0, "contract")), network.forward(params, images)
    dropout = any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in module.modules())
    for seed in (0, 1):
        with seeded_globally(generator(seed, "contract", "dice")):
            dropout = dropout or not _close(functional_call(module, params, (images,)), logits)
    if dropout:
        return "its logits differ between two calls, or between train() and eval(); remove Dropout and the like"
    return ""


def _independence(network: Network, params: Params, images: Tensor) -> str:
    statistics = network.statistics(params, [images])
    alone = torch.cat([network.predict(params, statistics, image) for image in images.split(1)])
    if not _close(alone, network.predict(params, statistics, images)):
        return "a prediction depends on the other images of the batch; let BatchNorm track its statistics"
    return ""


def _same(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
