"""`--learn-labels`: the gradient by soft labels of fbpc and bpc, the labels' Adam, and a run's bits."""

from dataclasses import replace

import pytest
import torch
from support.runs import assert_same, flags, run_on

from fbpc_ray.commands import main
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import coreset
from fbpc_ray.data.datasets import tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.methods import fbpc
from fbpc_ray.distillation.methods.common import CoresetLabels, Gradient, GradientContext, GradientStats
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import (
    State,
    SummedGradient,
    check_gradients,
    initial_state,
    scale_of_confidence,
    update,
    with_soft_labels,
)
from fbpc_ray.distillation.worker import METHODS
from fbpc_ray.execution import session, validation
from fbpc_ray.execution.serial import Serial
from fbpc_ray.inference.divergence import forward_kl
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes

ALL = ["fbpc", "fbpc-isotropic", "bpc-fkl", "bpc-rkl", "bpc-w"]
BPC = {"start_epoch": 2, "start_rule": "before", "syn_steps": 3, "inner_lr": 0.05}


@pytest.fixture
def setting(small, digits):
    config = small.updated(posterior_steps=6, gamma=0.5)
    real = DeviceDataset(*tensors(digits.train, "cpu"), digits.mean, digits.std)
    return config, digits, real, *initial_state(digits, 2, 0)


def compute(setting, soft_labels=None, step=3, **changes):
    config, digits, real, state, labels = setting
    spec = session.network_specs(config, digits)[0]
    settings = replace(config.distillation, **{"batch_size": 100} | changes)
    store = session.expert_store(config, digits, spec)
    context = GradientContext(Passes(Network(spec)), store, real, labels, settings, "dsa", 1)
    optional = {} if soft_labels is None else {"soft_labels": soft_labels}
    return METHODS[settings.method](context, step, state.images, settings.inner_lr, **optional)


def by_labels(setting, soft_labels, **changes) -> torch.Tensor:
    gradient = compute(setting, soft_labels, **changes).soft_labels
    assert gradient is not None
    return gradient


def soft(labels: torch.Tensor, scale: float = 3.0) -> torch.Tensor:
    noise = torch.randn(len(labels), 10, generator=generator(9))
    return scale * torch.nn.functional.one_hot(labels, 10).float() + noise


# ---- the gradient


@pytest.mark.parametrize("method", ALL)
def test_certain_soft_labels_are_hard_labels(setting, method):
    """Logits so far apart that float32 has 1 and 0: the gradient by images is the same, that by the labels is 0."""
    changes = {"method": method, **(BPC if method.startswith("bpc") else {})}
    hard = compute(setting, **changes)
    certain = compute(setting, 200 * torch.nn.functional.one_hot(setting[4], 10).float(), **changes)
    assert hard.soft_labels is None
    torch.testing.assert_close(certain.value, hard.value, rtol=1e-3, atol=1e-4 * hard.value.abs().max().item())
    assert certain.soft_labels is not None
    assert certain.soft_labels.abs().max() == 0
    assert certain.stats.map_steps == hard.stats.map_steps
    others = by_labels(setting, soft(setting[4]), **changes)
    assert others.norm() > 1e-6
    assert others.sum(1).abs().max() < 1e-6, "adding a constant to the logits changes nothing"


