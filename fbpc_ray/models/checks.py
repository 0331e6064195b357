"""What a network must hold to, tried on two images before anything long begins.

* Its initial parameters are drawn from torch's global generator alone; nothing else in it is random. A likelihood
  p(y | f_theta(x)) has no dice: the logits are a function of parameters and images alone, the same in `train()` and
  `eval()`. So Dropout is refused; only BatchNorm may differ (batch statistics in training, see zoo.py).
* Gradients reach the images and every parameter; no parameter is frozen.
* The prediction for an image is independent of the images beside it.
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
    """Raise UserError where a network can't be built, or is a user's own and doesn't hold to the above."""
    if ":" not in spec.architecture:
        Network(spec)
        return
    custom.search_current_folder()
    with custom.users_code(spec.architecture), torch.random.fork_rng(devices=[]):
        network = Network(spec)
        broken = first_breach(network)
    if broken:
        raise UserError(f"{spec.architecture} cannot be used: {broken}")


def first_breach(network: Network) -> str:
    """What the network does not hold to, and the mend; empty where it holds to everything."""
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
        return f"its parameter {frozen[0]} is frozen; make it a buffer, or let it learn"
    if not _same(dict(first.state_dict()), dict(again.state_dict())):
        return "it draws from elsewhere than torch's global generator; use torch.nn.init or torch.randn alone"
    if _same(dict(first.named_parameters()), dict(other.named_parameters())):
        return "its initial parameters are the same at every draw; make them random, and seed nothing in it"
    if not _same(dict(first.named_buffers()), dict(other.named_buffers())):
        return "it has a random buffer; make it a parameter or a constant"
    return ""


def _logits(network: Network, params: Params, images: Tensor) -> str:
    wanted = (2, network.spec.classes)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    images = images.clone().requires_grad_()
    logits = network.forward(leaves, images)
    if not isinstance(logits, Tensor) or logits.shape != wanted or logits.dtype != torch.float32:
        shown = f"{tuple(logits.shape)} {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        return f"for 2 images it returns {shown}; it must return logits {wanted} torch.float32"
    names, weights = ["the images", *leaves], torch.linspace(-1, 1, logits.numel()).view(wanted)
    gradients = torch.autograd.grad((logits * weights).sum(), [images, *leaves.values()], allow_unused=True)
    cut = [name for name, value in zip(names, gradients, strict=True) if value is None]
    return f"no gradient reaches {cut[0]}; use it, without detaching, or remove it" if cut else ""


def _purity(network: Network, params: Params, images: Tensor) -> str:
    module, logits = network.module(generator(0, "contract")), network.forward(params, images)
    dropout = any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in module.modules())
    for seed in (0, 1):
        with seeded_globally(generator(seed, "contract", "dice")):
            dropout = dropout or not _close(functional_call(module, params, (images,)), logits)
    if dropout:
        return "its logits change from call to call or between train() and eval(); take out Dropout and the like"
    return ""


def _independence(network: Network, params: Params, images: Tensor) -> str:
    statistics = network.statistics(params, [images])
    alone = torch.cat([network.predict(params, statistics, image) for image in images.split(1)])
    if not _close(alone, network.predict(params, statistics, images)):
        return "an image's prediction changes with those beside it; let BatchNorm track its statistics"
    return ""


def _same(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
