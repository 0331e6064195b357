"""Passes in chunks: the values and gradients of the whole batch, from passes of few images."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch, Forward, Params
from fbpc_ray.data.augment import OPERATIONS, Draw, apply
from fbpc_ray.data.datasets import tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.methods.common import GradientContext, coreset_batches
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.distillation.worker import METHODS, Worker
from fbpc_ray.evaluation.chains import posterior_samples
from fbpc_ray.execution import session
from fbpc_ray.execution.session import Session
from fbpc_ray.inference.divergence import forward_kl
from fbpc_ray.inference.posterior import loss_and_grad, posterior_at
from fbpc_ray.inference.vectors import flatten
from fbpc_ray.models.functional import Network, specify
from fbpc_ray.models.passes import Passes

COUNT = 11
SIZES = (1, 4, 5, 10)
"""4: chunks of 4, 4, 3; 5 and 10: the last chunk has a single image."""
NAMES = ("convnet-in", "convnet-gn", "resnet18-ln", "lenet")


def network(name: str) -> Network:
    return Network(specify(name, (3, 32, 32) if name != "convnet-in" else (1, 8, 8), 10, 4, 0))


def double(net: Network) -> tuple[Params, Tensor]:
    """Parameters and images in float64."""
    source = generator(0, "chunks")
    params = {name: value.double() for name, value in net.init(source).items()}
    return params, torch.randn(COUNT, *net.spec.image_shape, generator=source, dtype=torch.float64)


def labels_of(kind: str) -> Tensor:
    if kind == "classes":
        return torch.arange(COUNT) % 10
    return torch.randn(COUNT, 10, generator=generator(1, kind), dtype=torch.float64).softmax(1)


def assert_equal(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["classes", "soft labels"])
def test_the_mean_loss_and_its_gradient_are_those_of_the_whole_batch(name, size, kind):
    net, labels = network(name), labels_of(kind)
    params, images = double(net)
    loss, gradients = Passes(net, chunk_images=size).loss_and_grad(params, Batch(images, labels))
    expected, others = loss_and_grad(net.forward)(params, Batch(images, labels))
    assert_equal(loss, expected)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        assert_equal(gradient, others[key])
    assert not loss.requires_grad


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_eq_17_through_an_augmentation_of_the_whole_batch(size, operation):
    """Its draws are for the whole batch; both terms, the noise of the logits and the gradient by u are the same."""
    net, labels = network("convnet-in"), labels_of("classes")
    params, images = double(net)
    other = {name: value + 0.1 for name, value in params.items()}
    view = Draw(operation, torch.rand(COUNT, 3, generator=generator(2, "view")))
    psi = torch.rand(COUNT, 10, generator=generator(3, "psi"), dtype=torch.float64)

    def by_images(forward: Forward) -> tuple[Tensor, Tensor]:
        u = images.clone().requires_grad_()
        seen = apply(view, u)
        side_x, side_u = (posterior_at(forward, of, seen, psi) for of in (params, other))
        divergence = forward_kl(side_x, side_u, labels, 5, generator(4, "noise"))
        return divergence.value, torch.autograd.grad(divergence.value, u)[0]

    value, gradient = by_images(Passes(net, chunk_images=size).forward)
    expected, whole = by_images(net.forward)
    assert whole.abs().max() > 1e-3
    assert_equal(value, expected)
    assert_equal(gradient, whole)


def test_batches_of_the_coreset_are_augmented_before_they_are_divided():
    """So a chunk sees what the whole batch would see, whatever its size."""
    net = network("convnet-in")
    params, images = double(net)
    results = []
    for size in (0, 4):
        batches = coreset_batches(images, labels_of("classes"), COUNT, "dsa", generator(5, "map"))
        passes = Passes(net, chunk_images=size)
        results.append([passes.loss_and_grad(params, next(batches))[0] for _ in range(12)])
    assert_equal(torch.stack(results[0]), torch.stack(results[1]))
    assert len({value.item() for value in results[0]}) == 12


@pytest.mark.parametrize("size", SIZES)
def test_logits_without_gradient(size):
    net = network("convnet-in")
    params, images = double(net)
    assert_equal(Passes(net, chunk_images=size).logits(params, images), net.forward(params, images).detach())


class Counted(Network):
    """A network that keeps the largest number of images of a pass."""

    most = 0

    def forward(self, params: Params, images: Tensor) -> Tensor:
        self.most = max(self.most, len(images))
        return super().forward(params, images)


@pytest.fixture(scope="module")
def of_instances(small) -> Config:
    return small.updated(
        architectures=("convnet-in",), ipc=2, batch_size=20, backend="serial", map_max_steps=5, gamma=0.1
    )


@pytest.mark.parametrize("method", ["fbpc", "fbpc-isotropic", "bpc-fkl", "bpc-rkl"])
def test_the_gradient_of_a_method_in_chunks(method, of_instances, digits):
    """Close to that of whole batches, and no pass with gradient has more than 6 images."""
    config = of_instances.updated(method=method, real_batch_size=32, syn_steps=3)
    spec = session.network_specs(config, digits)[0]
    state, labels = initial_state(digits, 2, 0)
    real = DeviceDataset(*tensors(digits.train, "cpu"), digits.mean, digits.std)
    store = session.expert_store(config, digits, spec)

    def gradient(size: int):
        net = Counted(spec)
        context = GradientContext(
            Passes(net, chunk_images=size), store, real, labels, config.distillation, "dsa", 2
        )  # fmt: skip
        return METHODS[method](context, 0, state.images, 0.01), net.most

    (whole, most), (chunked, few) = gradient(0), gradient(6)
    assert (most, few) == (32 if method != "bpc-fkl" and method != "fbpc-isotropic" else 20, 6)
    assert whole.stats.map_steps == chunked.stats.map_steps
    torch.testing.assert_close(chunked.value, whole.value, rtol=1e-3, atol=1e-3 * whole.value.abs().max().item())
    assert not torch.equal(chunked.value, whole.value)


def test_a_chain_in_chunks(of_instances, digits):
    """SGHMC's full batches: the same draws, and parameters that differ by rounding."""
    net, settings = Counted(session.network_specs(of_instances, digits)[0]), of_instances.evaluation
    state, labels = initial_state(digits, 2, 0)
    settings = replace(settings, chain_epochs=4, chain_every=2)
    chunked = posterior_samples(Passes(net, chunk_images=6), state.images, labels, settings, "dsa", 0)
    assert net.most == 6
    whole = posterior_samples(Passes(net), state.images, labels, settings, "dsa", 0)
    assert len(chunked) == len(whole) == 2
    torch.testing.assert_close(flatten(chunked[-1]), flatten(whole[-1]), rtol=1e-4, atol=1e-5)


def test_any_worker_takes_the_chunks_of_the_configuration(of_instances, digits):
    """A worker made elsewhere computes the bits of this one; a budget that holds all images changes none."""
    values = []
    for settings in ({}, {"memory_budget": "4GB"}, {"chunk_images": 7}, {"chunk_images": 7}):
        opened: Session = session.open_session(of_instances.updated(**settings), lambda line: None, digits)
        group = opened.worker_group()
        assert group.worker.chunk_images == opened.config.networks.chunk_images
        worker = Worker(**pickle.loads(pickle.dumps(group.worker))._asdict(), device="cpu")
        values.append(worker.gradient(group.tasks[0], 0, opened.initial[0].images.numpy(), 0.0).value)
    assert np.array_equal(values[0], values[1])
    assert np.array_equal(values[2], values[3])
    assert not np.array_equal(values[0], values[2])


def test_batchnorm_is_refused():
    with pytest.raises(UserError, match=r"^--chunk-images 5: convnet-bn has BatchNorm, .*; choose -in, -gn or -ln"):
        Passes(network("convnet-bn"), chunk_images=5)