@pytest.mark.parametrize("views", [1, 2])
def test_the_gradient_of_fbpc_is_the_gap_of_expected_log_probabilities(setting, views, monkeypatch):
    """p (v - p v) / m with v = E_u[log softmax] - E_x[log softmax], in float64, over the same draws."""
    posteriors = []

    def watched(posterior_x, posterior_u, *rest):
        posteriors.append((posterior_x, posterior_u))
        return forward_kl(posterior_x, posterior_u, *rest)

    monkeypatch.setattr(fbpc, "forward_kl", watched)
    z = soft(setting[4])
    result = by_labels(setting, z, views=views)
    source = generator(0, "step", 3, "convnet-in", "monte-carlo")
    gap = torch.zeros(20, 10, dtype=torch.float64)
    for pair in posteriors:
        for sign, (mean, variance) in zip((-1, 1), pair, strict=True):
            noise = torch.randn((5, 20, 10), generator=source)
            draws = (mean + variance.sqrt() * noise).detach().double()
            gap += sign * draws.log_softmax(-1).mean(0) / views
    p = z.double().softmax(1)
    expected = p * (gap - (p * gap).sum(1, keepdim=True)) / 20
    assert len(posteriors) == views
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["fbpc", "bpc-fkl", "bpc-rkl"])
def test_a_batch_touches_its_own_labels_only(setting, method):
    changes = {"method": method, "batch_size": 6, **(BPC if method.startswith("bpc") else {})}
    result = compute(setting, soft(setting[4]), **changes)
    assert result.soft_labels is not None
    rows = result.soft_labels.abs().sum(1) > 0
    assert torch.equal(rows, result.value.flatten(1).any(1))
    assert rows.sum() == 6


def test_a_solve_ends_at_gamma_above_the_entropy_of_the_labels(setting):
    """Cross-entropy can't reach gamma itself here: the labels' entropy is above it."""
    z = soft(setting[4], 2.0)
    entropy = torch.special.entr(z.softmax(1)).sum(1).mean().item()
    assert entropy > 1.0
    result = compute(setting, z, gamma=0.3, map_lr=0.02)
    assert result.stats.map_status == "converged"
    assert result.stats.map_loss is not None
    assert 0 < result.stats.map_loss <= 0.3
    labels = CoresetLabels(z.softmax(1).requires_grad_())
    assert labels.entropy() == pytest.approx(entropy, rel=1e-6)
    assert CoresetLabels(setting[4]).entropy() == 0


# ---- the update


def test_labels_move_by_adam_and_images_by_algorithm_1():
    source = generator(1)
    u, z = torch.randn(3, 1, 2, 2, generator=source), torch.randn(3, 4, generator=source)
    z -= z.mean(1, keepdim=True)
    state = State(0, u, torch.zeros_like(u), 0.0, soft_labels=z)
    images, labels = u.clone().requires_grad_(), z.clone().requires_grad_()
    sgd, adam = torch.optim.SGD([images], lr=0.3, momentum=0.5), torch.optim.Adam([labels], lr=0.2)
    for _ in range(4):
        by_images, by_labels = torch.randn(u.shape, generator=source), torch.randn(z.shape, generator=source)
        parts = [SummedGradient(by_images, 0.0, by_labels), SummedGradient(by_images, 0.0, 2 * by_labels)]
        state = update(state, parts, alpha=0.3, momentum=0.5, inner_alpha=0.0, label_lr=0.2)
        images.grad, labels.grad = 2 * by_images, 3 * by_labels
        sgd.step()
        adam.step()
    assert state.step == 4
    assert state.soft_labels is not None
    torch.testing.assert_close(state.images, images.detach(), rtol=1e-5, atol=1e-5)
    centred = (labels - labels.mean(1, keepdim=True)).detach()
    torch.testing.assert_close(state.soft_labels, centred, rtol=1e-5, atol=1e-5)
    assert set(state.moments) == {"labels/first", "labels/second"}


