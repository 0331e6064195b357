"""Gradients of each method against plain references, and what they depend on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import reference
from support.runs import silent

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.data.datasets import tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.methods import fbpc
from fbpc_ray.distillation.methods.common import (
    GradientContext,
    coreset_batches,
    expert_epochs,
)
from fbpc_ray.distillation.state import (
    GradientTask,
    initial_state,
)
from fbpc_ray.distillation.worker import EXPERT_SIDES, METHODS, Worker
from fbpc_ray.evaluation.evaluate import evaluate
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.worker_group import worker_group
from fbpc_ray.inference.divergence import forward_kl
from fbpc_ray.inference.map_solve import map_solve
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes


@pytest.fixture
def setting(small, digits):
    config = small.updated(posterior_steps=6, gamma=1.0)
    real = DeviceDataset(*tensors(digits.train, "cpu"), digits.mean, digits.std)
    state, labels = initial_state(digits, 2, 0)
    return config, digits, real, state, labels


def compute(config, digits, real, images, labels, architecture=0, step=3, **changes):
    spec = session.network_specs(config, digits)[architecture]
    settings = replace(config.distillation, **{"batch_size": 100} | changes)
    problem = GradientContext(
        Passes(Network(spec)), session.expert_store(config, digits, spec), real, labels, settings, "dsa", 1
    )
    return METHODS[settings.method](problem, step, images, settings.inner_lr)


@pytest.mark.parametrize("architecture", [0, 1])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_gradient_equals_the_plain_reference(setting, architecture, step):
    """Same draws, obvious code: every sign, reduction, stop-gradient and stream of Eqs. 16-17 and the MAP solve."""
    config, digits, real, state, labels = setting
    spec = session.network_specs(config, digits)[architecture]
    store = session.expert_store(config, digits, spec)
    snapshots = [store.read(0, epoch) for epoch in range(config.experts.expert_epochs + 1)]
    settings = replace(config.distillation, batch_size=100)
    expected = reference.gradient(spec, snapshots, real, state.images, labels, step, settings)
    result = compute(config, digits, real, state.images, labels, architecture, step)
    assert expected.norm() > 1e-4
    assert result.stats.gradient_norm == pytest.approx(expected.norm().item(), rel=1e-5)
    torch.testing.assert_close(result.value, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("window", "batches"), [(1, 3), (4, 12)])
def test_gamma_is_compared_with_the_mean_of_whole_passes(setting, window, batches, monkeypatch):
    """20 images in batches of 8 are three batches per pass, the last one of four images."""
    config, digits, real, state, labels = setting
    solves = []

    def solve(*arguments, batches_per_pass, **settings):
        solves.append(batches_per_pass)
        return map_solve(*arguments, batches_per_pass=batches_per_pass, **settings)

    monkeypatch.setattr(fbpc, "map_solve", solve)
    result = compute(config, digits, real, state.images, labels, batch_size=8, gamma_window=window, gamma=5.0)
    assert solves == [batches]
    assert result.stats.map_steps == batches - 1  # every loss is below gamma: it ends as soon as the window is full


@pytest.mark.parametrize("method", ["fbpc", "fbpc-isotropic"])
def test_views_are_averaged(setting, method, monkeypatch):
    """V = 3 is the mean of three gradients with one view each, at the same theta_x, theta_u and noise of its own."""
    config, digits, real, state, labels = setting
    arguments = (config, digits, real, state.images, labels)
    result = compute(*arguments, method=method, views=3)
    parts, streams = [], {}
    for number in range(3):

        def rng(context, step, purpose, number=number):
            source = generator(0, "step", step, context.network.spec.architecture, purpose)
            if purpose == "augment":
                for _ in range(number):
                    AUGMENTATIONS["dsa"](len(labels), source)
            if purpose == "monte-carlo":
                return streams.setdefault(purpose, source)  # the noise goes on from view to view
            return source

        with monkeypatch.context() as patch:
            patch.setattr(GradientContext, "rng", rng)
            parts.append(compute(*arguments, method=method))
    mean = torch.stack([part.value for part in parts]).mean(0)
    torch.testing.assert_close(result.value, mean, rtol=1e-5, atol=1e-5 * mean.abs().max().item())
    for name in ("loss", "expected_x", "psi_u"):
        expected = sum(getattr(part.stats, name) for part in parts) / 3
        assert getattr(result.stats, name) == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(result.value, parts[0].value)
    assert torch.equal(compute(*arguments, method=method, views=1).value, parts[0].value)
    assert torch.equal(compute(*arguments, method=method).value, parts[0].value)


def test_views_of_bpc_fkl_are_shared_by_its_draws(setting):
    """S = 5 draws in turn on V = 2 views, against the plain reference; V = S is the default; V > S gives V terms."""
    config, digits, real, state, labels = setting
    spec = session.network_specs(config, digits)[0]
    store = session.expert_store(config, digits, spec)
    snapshots = [store.read(0, epoch) for epoch in range(config.experts.expert_epochs + 1)]
    changes = {"method": "bpc-fkl", "start_epoch": 2, "start_rule": "before", "syn_steps": 2, "inner_lr": 0.05}
    settings = replace(config.distillation, batch_size=100, views=2, **changes)
    problem = GradientContext(Passes(Network(spec)), store, real, labels, settings, "dsa", 1)
    expected = reference.weight_space(problem, snapshots, state.images, 3)
    result = compute(config, digits, real, state.images, labels, views=2, **changes).value
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    own = compute(config, digits, real, state.images, labels, **changes).value
    assert torch.equal(compute(config, digits, real, state.images, labels, views=5, **changes).value, own)
    assert not torch.equal(result, own)
    more, as_many = ({**changes, "views": 7, "mc_samples": count} for count in (5, 7))
    results = [compute(config, digits, real, state.images, labels, **candidate).value for candidate in (more, as_many)]
    assert torch.equal(*results)


def test_a_window_of_passes_ends_no_solve_early(setting):
    """gamma is compared with the mean loss of 1 pass or of 5, which takes no fewer steps, and at least 4."""
    config, digits, real, state, labels = setting
    one, five = (compute(config, digits, real, state.images, labels, gamma_window=n).stats for n in (1, 5))
    assert one.map_status == five.map_status == "converged"
    assert one.map_steps is not None and five.map_steps is not None and five.map_loss is not None
    assert five.map_steps >= max(one.map_steps, 4)
    assert five.map_loss <= 1.0


@pytest.mark.parametrize(
    ("method", "estimator"),
    [("bpc-fkl", "scaled"), ("bpc-rkl", "scaled"), ("bpc-rkl", "authors"), ("bpc-w", "scaled")],
)
@pytest.mark.parametrize("architecture", [0, 1])
def test_weight_space_gradients_equal_the_plain_reference(setting, architecture, method, estimator):
    """Same draws, obvious code: where theta_0, mu_x and mu_u come from, and Eq. 7, the covariance, the distance."""
    config, digits, real, state, labels = setting
    spec = session.network_specs(config, digits)[architecture]
    store = session.expert_store(config, digits, spec)
    snapshots = [store.read(0, epoch) for epoch in range(config.experts.expert_epochs + 1)]
    changes: dict[str, Any] = {
        "method": method, "rkl_estimator": estimator, "start_epoch": 2, "start_rule": "before", "syn_steps": 5,
        "inner_lr": 0.05,
    }  # fmt: skip
    settings = replace(config.distillation, batch_size=100, **changes)
    problem = GradientContext(Passes(Network(spec)), store, real, labels, settings, "dsa", 1)
    for step in (0, 3):
        expected = reference.weight_space(problem, snapshots, state.images, step)
        result = compute(config, digits, real, state.images, labels, architecture, step, **changes)
        assert result.stats.gradient_norm == pytest.approx(expected.norm().item(), rel=1e-3)
        torch.testing.assert_close(result.value, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert (result.inner_lr != 0) == (method == "bpc-w")


@pytest.mark.parametrize("method", ["bpc-fkl", "bpc-rkl"])
def test_weight_space_minibatches_touch_their_images_only(setting, method):
    """B < m: mu_u walks over all of u, the divergence is taken on one batch of B."""
    config, digits, real, state, labels = setting
    changes = {"method": method, "start_rule": "before", "syn_steps": 4, "batch_size": 6}
    touched = compute(config, digits, real, state.images, labels, **changes).value.flatten(1).any(1)
    assert touched.sum() == 6


def test_gradient_depends_on_seed_step_and_architecture_alone(setting):
    """Asked twice it gives the same bits; another step, seed or architecture draws anew."""
    config, digits, real, state, labels = setting
    first = compute(config, digits, real, state.images, labels)
    torch.rand(5)  # torch's global generator has no part in it
    assert torch.equal(compute(config, digits, real, state.images, labels).value, first.value)
    for other in (
        compute(config, digits, real, state.images, labels, step=4),
        compute(config, digits, real, state.images, labels, seed=1),
        compute(config, digits, real, state.images, labels, architecture=1),
    ):
        assert not torch.equal(other.value, first.value)


def test_statistics_are_what_they_say(setting):
    config, digits, real, state, labels = setting
    stats: dict[str, Any] = compute(config, digits, real, state.images, labels).stats.row()
    assert stats["map_ending"] == "converged"
    assert 0 < stats["map_loss"] <= 1.0
    assert stats["map_steps"] > 0
    assert stats["psi_x"] > 0 < stats["psi_u"]
    assert 1 <= stats["expert_epoch"] <= 3
    assert min(stats["seconds_x"], stats["seconds_map"], stats["seconds_u"], stats["seconds_gradient"]) > 0
    still = compute(config, digits, real, state.images, labels, lambda_u=0.0).stats
    assert (still.psi_u, still.psi_x) == (
        0.0,
        stats["psi_x"],
    )  # K steps of length 0 on u, those on real images as before


def test_isotropic_takes_no_k_steps(setting):
    """FBPC-isotropic: Psi = I, whatever K and the learning rates of the K steps are."""
    config, digits, real, state, labels = setting
    one = compute(config, digits, real, state.images, labels, method="fbpc-isotropic")
    other = compute(
        config, digits, real, state.images, labels, method="fbpc-isotropic", posterior_steps=9, lambda_x=1e3
    )
    assert (one.stats.psi_x, one.stats.psi_u) == (1.0, 1.0)
    assert torch.equal(one.value, other.value)
    assert not torch.equal(one.value, compute(config, digits, real, state.images, labels).value)


def test_a_batch_smaller_than_m_touches_its_images_only(setting):
    """B < m: one batch of B has a gradient, the same images for every architecture, and other images next step."""
    config, digits, real, state, labels = setting
    touched = [
        compute(config, digits, real, state.images, labels, architecture, step, batch_size=6).value.flatten(1).any(1)
        for architecture, step in ((0, 1), (1, 1), (0, 2))
    ]
    assert touched[0].sum() == touched[2].sum() == 6
    assert torch.equal(touched[0], touched[1])
    assert not torch.equal(touched[0], touched[2])


def test_a_batch_smaller_than_m_goes_with_its_own_labels(setting, monkeypatch):
    """What Eq. 17 is given, looked at on its way: the labels of the images that get a gradient."""
    config, digits, real, state, labels = setting
    seen = []

    def watched(posterior_x, posterior_u, of_batch, *rest):
        seen.append(of_batch)
        return forward_kl(posterior_x, posterior_u, of_batch, *rest)

    monkeypatch.setattr(fbpc, "forward_kl", watched)
    touched = compute(config, digits, real, state.images, labels, batch_size=6).value.flatten(1).any(1)
    assert torch.equal(seen[0], labels[touched])
    assert not torch.equal(seen[0], labels[:6])


def test_map_minibatches_walk_over_all_of_u():
    labels = torch.arange(10)
    images = labels.float().view(10, 1, 1, 1).expand(10, 1, 4, 4)
    walk = coreset_batches(images, labels, 4, "none", torch.Generator())
    seen = [next(walk) for _ in range(6)]
    assert [len(batch.labels) for batch in seen] == [4, 4, 2, 4, 4, 2]
    first, second = (torch.cat([batch.labels for batch in part]) for part in (seen[:3], seen[3:]))
    assert torch.equal(first.sort().values, labels)
    assert torch.equal(second.sort().values, labels)
    assert all(torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels) for batch in seen)


def test_minibatches_of_a_sorted_coreset_have_images_of_many_classes():
    """10 classes of 10 images, batches of 10: in the order of u each would be of one class; shuffled, of 6.5 in the
    mean. Passes differ; where a batch is all of u, it stays in order and draws nothing."""
    labels, source = torch.arange(10).repeat_interleave(10), torch.Generator().manual_seed(0)
    walk = coreset_batches(torch.zeros(100, 1, 2, 2), labels, 10, "none", source)
    passes = [[next(walk).labels for _ in range(10)] for _ in range(5)]
    classes = [len(batch.unique()) for one in passes for batch in one]
    assert sum(classes) / len(classes) > 6
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))
    before = source.get_state()
    whole = next(coreset_batches(torch.zeros(100, 1, 2, 2), labels, 100, "none", source))
    assert torch.equal(whole.labels, labels)
    assert torch.equal(source.get_state(), before)


def test_epochs_of_theta_x_are_those_the_rule_names():
    """App. C.2's 'T epoch onwards' is T..E; the other reading is 0..T-1; none is a clear error."""
    assert list(expert_epochs(2, "from", 4)) == [2, 3, 4]
    assert list(expert_epochs(2, "before", 4)) == [0, 1]
    assert list(expert_epochs(9, "before", 4)) == [0, 1, 2, 3, 4]
    for start, rule in ((5, "from"), (0, "before"), (-1, "from")):
        with pytest.raises(UserError, match="--start-epoch"):
            expert_epochs(start, rule, 4)
    assert list(expert_epochs(9, "before", 4, ahead=2)) == [0, 1, 2]
    assert list(expert_epochs(1, "from", 4, ahead=1)) == [1, 2, 3]
    with pytest.raises(UserError, match="raise --start-epoch or --expert-epochs"):
        expert_epochs(2, "before", 1, ahead=2)


