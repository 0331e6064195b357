"""`--method vbpc` and `frepo`: a step against dense algebra and torch's optimiser, the pool, and a run's bits."""

from typing import Any

import numpy as np
import pytest
import torch
from support.runs import SMALL_VBPC, run_on
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import (
    GradientTask,
    State,
    SummedGradient,
    adam_rates,
    combine,
    update_by_adam,
    with_soft_labels,
)
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution import session, validation
from fbpc_ray.execution.serial import Serial, gradient_of
from fbpc_ray.inference.adam import AdamState, adam_start
from fbpc_ray.inference.vectors import flatten, unflatten
from fbpc_ray.models.functional import Network


@pytest.fixture(scope="module")
def config():
    return preset("digits").updated(**SMALL_VBPC)


def worker_of(config, digits):
    opened = session.open_session(config, lambda line: None, digits)
    worker = Worker(**opened.worker_group().worker._asdict(), device="cpu")
    state = opened.initial[0]
    assert state.soft_labels is not None
    return worker, state.images, state.soft_labels


# ---- the gradient


def dense_loss(features: Tensor, targets: Tensor, at: Tensor, labels: Tensor, settings, count: int) -> Tensor:
    """The loss with the h x h covariance of each class's weights, float64."""
    features, targets, at = features.double(), targets.double(), at.double()
    h, rho = features.shape[1], settings.prior_precision
    sigma2 = settings.ridge / rho
    precision = rho * torch.eye(h, dtype=torch.float64) + features.T @ features / sigma2
    covariance = torch.linalg.inv(precision)
    weights = covariance @ features.T @ targets / sigma2
    variance = ((at @ covariance) * at).sum(1, keepdim=True)
    expected = cross_entropy(at @ weights / (1 + np.pi / 8 * variance).sqrt(), labels)
    per_class = rho * covariance.trace() - h + precision.logdet() - h * np.log(rho)
    kl = 0.5 * (targets.shape[1] * per_class + rho * weights.square().sum())
    return expected + settings.kl_weight / count * kl


def real_batch(worker, step: int, size: int) -> tuple[Tensor, Tensor]:
    """The step's real images and labels, mirrored as the method says."""
    source = worker._context(GradientTask(0, 0)).rng(step, "real")
    images, labels = worker.real.batch(torch.randperm(len(worker.real), generator=source)[:size])
    flipped = torch.rand(size, generator=source) < 0.5
    return torch.stack([image.flip(2) if f else image for image, f in zip(images, flipped, strict=True)]), labels


@pytest.mark.parametrize("method", ["vbpc", "frepo"])
def test_the_gradient_is_that_of_dense_algebra(config, digits, method):
    """At an untrained network of the pool, by images and soft labels; in particular nothing is detached."""
    config = config.updated(method=method)
    worker, images, labels = worker_of(config, digits)
    settings, step = config.distillation, 4
    result = gradient_of(worker.gradient(GradientTask(0, 0), step, images.numpy(), 0.0, soft_labels=labels.numpy()))
    network = Network(worker.specs[0])
    module: Any = network.module(worker._context(GradientTask(0, 0)).rng(step, "prior"))
    features = torch.nn.Sequential(*list(module.features), torch.nn.Flatten())
    u, y = images.clone().requires_grad_(), labels.clone().requires_grad_()
    scale = module.head.in_features**-0.5
    phi, at = scale * features(torch.cat([u, u.flip(3)])), real_batch(worker, step, 32)
    psi = scale * features(at[0]).detach()
    if method == "vbpc":
        loss = dense_loss(phi, torch.cat([y, y]), psi, at[1], settings, len(digits.train.labels))
    else:
        kernel = (phi @ phi.T).double()
        ridge = settings.ridge * kernel.trace() / len(phi)
        mean = (psi @ phi.T).double() @ torch.linalg.inv(kernel + ridge * torch.eye(20)) @ torch.cat([y, y]).double()
        wanted = settings.label_scale * (one_hot(at[1], 10) - 0.1)
        first, second = y.topk(2).values.T
        loss = 0.5 * (mean - wanted).square().sum(1).mean() - (first - second).clamp(max=0.1).mean()
    by_images, by_labels = torch.autograd.grad(loss, (u, y))
    assert result.stats.loss == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(result.value, by_images, rtol=1e-3, atol=1e-4 * by_images.abs().max().item())
    torch.testing.assert_close(result.soft_labels, by_labels, rtol=1e-3, atol=1e-4 * by_labels.abs().max().item())