def test_labels_begin_at_their_confidence():
    labels = torch.tensor([2, 0])
    state = State(0, torch.zeros(2, 1), torch.zeros(2, 1), 0.0)
    z = with_soft_labels(state, labels, 5, scale_of_confidence(0.9, 5)).soft_labels
    assert z is not None
    torch.testing.assert_close(z.softmax(1)[0], torch.tensor([0.025, 0.025, 0.9, 0.025, 0.025]))
    torch.testing.assert_close(z.sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    for wrong in (0.2, 0.1, 1.0):
        with pytest.raises(UserError, match=r"--label-confidence: must be above 1/5 = 0.2 and below 1"):
            scale_of_confidence(wrong, 5)


def test_labels_that_are_not_finite_end_the_run():
    stats = GradientStats(0.0, map_status="converged", map_loss=0.1)
    wrong = Gradient(torch.zeros(2, 1), stats, soft_labels=torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(UserError, match="non-finite loss at step 4 on convnet-in"):
        check_gradients(["convnet-in"], [wrong], 3, "fbpc")


def test_random_refuses_the_flag(small):
    with pytest.raises(UserError, match="--learn-labels: --method random learns nothing"):
        validation.check(small.updated(method="random", learn_labels=True))


# ---- runs


@pytest.mark.parametrize("changes", [{}, {"image_average": 0.9, "map_init": "warm"}], ids=["plain", "averaged, warm"])
def test_a_run_resumes_to_the_bit(small, digits, tmp_path, changes):
    """Two architectures, stopped after step 2 of 4, with the checkpoint read from its file; labels have moved."""
    config = small.updated(learn_labels=True, label_lr=0.1, **changes)
    backend = Serial("cpu", Interruption())
    whole = run_on(backend, config, digits, tmp_path / "whole")
    run_on(backend, config.updated(steps=2), digits, tmp_path / "part")
    opened = session.open_session(config, lambda line: None, digits)
    restored = RunDirectory(tmp_path / "part").restore(opened.labels, digits.image_shape)
    assert restored is not None
    rest = run_on(backend, config, digits, tmp_path / "rest", state=restored[0])
    assert torch.equal(rest[0], whole[0])
    ends = [RunDirectory(tmp_path / name).restore(opened.labels, digits.image_shape) for name in ("whole", "rest")]
    one, other = (end[0] for end in ends if end is not None)
    assert one.soft_labels is not None and other.soft_labels is not None
    assert torch.equal(one.soft_labels, other.soft_labels)
    assert all(torch.equal(value, other.moments[name]) for name, value in one.moments.items())
    start = opened.initial[0].soft_labels
    assert start is not None
    assert 0.05 < (one.soft_labels - start).abs().max() < 1.0
    assert torch.equal(opened.coreset(one).likelihood_labels, one.soft_labels.softmax(1))


@pytest.mark.ray
@pytest.mark.slow
def test_serial_is_ray(small, digits, tmp_path):
    from fbpc_ray.core.config import Workers
    from fbpc_ray.execution.ray.ray_backend import RayBackend

    config = small.updated(learn_labels=True, label_lr=0.1)
    serial = run_on(Serial("cpu", Interruption()), config, digits, tmp_path / "serial")
    backend = RayBackend(
        Workers(address="local", device="cpu"), Interruption(), lambda line: None,
        num_cpus=2, include_dashboard=False, object_store_memory=200_000_000,
    )  # fmt: skip
    try:
        assert_same(run_on(backend, config, digits, tmp_path / "ray"), serial)
    finally:
        backend.close()
    opened = session.open_session(config, lambda line: None, digits)
    ends = [RunDirectory(tmp_path / name).restore(opened.labels, digits.image_shape) for name in ("serial", "ray")]
    one, other = (end[0].soft_labels for end in ends if end is not None)
    assert one is not None and other is not None
    assert torch.equal(one, other)


@pytest.mark.slow
def test_a_run_is_exported_and_reported_with_its_labels(small, tmp_path, capsys):
    """From the command line: the coreset's labels, an export that is read back, chains on both, the report."""
    out = tmp_path / "run"
    main.main(["distill", *flags(small, backend="serial", out=str(out), steps=2, learn_labels=True, label_lr=0.1)])
    learned = coreset.load(RunDirectory(out).coreset_path)
    assert learned.soft_labels is not None
    assert torch.equal(learned.soft_labels.argmax(1), learned.labels)
    main.main(["export", str(out), "--format", "npz", "--out", str(tmp_path / "set.npz")])
    main.main(["report", str(out), "--out", str(tmp_path / "report.html")])
    command = ["evaluate", "--coreset", str(tmp_path / "set.npz"), "--data", "digits", "--architectures", "convnet-in"]
    capsys.readouterr()
    main.main([*command, "--width", "8", "--chain-epochs", "4", "--chain-every", "2", "--backend", "serial"])
    assert "accuracy" in capsys.readouterr().out
    assert "soft_labels" in (tmp_path / "report.html").read_text()