def worker_of(config, digits, labels) -> Worker:
    specs = session.network_specs(config, digits)
    stores = [session.expert_store(config, digits, spec) for spec in specs]
    return Worker(**worker_group(config, digits, labels, specs, stores).worker._asdict(), device="cpu")


@pytest.mark.parametrize("architecture", [0, 1])
@pytest.mark.parametrize("draw", [0, 2])
def test_an_x_side_computed_ahead_changes_no_bit(setting, architecture, draw):
    """theta_x and its K steps by one worker, the gradient by another: the bits of the gradient that does it all."""
    config, digits, _, state, labels = setting
    unit, images = GradientTask(architecture, draw), state.images.numpy()
    _, ahead = worker_of(config, digits, labels).expert_side(unit, 3)
    specs = session.network_specs(config, digits)
    assert ahead.shape == (1 + config.distillation.posterior_steps, Network(specs[architecture]).parameter_count)
    alone = worker_of(config, digits, labels).gradient(unit, 3, images, 0.0)
    helped = worker_of(config, digits, labels).gradient(unit, 3, images, 0.0, ahead)
    assert (helped[0] == alone[0]).all()
    timeless = [{k: v for k, v in outcome[1].row().items() if "seconds" not in k} for outcome in (helped, alone)]
    assert timeless[0] == timeless[1]
    # Another x side would give another gradient: it is used, not computed again.
    assert (worker_of(config, digits, labels).gradient(unit, 3, images, 0.0, ahead * 1.1)[0] != alone[0]).any()