def test_a_used_network_takes_one_adam_step_on_the_coreset_first(config, digits):
    """Squared loss of its own outputs for u and the mirror images, by torch's Adam; then it has one use more."""
    worker, images, labels = worker_of(config, digits)
    network = Network(worker.specs[0])
    params = network.init(generator(3))
    start = network_pool.dump(network_pool.Member(adam_start(flatten(params)), 1)).numpy()
    answer = worker.gradient(GradientTask(0, 0), 0, images.numpy(), 0.0, start=start, soft_labels=labels.numpy())
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=config.distillation.pool_lr)
    outputs = network.forward(leaves, torch.cat([images, images.flip(3)]))
    (0.5 * (outputs - torch.cat([labels, labels])).square().sum(1).mean()).backward()
    optimizer.step()
    after = network_pool.load(answer.solution, lambda: network.init(generator(4)), 0, config.distillation)
    assert (after.uses, after.adam.steps, answer.stats.others["pool_uses"]) == (2, 1, 1)
    for name, value in unflatten(after.adam.value, network.shapes).items():
        if name.endswith("weight"):  # the biases before a norm have no gradient but rounding, whose sign Adam follows
            torch.testing.assert_close(value, leaves[name].detach(), rtol=0, atol=0.02 * config.distillation.pool_lr)


def test_a_network_that_is_begun_anew_takes_no_step_first(config, digits):
    """Its uses are over: the gradient is that of a slot that was never used."""
    worker, images, labels = worker_of(config, digits)
    vector = flatten(Network(worker.specs[0]).init(generator(3)))
    over = network_pool.dump(network_pool.Member(adam_start(vector), config.distillation.pool_steps)).numpy()
    anew, first = (
        worker.gradient(GradientTask(0, 0), 0, images.numpy(), 0.0, start=start, soft_labels=labels.numpy())
        for start in (over, None)
    )
    assert anew.stats.others["pool_uses"] == 0
    assert (anew.value == first.value).all()


# ---- the pool


def test_draws_of_a_step_use_different_slots_and_steps_other_ones(config):
    settings = config.updated(pool_size=5).distillation
    slots = [[network_pool.slot(settings, step, draw) for draw in range(5)] for step in range(40)]
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in slots)
    assert {row[0] for row in slots} == {0, 1, 2, 3, 4}


def test_networks_are_begun_anew_after_their_uses_one_after_the_other(config):
    settings = config.updated(pool_size=4, pool_steps=100).distillation
    fresh, trained = {"w": torch.zeros(2)}, AdamState(torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0), 7)
    assert [network_pool.load(None, lambda: fresh, slot, settings).uses for slot in range(4)] == [0, 25, 50, 75]
    loaded_pool = network_pool.load(
        network_pool.dump(network_pool.Member(trained, 99)).numpy(), lambda: fresh, 1, settings
    )
    assert [part.tolist() for part in loaded_pool.adam[:3]] == [[1, 1], [2, 2], [3, 3]]
    assert (loaded_pool.adam.steps, loaded_pool.uses) == (7, 99)
    anew = network_pool.load(network_pool.dump(network_pool.Member(trained, 100)).numpy(), lambda: fresh, 1, settings)
    assert (anew.adam.value.tolist(), anew.adam.steps, anew.uses) == ([0, 0], 0, 0)


def test_a_vector_and_its_parameters():
    params = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([7.0])}
    back = unflatten(flatten(params), {name: value.shape for name, value in params.items()})
    assert all(torch.equal(back[name], value) for name, value in params.items())


def test_more_draws_than_networks_are_refused(config):
    with pytest.raises(UserError, match="raise --pool-size"):
        validation.check(config.updated(draws_per_step=3))


# ---- the update


def test_images_and_labels_move_as_torch_moves_them_by_the_summed_gradient():
    source = torch.Generator().manual_seed(0)
    u, y = torch.randn(3, 1, 2, 2, generator=source), torch.randn(3, 4, generator=source)
    y -= y.mean(1, keepdim=True)
    state = State(0, u, torch.zeros_like(u), 0.0, soft_labels=y)
    images, labels = u.clone().requires_grad_(), y.clone().requires_grad_()
    optimizer = torch.optim.Adam([{"params": [images], "lr": 0.1}, {"params": [labels], "lr": 0.2}])
    for _ in range(5):
        by_images, by_labels = torch.randn(u.shape, generator=source), torch.randn(y.shape, generator=source)
        parts = [SummedGradient(by_images, 0.0, by_labels)] * 2
        state = update_by_adam(state, parts, image_lr=0.1, label_lr=0.2)
        images.grad, labels.grad = 2 * by_images, 2 * by_labels
        optimizer.step()
    assert state.step == 5
    assert state.soft_labels is not None
    torch.testing.assert_close(state.images, images.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        state.soft_labels, (labels - labels.mean(1, keepdim=True)).detach(), rtol=1e-5, atol=1e-5
    )


