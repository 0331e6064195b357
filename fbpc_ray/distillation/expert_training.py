"""Train one expert (App. C.1): plain SGD on the whole training set, a snapshot after every epoch. No files."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbpc_ray.core.rng import generator
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.models.functional import Network


def train_expert(
    network: Network,
    data: DeviceDataset,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    augment: str,
    seed: int,
    index: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield the module's state (parameters and buffers, on the CPU) at epochs 0 (the initialisation) to `epochs`.

    A trajectory depends on `seed`, `index` and the arguments alone. The tensors yielded may be those that the next
    epoch changes: copy what is kept.
    """
    name = network.spec.architecture
    module = network.module(generator(seed, "expert", name, index, "init"))
    parameters = list(module.parameters())
    yield _state(module)
    for epoch in range(1, epochs + 1):
        for batch in data.epoch(batch_size, augment, generator(seed, "expert", name, index, "epoch", epoch)):
            gradients = torch.autograd.grad(cross_entropy(module(batch.images), batch.labels), parameters)
            with torch.no_grad():  # SGD by hand: torch.optim has each process import torch's compiler, for seconds
                for value, gradient in zip(parameters, gradients, strict=True):
                    value.add_(gradient, alpha=-learning_rate)
        yield _state(module)


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}