def test_only_a_method_whose_x_side_is_costly_has_it_computed_ahead(setting):
    """FBPC-isotropic takes no K steps: there is nothing to gain, and its crew says so."""
    config, digits, _, _, labels = setting
    specs = session.network_specs(config, digits)
    stores = [session.expert_store(config, digits, spec) for spec in specs]
    largest = max(Network(spec).parameter_count for spec in specs)
    assert set(EXPERT_SIDES) == {"fbpc"}
    assert worker_group(config, digits, labels, specs, stores).expert_side_bytes == 4 * largest * 7  # K = 6
    isotropic = config.updated(method="fbpc-isotropic")
    assert worker_group(isotropic, digits, labels, specs, stores).expert_side_bytes == 0


def test_draws_of_a_step_differ_in_all_but_the_batch(setting):
    """M draws are independent: each has its own expert, prior, augmentation and noise; the first is that of M = 1."""
    config, digits, real, state, labels = setting
    spec = session.network_specs(config, digits)[0]
    settings = replace(config.distillation, batch_size=6)

    def draw(number):
        problem = GradientContext(
            Passes(Network(spec)), session.expert_store(config, digits, spec), real, labels, settings, "dsa", 1, number
        )
        drawn = [problem.rng(3, purpose).initial_seed() for purpose in ("expert", "prior", "augment", "monte-carlo")]
        return drawn, problem.batch(3), METHODS["fbpc"](problem, 3, state.images, 0.0).value

    seeds, batches, values = zip(*(draw(number) for number in range(3)), strict=True)
    assert len({seed for number in seeds for seed in number}) == 12
    assert all(torch.equal(batch, batches[0]) for batch in batches)
    assert torch.equal(values[0], compute(config, digits, real, state.images, labels, batch_size=6).value)
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])