def test_the_rates_fall_with_the_root_of_the_steps():
    settings = Config().updated(image_lr=0.08, label_lr=0.04, lr_decay=50).distillation
    assert adam_rates(settings, 0) == (0.08, 0.04)
    assert adam_rates(settings, 150) == pytest.approx((0.04, 0.02))
    assert adam_rates(Config().updated(image_lr=0.08, label_lr=0.04, lr_decay=0).distillation, 150) == (0.08, 0.04)


def test_labels_are_centred_one_hot_at_first_and_fixed_without_a_rate():
    state = with_soft_labels(State(0, torch.zeros(2, 1), torch.zeros(2, 1), 0.0), torch.tensor([1, 0]), 4, 2.0)
    assert state.soft_labels is not None
    assert state.soft_labels.tolist() == [[-0.5, 1.5, -0.5, -0.5], [1.5, -0.5, -0.5, -0.5]]
    part = SummedGradient(torch.ones(2, 1), 0.0, torch.ones(2, 4))
    after = update_by_adam(state, [part], image_lr=0.1, label_lr=0.0)
    assert after.soft_labels is not None
    assert torch.equal(after.soft_labels, state.soft_labels)
    assert after.images.flatten().tolist() == pytest.approx([-0.1, -0.1])


def test_draws_are_averaged_and_architectures_summed_in_the_labels_too():
    def gradient(value: float):
        from fbpc_ray.distillation.methods.common import Gradient, GradientStats

        return Gradient(torch.tensor([value]), GradientStats(0.0), soft_labels=torch.tensor([10 * value]))

    tasks = [GradientTask(architecture, draw) for architecture in (0, 1) for draw in (0, 1)]
    first, second = combine(tasks, [gradient(1.0), gradient(3.0), gradient(5.0), gradient(9.0)])
    assert first.soft_labels is not None
    assert second.soft_labels is not None
    assert (first.soft_labels.item(), second.soft_labels.item()) == (20, 70)


# ---- runs


def test_a_run_learns_without_experts_and_resumes_to_the_bit(config, digits, tmp_path):
    """Two architectures, two networks each, three uses: all slots are begun anew. Stopped after step 4 of 7; the
    checkpoint is read from its file."""
    backend = Serial("cpu", Interruption())
    config = config.updated(experts=str(tmp_path / "experts"))
    undisturbed = run_on(backend, config, digits, tmp_path / "whole")
    run_on(backend, config.updated(steps=4), digits, tmp_path / "part")
    opened = session.open_session(config, lambda line: None, digits)
    restored = RunDirectory(tmp_path / "part").restore(opened.labels, digits.image_shape)
    assert restored is not None
    state, rows = restored
    assert {name.split("/")[0] for name in state.solutions} == {"0", "1"}
    rows = [{k: v for k, v in row.items() if k != "seconds_step" and v is not None} for row in rows]
    rest = run_on(backend, config, digits, tmp_path / "rest", state=state, rows=rows)
    assert torch.equal(rest[0], undisturbed[0])
    ends = [RunDirectory(tmp_path / name).restore(opened.labels, digits.image_shape) for name in ("whole", "rest")]
    one, other = (end[0] for end in ends if end is not None)
    assert one.soft_labels is not None
    assert other.soft_labels is not None
    assert torch.equal(one.soft_labels, other.soft_labels)
    for mapping in ("solutions", "moments"):
        assert getattr(one, mapping).keys() == getattr(other, mapping).keys()
        assert all(torch.equal(value, getattr(other, mapping)[name]) for name, value in getattr(one, mapping).items())
    assert not (tmp_path / "experts").exists()


def test_the_loss_falls(config, digits, tmp_path):
    config = config.updated(architectures=("convnet-in",), steps=40, kl_weight=0.0, pool_size=5, pool_steps=20)
    _, rows = run_on(Serial("cpu", Interruption()), config, digits, tmp_path)
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1
