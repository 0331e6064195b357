"""Chains and their scores: which samples are kept, what is averaged, and that the test set's order cannot matter."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.chains import SETTINGS, Pair, arrays, context_of, same

from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.rng import generator
from fbpc_ray.data.datasets import Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import chains, ensemble, scoring
from fbpc_ray.evaluation.chains import Chain, posterior_samples, run_chain, values
from fbpc_ray.evaluation.scoring import average_of, score
from fbpc_ray.execution import session
from fbpc_ray.inference import metrics
from fbpc_ray.inference.metrics import scores
from fbpc_ray.inference.uncertainty import Uncertainty, uncertainty_of
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes, count_macs


@pytest.mark.parametrize(
    ("changes", "m", "flags"),
    [
        ({}, 10, "--chain-eta (now 0.009)"),
        ({}, 20, "--chain-eta (now 0.018)"),
        ({"chain_eta": 0.5}, 20, "--chain-eta (now 0.5)"),
        ({"chain_noise": "literal"}, 100, "--chain-eta (now 0.03), or use --chain-noise consistent"),
        ({"inference": "last-layer"}, 10, "--net-lr, or raise --net-ridge"),
        ({"inference": "ensemble", "chain_noise": "literal"}, 10, "--net-lr"),
    ],
)
def test_the_advice_after_a_divergence_is_not_what_is_set_and_names_the_step_size(changes, m, flags):
    """Also where it is chosen by the number of images."""
    assert chains.flags_to_lower(Evaluation(**changes), m) == flags


def test_samples_are_the_states_after_every_tenth_epoch(network, two_per_class: Pair):
    """30 epochs with one sample every 10 give 3; those of a longer chain begin with the same three."""
    samples = posterior_samples(Passes(network), *two_per_class, SETTINGS, "dsa", seed=0)
    assert len(samples) == 3
    longer = posterior_samples(Passes(network), *two_per_class, replace(SETTINGS, chain_epochs=45), "dsa", seed=0)
    assert len(longer) == 4
    assert all(same(a, b) for a, b in zip(samples, longer, strict=False))
    often = posterior_samples(Passes(network), *two_per_class, replace(SETTINGS, chain_every=5), "dsa", seed=0)
    assert len(often) == 6
    assert same(often[1], samples[0])


def test_an_epoch_is_a_pass_over_the_coreset_whatever_the_batch(network, two_per_class: Pair):
    """Without noise, prior or augmentation, batches of 7 of 20 images take 3 steps per epoch: 3 SGD steps by hand."""
    settings = replace(
        SETTINGS,
        chain_full_batch=10,
        chain_batch_size=7,
        chain_d=0.0,
        chain_weight_decay=0.0,
        chain_epochs=1,
        chain_every=1,
    )
    (sample,) = posterior_samples(Passes(network), *two_per_class, settings, "none", seed=3)
    name = network.spec.architecture
    params = {k: v.clone().requires_grad_() for k, v in network.init(generator(3, "chain", name, "init")).items()}
    velocity = {k: torch.zeros_like(v) for k, v in params.items()}
    for index in torch.randperm(20, generator=generator(3, "chain", name, "batch")).split(7):
        loss = torch.nn.functional.cross_entropy(
            network.forward(params, two_per_class[0][index]), two_per_class[1][index]
        )
        for k, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            velocity[k] = 0.9 * velocity[k] - 0.03 * g
            params[k] = (params[k] + velocity[k]).detach().requires_grad_()
    for k, value in params.items():
        torch.testing.assert_close(sample[k], value.detach(), rtol=1e-4, atol=1e-6)


def test_the_augmentation_switch_acts(network, two_per_class: Pair):
    plain = posterior_samples(Passes(network), *two_per_class, replace(SETTINGS, chain_augment=False), "dsa", 0)
    none = posterior_samples(Passes(network), *two_per_class, SETTINGS, "none", 0)
    assert same(plain[-1], none[-1])
    assert not same(plain[-1], posterior_samples(Passes(network), *two_per_class, SETTINGS, "dsa", 0)[-1])


@pytest.mark.parametrize("size", [1, 7, 90, 500])
def test_no_number_depends_on_batches_or_order_of_the_test_set(network, two_per_class: Pair, digits, monkeypatch, size):
    """Scores, and what each image gets: BatchNorm too, its statistics coming from the coreset and not from the test
    images that share a batch. 90 images, shuffled and sorted by class."""
    samples = posterior_samples(Passes(network), *two_per_class, SETTINGS, "dsa", 0)
    images, labels = (tensor[:90] for tensor in tensors(digits.test, "cpu"))
    predictions = average_of(Passes(network), samples, two_per_class[0])
    full = score(predictions, DeviceDataset(images, labels, digits.mean, digits.std))
    monkeypatch.setattr(ensemble, "BATCH", size)
    for order in (torch.randperm(90, generator=generator(1)), labels.argsort()):
        moved = DeviceDataset(images[order], labels[order], digits.mean, digits.std)
        outcome = score(predictions, moved)
        assert scores(outcome.stats) == pytest.approx(scores(full.stats), rel=1e-5)
        torch.testing.assert_close(outcome.losses, full.losses[:, order], rtol=1e-4, atol=1e-5)
        for name in Uncertainty._fields:
            expected = getattr(full.uncertainty, name)[order]
            torch.testing.assert_close(getattr(outcome.uncertainty, name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 8, 8), 500), ((3, 32, 32), 500), ((3, 64, 64), 125), ((3, 224, 224), 10), ((3, 1024, 1024), 1)],
)
def test_batches_of_large_images_have_as_many_pixels_as_500_of_32x32(shape, expected):
    """500 images of 224x224 would take 12 GiB in one activation of width 128."""
    assert ensemble.batch_size(shape) == expected


def test_each_batch_is_normalised_once(digits, monkeypatch):
    """Scores, losses and uncertainties share one log-softmax in float64, with the values of each by itself."""
    logits = torch.randn(3, 40, 10, generator=generator(0, "logits"))
    images, labels = (tensor[:40] for tensor in tensors(digits.test, "cpu"))
    calls: list[torch.Tensor] = []

    def counted(values: torch.Tensor) -> torch.Tensor:
        calls.append(values)
        return metrics.log_probabilities(values)

    monkeypatch.setattr(scoring, "log_probabilities", counted)
    scored = scoring.score(lambda _: logits, DeviceDataset(images, labels, digits.mean, digits.std))
    assert len(calls) == 1
    log_probs = metrics.log_probabilities(logits)
    mean = metrics.log_mixture(log_probs)
    assert torch.equal(scored.losses, metrics.sample_losses(log_probs, labels))
    assert scored.stats.nll == metrics.predictive_stats(mean, labels).nll
    for name, value in uncertainty_of(log_probs, mean)._asdict().items():
        assert torch.equal(getattr(scored.uncertainty, name), value)


def test_the_average_is_over_the_samples(network, two_per_class: Pair, digits):
    """Its probabilities are the mean of the softmax of every sample: by hand for all three."""
    samples = posterior_samples(Passes(network), *two_per_class, SETTINGS, "dsa", 0)
    test = DeviceDataset(*tensors(digits.test, "cpu"), digits.mean, digits.std)
    batch = test.batch(torch.arange(len(test)))
    p = torch.stack(
        [
            network.predict(s, network.statistics(s, [two_per_class[0]]), batch.images).double().softmax(1)
            for s in samples
        ]
    ).mean(0)
    nll = -p[torch.arange(len(p)), batch.labels].log().mean().item()
    scored = score(average_of(Passes(network), samples, two_per_class[0]), test)
    assert scores(scored.stats).nll == pytest.approx(nll, rel=1e-6)


def test_a_chain_task_scores_the_split_it_is_given(network, two_per_class: Pair, digits):
    """The task gives what its parts give, on the split of the judge."""
    settings, few = SETTINGS, Split(digits.test.images[:50], digits.test.labels[:50])
    chain = Chain("x", network.spec, 0)
    result = run_chain(
        context_of(digits._replace(validation=few), "validation", settings, *arrays(two_per_class)), chain, "cpu"
    )
    assert result.stats is not None
    assert result.stats.examples == 50
    samples = posterior_samples(Passes(network), *two_per_class, settings, "dsa", 0)
    predictions = average_of(Passes(network), samples, two_per_class[0])
    expected = score(predictions, DeviceDataset(*tensors(few, "cpu"), digits.mean, digits.std))
    assert scores(result.stats) == scores(expected.stats)
    assert result.in_distribution is result.out_of_distribution is None, "sent though nobody asked"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
@pytest.mark.slow
def test_a_compiled_chain_has_the_scores_of_an_eager_one(small, digits, monkeypatch):
    """Batches of 20 test images and one of 5, BatchNorm's statistics among the arguments of what is compiled."""
    monkeypatch.setattr(ensemble, "BATCH", 20)
    spec = session.network_specs(small, digits)[1]
    assert spec.architecture == "convnet-bn"
    state, labels = initial_state(digits, 2, 0)
    few = Split(digits.test.images[:45], digits.test.labels[:45])
    chain = Chain("x", spec, 0, keep_samples=True)
    settings = replace(SETTINGS, chain_epochs=6, chain_every=3)
    eager, fast = (
        run_chain(
            context_of(digits._replace(test=few), "test", settings, state.images.numpy(), labels.numpy(), compiled=how),
            chain,
            "cpu",
        )
        for how in ("off", "on")
    )
    assert len(list(compiling.folder().glob("*.pt2"))) >= 2
    assert eager.samples
    assert eager.stats
    assert fast.samples
    assert fast.stats
    for one, other in zip(eager.samples, fast.samples, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    assert fast.stats.correct == eager.stats.correct
    assert fast.stats.nll == pytest.approx(eager.stats.nll, rel=1e-3)
    assert fast.mean_sample_nll == pytest.approx(eager.mean_sample_nll, rel=1e-3)


def test_whether_a_chain_is_compiled_depends_on_its_own_work(small, digits, monkeypatch):
    """By hand for 20 images and a test set of 297: (3 x 20 x 1000 + 10 x 297) images forward, two operations for each
    of `count_macs`; auto compiles from there on. What can't be compiled is said, and stays eager."""
    spec = session.network_specs(small, digits)[0]
    chain = Chain("x", spec, 0)
    auto = context_of(
        digits, "test", Evaluation(), np.zeros((20, 1, 8, 8), np.float32), np.arange(20) % 10, compiled="auto"
    )
    work = 2 * count_macs(Network(spec)) * (60_000 + 10 * len(digits.test.labels))
    monkeypatch.setattr(chains, "COMPILE_FROM", work)
    assert chains.compiles(auto, chain, Network(spec))
    assert chains.passes_of(auto, chain, "cpu").folder == compiling.folder()
    assert chains.passes_of(auto._replace(compiled="off"), chain, "cpu").folder is None
    monkeypatch.setattr(chains, "COMPILE_FROM", work + 1)
    assert not chains.compiles(auto, chain, Network(spec))
    forced, lines = auto._replace(compiled="on"), []
    assert chains.compiles(forced, chain, Network(spec))
    monkeypatch.setattr(compiling, "compile_failure", lambda folder: "no g++")
    possible = chains.without_impossible_compilation
    assert possible(forced, [chain], "cuda", lines.append) is forced  # nothing is compiled on CUDA
    assert possible(auto, [chain], "cpu", lines.append) is auto
    assert not lines
    assert chains.without_impossible_compilation(forced, [chain], "cpu", lines.append).compiled == "off"
    assert lines == ["note: the passes of chains stay eager, which is slower: they cannot be compiled here (no g++)"]


def test_a_chain_that_explodes_says_so(network, two_per_class: Pair, digits):
    settings = replace(SETTINGS, chain_eta=1e20)
    chain = Chain("x", network.spec, 0)
    result = run_chain(context_of(digits, "test", settings, *arrays(two_per_class)), chain, "cpu")
    assert result.stats is None
    assert values(result) == {}


def test_training_on_more_real_images_scores_better(small, digits):
    """10 images per class against 1, with chains of 200 epochs: the sampler learns something from its data."""
    spec = session.network_specs(small, digits)[0]
    accuracy = []
    for ipc in (1, 10):
        state, labels = initial_state(digits, ipc, 0)
        chain = Chain("x", spec, 0)
        settings = replace(SETTINGS, chain_epochs=200, chain_every=100)
        result = run_chain(context_of(digits, "test", settings, state.images.numpy(), labels.numpy()), chain, "cpu")
        assert result.stats is not None
        accuracy.append(scores(result.stats).accuracy)
    assert accuracy[0] > 0.3
    assert accuracy[1] > accuracy[0] + 0.1