def learn_and_score(config, digits) -> None:
    """Train the experts, distil and sample chains on the coreset, as a run does, without its files."""
    workers = Serial("cpu", Interruption())
    opened = session.open_session(config, silent, digits)
    opened.train_experts(workers, silent)
    state = opened.initial[0]
    for step in opened.steps(state, workers):
        state = step.state
    evaluate({"it": opened.coreset(state)}, opened.specs, digits, "test", opened.config, workers, silent)


@pytest.mark.parametrize("method", METHODS)
def test_without_augmentation_nothing_is_augmented(method, small, digits, tmp_path, monkeypatch):
    """Table 10: --augment none reaches experts, MAP solve, K steps, Eq. 17, inner steps and chains: DSA would raise."""

    def refuse(count, source):
        raise AssertionError("DSA was drawn")

    monkeypatch.setitem(AUGMENTATIONS, "dsa", refuse)
    config = small.updated(
        method=method, augment="none", experts=str(tmp_path / "experts"), steps=1, expert_count=1, syn_steps=2,
        start_rule="before", architectures=("convnet-in",), num_chains=1, chain_epochs=2, chain_every=1,
    )  # fmt: skip
    learn_and_score(config, digits)
    with pytest.raises(AssertionError, match="DSA was drawn"):
        learn_and_score(config.updated(augment="dsa"), digits)
