"""--device cuda: no operation mixes devices, results are the CPU's, and the program seldom waits for the GPU.

The GPU is simulated; `pytest -m gpu` compares with the CPU on a real one too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.simulated_gpu import simulated_gpu

from fbpc_ray import api
from fbpc_ray.core.types import Batch
from fbpc_ray.evaluation.ensemble import finite
from fbpc_ray.inference import map_solve, weight_space
from fbpc_ray.inference.vectors import flatten
from fbpc_ray.models.functional import ARCHITECTURES, Network, specify
from fbpc_ray.models.passes import Passes

SIZES: dict[str, Any] = {
    "width": 4, "ipc": 2, "steps": 2, "expert_count": 1, "expert_epochs": 3, "expert_batch_size": 8, "start_epoch": 1,
    "real_batch_size": 8, "map_max_steps": 5, "posterior_steps": 4, "syn_steps": 3,
}  # fmt: skip
CHAINS: dict[str, Any] = {"num_chains": 1, "chain_epochs": 4, "chain_every": 2}


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    return api.dataset((images, np.arange(40) % 2), log=lambda line: None)


class Gpu:
    """A simulated GPU, whose results are the CPU's to the bit, or a real one, whose results are near them."""

    def __init__(self, simulated: bool):
        self.simulated = simulated

    def __call__(self) -> AbstractContextManager:
        return simulated_gpu() if self.simulated else nullcontext()

    def agree(self, ours: Any, cpu: Any) -> bool:
        pairs = zip(np.ravel(np.asarray(ours)), np.ravel(np.asarray(cpu)), strict=True)
        return all(one == other if self.simulated else abs(one - other) < 0.05 for one, other in pairs)


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield Gpu(request.param == "simulated")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fbpc", "views": 2, "learn_labels": True, "image_average": 0.9, "batch_size": 2},
        {"method": "fbpc", "map_init": "warm", "chunk_images": 1, "trajectory_cache_gb": 0},
        {"method": "fbpc-isotropic"},
        {"method": "bpc-fkl", "learn_labels": True},
        {"method": "bpc-rkl"},
        {"method": "bpc-w"},
        {"method": "vbpc"},
        {"method": "frepo"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_distillation_has_the_images_of_the_cpu(gpu, data, settings, tmp_path):
    def distilled(device: str) -> api.Coreset:
        own: dict[str, Any] = {
            "experts": str(tmp_path / device),
            "device": device,
            "compiled": "off",
            "augment": "none",
        }
        return api.distill(data, "convnet-in", log=lambda line: None, **SIZES, **settings, **own)

    with gpu():
        coreset = distilled("cuda")
    assert coreset.images.device.type == "cpu"
    assert gpu.agree(coreset.images, distilled("cpu").images)
    assert not torch.equal(coreset.images, real_images(data).images)


def real_images(data: api.Dataset) -> api.Coreset:
    return api.distill(data, "convnet-in", method="random", width=4, ipc=2, log=lambda line: None)


@pytest.mark.parametrize(
    "settings", [{"method": "fbpc", "views": 3}, {"method": "bpc-fkl", "views": 3}, {"method": "bpc-w"}]
)
def test_augmented_images_have_a_gradient_that_cuda_repeats(data, settings, tmp_path):
    def distilled(device: str) -> api.Coreset:
        own: dict[str, Any] = {"experts": str(tmp_path / device), "device": device, "compiled": "off", "steps": 4}
        return api.distill(data, "convnet-in", log=lambda line: None, **SIZES | settings | own)

    with simulated_gpu() as gpu:
        coreset = distilled("cuda")
        assert not gpu.varying
    torch.testing.assert_close(coreset.images, distilled("cpu").images, rtol=1e-3, atol=1e-3)


def test_the_simulated_gpu_tells_what_cuda_does_not_repeat():
    with simulated_gpu() as gpu:
        images = torch.ones(1, 1, 4, 4, device="cuda").requires_grad_()
        torch.nn.functional.grid_sample(images, torch.zeros(1, 4, 4, 2, device="cuda"), align_corners=False)
        assert not gpu.varying  # only its gradient
        value = torch.nn.functional.grid_sample(images, torch.zeros(1, 4, 4, 2, device="cuda"), align_corners=False)
        value.sum().backward()
        assert gpu.varying == {"aten.grid_sampler_2d_backward.default"}


@pytest.mark.parametrize("architecture", ["convnet-in", "convnet-bn"])
@pytest.mark.parametrize("inference", ["sghmc", "last-layer", "mse", "ensemble"])
def test_an_evaluation_has_the_scores_of_the_cpu(gpu, data, architecture, inference):
    def nll(device: str) -> list[float | None]:
        own = {"inference": inference, "device": device, "net_steps": 3}
        return api.evaluate(real_images(data), data, architecture, log=lambda line: None, **CHAINS, **own)[
            architecture
        ]["nll"]

    with gpu():
        ours = nll("cuda")
    assert gpu.agree(ours, nll("cpu")) and ours[0]


def test_posterior_samples_predict_what_they_predict_on_the_cpu(gpu, data, tmp_path):
    file, images, coreset = tmp_path / "samples.safetensors", data.test.images, real_images(data)
    with gpu():
        samples = api.posterior(coreset, "convnet-bn", device="cuda", **CHAINS)
        api.save(samples, file)
        again = api.load_posterior(file, device="cuda").predict(images)
        ours = samples.predict(images)
    expected = api.posterior(coreset, "convnet-bn", device="cpu", **CHAINS).predict(images)
    for prediction in (ours, again):
        assert gpu.agree(prediction.probabilities, expected.probabilities)
        assert gpu.agree(prediction.mutual_information, expected.mutual_information)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_network_passes(gpu, architecture):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def results(device: str) -> list[np.ndarray]:
        """The loss, the norm of its gradient, and logits with estimated statistics."""
        network = Network(specify(architecture, (3, 32, 32), 2, 16, 0), device)
        params = network.init(torch.Generator().manual_seed(0))
        batch = Batch(images.to(network.device), torch.tensor([0, 1]).to(network.device))
        loss, gradients = Passes(network).loss_and_grad(params, batch)
        logits = network.predict(params, network.statistics(params, [batch.images]), batch.images)
        assert {value.device for value in (loss, logits, *gradients.values())} == {loss.device}
        assert loss.device.type == device
        return [value.cpu().numpy() for value in (loss, flatten(gradients).norm(), logits)]

    with gpu():
        ours = results("cuda")
    assert all(map(gpu.agree, ours, results("cpu")))


def test_a_map_solve_waits_once_a_step():
    with simulated_gpu() as gpu:
        network, batch = on_gpu()
        before = gpu.waits
        solution = map_solve.map_solve(
            Passes(network).loss_and_grad, network.init(torch.Generator().manual_seed(0)), iter(lambda: batch, None),
            threshold=0.0, learning_rate=0.001, max_steps=7,
        )  # fmt: skip
        assert (solution.stats.steps, gpu.waits - before) == (7, 8)  # the last loss has no step


def test_draws_of_weights_wait_once_in_all():
    """Not for each draw and loss: the GPU would stand still sixty times a step of bpc-fkl."""
    with simulated_gpu() as gpu:
        network, batch = on_gpu()
        params = network.init(torch.Generator().manual_seed(0))
        before = gpu.waits
        divergence = weight_space.forward_kl(
            network.forward, params, params, batch.images, batch.labels, 30 * [lambda images: images], scale=0.01,
            source=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert gpu.waits - before == 1
        assert divergence.expected_x > 0


def test_a_gpu_takes_larger_parts_of_a_batch():
    with simulated_gpu():
        sizes = [Passes(on_gpu()[0]).part_size(count) for count in (256, 1024, 2000)]
    assert sizes == [256, 1024, 1000]


def test_samples_are_checked_in_one_wait():
    with simulated_gpu() as gpu:
        network, _ = on_gpu()
        samples = [network.init(torch.Generator().manual_seed(seed)) for seed in range(10)]
        before = gpu.waits
        assert finite(samples)
        assert gpu.waits - before == 1


def on_gpu():
    network = Network(specify("convnet-in", (1, 8, 8), 2, 4, 0), "cuda")
    return network, Batch(torch.ones(2, 1, 8, 8).to("cuda"), torch.tensor([0, 1]).to("cuda"))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda ours, cpu: ours + cpu,
        lambda ours, cpu: torch.stack([ours, cpu]),
        lambda ours, cpu: torch.where(ours > 0, ours, cpu),
        lambda ours, cpu: cpu[ours.long()],
        lambda ours, cpu: ours.index_put((torch.tensor([0]),), cpu[:1]),
        lambda ours, cpu: torch.randn(3, generator=torch.Generator(), device="cuda"),
        lambda ours, cpu: ours.numpy(),
        lambda ours, cpu: torch.nn.functional.linear(ours, torch.ones(2, 3)),
    ],
)
def test_the_simulated_gpu_refuses_what_cuda_refuses(mistake):
    with simulated_gpu():
        ours, cpu = torch.ones(3).to("cuda"), torch.ones(3)
        with pytest.raises((RuntimeError, TypeError)):
            mistake(ours, cpu)


def test_the_simulated_gpu_takes_what_cuda_takes():
    with simulated_gpu() as gpu:
        ours = torch.tensor([1.0, 2.0, 3.0], device="cuda")
        assert (ours * torch.tensor(2.0)).device.type == "cuda"  # a number
        assert torch.equal(ours[torch.tensor([2, 0])].cpu(), torch.tensor([3.0, 1.0]))
        before = gpu.waits
        ours.add_(1)
        assert ours.tolist() == [2.0, 3.0, 4.0]
        assert gpu.waits - before == 1
    assert torch.ones(1).device.type == "cpu" and not torch.cuda.is_available()
