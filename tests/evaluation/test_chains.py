"""Chains and their scores: which samples are kept, what is averaged, and that the test set's order cannot matter."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.chains import context_of
from torch import Tensor

from fbpc_ray.core.config import Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data.datasets import Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import chains, ensemble
from fbpc_ray.evaluation.chains import (
    Chain,
    ood_split,
    posterior_samples,
    predictive,
    quantities,
    run_chain,
    values,
)
from fbpc_ray.execution import session
from fbpc_ray.inference import metrics
from fbpc_ray.inference.metrics import batch_nll, scores
from fbpc_ray.inference.uncertainty import Uncertainty, auroc, uncertainty
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes, count_macs

Pair = tuple[Tensor, Tensor]
SETTINGS = Evaluation(chain_epochs=30, chain_every=10, chain_d=0.01, chain_weight_decay=0.05, chain_init=0.0)


@pytest.fixture(scope="module")
def coreset(digits):
    state, labels = initial_state(digits, 2, 0)
    return state.images, labels


@pytest.fixture(scope="module", params=[0, 1], ids=["convnet-in", "convnet-bn"])
def network(request, small, digits):
    return Network(session.network_specs(small, digits)[request.param])


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_samples_are_the_states_after_every_tenth_epoch(network, coreset: Pair):
    """30 epochs with one sample every 10 give 3; those of a longer chain begin with the same three."""
    samples = posterior_samples(Passes(network), *coreset, SETTINGS, "dsa", seed=0)
    assert len(samples) == 3
    longer = posterior_samples(Passes(network), *coreset, replace(SETTINGS, chain_epochs=45), "dsa", seed=0)
    assert len(longer) == 4
    assert all(same(a, b) for a, b in zip(samples, longer, strict=False))
    often = posterior_samples(Passes(network), *coreset, replace(SETTINGS, chain_every=5), "dsa", seed=0)
    assert len(often) == 6
    assert same(often[1], samples[0])


def test_an_epoch_is_a_pass_over_the_coreset_whatever_the_batch(network, coreset: Pair):
    """Without noise, prior or augmentation, batches of 7 of 20 images take 3 steps an epoch: 3 SGD steps by hand."""
    settings = replace(
        SETTINGS,
        chain_full_batch=10,
        chain_batch_size=7,
        chain_d=0.0,
        chain_weight_decay=0.0,
        chain_epochs=1,
        chain_every=1,
    )
    (sample,) = posterior_samples(Passes(network), *coreset, settings, "none", seed=3)
    name = network.spec.architecture
    params = {k: v.clone().requires_grad_() for k, v in network.init(generator(3, "chain", name, "init")).items()}
    velocity = {k: torch.zeros_like(v) for k, v in params.items()}
    for index in torch.randperm(20, generator=generator(3, "chain", name, "batch")).split(7):
        loss = torch.nn.functional.cross_entropy(network.forward(params, coreset[0][index]), coreset[1][index])
        for k, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            velocity[k] = 0.9 * velocity[k] - 0.03 * g
            params[k] = (params[k] + velocity[k]).detach().requires_grad_()
    for k, value in params.items():
        torch.testing.assert_close(sample[k], value.detach(), rtol=1e-4, atol=1e-6)


def test_noise_is_scaled_to_the_size_of_the_coreset(network, coreset: Pair):
    """d = chain_d / m: twice the coreset with the same chain_d has half the noise variance. Seen on the first step."""

    def jump(images, labels):
        settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_d=1e6, chain_weight_decay=0.0)
        (sample,) = posterior_samples(Passes(network), images, labels, settings, "none", seed=0)
        return torch.cat([value.flatten() for value in sample.values()]).std()

    once, double = jump(*coreset), jump(coreset[0].repeat(2, 1, 1, 1), coreset[1].repeat(2))
    assert (once / double).item() == pytest.approx(2**0.5, rel=0.01)


def test_chains_differ_by_seed_and_repeat_by_it(network, coreset: Pair):
    one, again, other = (posterior_samples(Passes(network), *coreset, SETTINGS, "dsa", seed) for seed in (0, 0, 1))
    assert same(one[-1], again[-1])
    assert not same(one[-1], other[-1])


def test_the_augmentation_switch_acts(network, coreset: Pair):
    plain = posterior_samples(Passes(network), *coreset, replace(SETTINGS, chain_augment=False), "dsa", 0)
    none = posterior_samples(Passes(network), *coreset, SETTINGS, "none", 0)
    assert same(plain[-1], none[-1])
    assert not same(plain[-1], posterior_samples(Passes(network), *coreset, SETTINGS, "dsa", 0)[-1])


@pytest.mark.parametrize("size", [1, 7, 90, 500])
def test_no_number_depends_on_batches_or_order_of_the_test_set(network, coreset: Pair, digits, monkeypatch, size):
    """Scores, and what each image gets: BatchNorm too, its statistics coming from the coreset and not from the test
    images that share a batch. 90 images, shuffled and sorted by class."""
    samples = posterior_samples(Passes(network), *coreset, SETTINGS, "dsa", 0)
    images, labels = (each[:90] for each in tensors(digits.test, "cpu"))
    whole = predictive(Passes(network), samples, coreset[0], DeviceDataset(images, labels, digits.mean, digits.std))
    monkeypatch.setattr(chains, "TEST_BATCH", size)
    for order in (torch.randperm(90, generator=generator(1)), labels.argsort()):
        moved = DeviceDataset(images[order], labels[order], digits.mean, digits.std)
        outcome = predictive(Passes(network), samples, coreset[0], moved)
        assert scores(outcome.stats) == pytest.approx(scores(whole.stats), rel=1e-5)
        torch.testing.assert_close(outcome.losses, whole.losses[:, order], rtol=1e-4, atol=1e-5)
        for name in Uncertainty._fields:
            expected = getattr(whole.uncertainty, name)[order]
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
    images, labels = (each[:40] for each in tensors(digits.test, "cpu"))
    calls: list[torch.Tensor] = []

    def counted(values: torch.Tensor) -> torch.Tensor:
        calls.append(values)
        return metrics.log_probabilities(values)

    monkeypatch.setattr(chains, "log_probabilities", counted)
    scored = chains.score(lambda _: logits, DeviceDataset(images, labels, digits.mean, digits.std))
    assert len(calls) == 1
    assert torch.equal(scored.losses, metrics.sample_losses(logits, labels))
    assert scored.stats.nll == metrics.predictive_stats(metrics.log_mean_probability(logits), labels).nll
    for name, value in uncertainty(logits)._asdict().items():
        assert torch.equal(getattr(scored.uncertainty, name), value)


def test_the_average_is_over_the_samples(network, coreset: Pair, digits):
    """Its probabilities are the mean of the softmax of every sample: by hand for all three."""
    samples = posterior_samples(Passes(network), *coreset, SETTINGS, "dsa", 0)
    test = DeviceDataset(*tensors(digits.test, "cpu"), digits.mean, digits.std)
    batch = test.batch(torch.arange(len(test)))
    p = torch.stack(
        [network.predict(s, network.statistics(s, [coreset[0]]), batch.images).double().softmax(1) for s in samples]
    ).mean(0)
    nll = -p[torch.arange(len(p)), batch.labels].log().mean().item()
    assert scores(predictive(Passes(network), samples, coreset[0], test).stats).nll == pytest.approx(nll, rel=1e-6)


def test_a_chain_task_scores_the_split_it_is_given(network, coreset: Pair, digits):
    """The task gives what its parts give, on the split of the judge."""
    settings, few = SETTINGS, Split(digits.test.images[:50], digits.test.labels[:50])
    chain = Chain("x", network.spec, 0)
    result = run_chain(
        context_of(digits._replace(validation=few), "validation", settings, *arrays(coreset)), chain, "cpu"
    )
    assert result.stats is not None
    assert result.stats.examples == 50
    samples = posterior_samples(Passes(network), *coreset, settings, "dsa", 0)
    expected = predictive(
        Passes(network), samples, coreset[0], DeviceDataset(*tensors(few, "cpu"), digits.mean, digits.std)
    )
    assert scores(result.stats) == scores(expected.stats)
    assert result.in_distribution is result.out_of_distribution is None, "sent though nobody asked"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
@pytest.mark.slow
def test_a_compiled_chain_has_the_scores_of_an_eager_one(small, digits, monkeypatch):
    """Batches of 20 test images and one of 5, BatchNorm's statistics among the arguments of what is compiled."""
    monkeypatch.setattr(chains, "TEST_BATCH", 20)
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


def test_a_chain_that_explodes_says_so(network, coreset: Pair, digits):
    settings = replace(SETTINGS, chain_eta=1e20)
    chain = Chain("x", network.spec, 0)
    result = run_chain(context_of(digits, "test", settings, *arrays(coreset)), chain, "cpu")
    assert result.stats is None
    assert values(result) == {}


def arrays(coreset: Pair) -> tuple[np.ndarray, np.ndarray]:
    return coreset[0].numpy(), coreset[1].numpy()


def noise(digits, shape=(1, 8, 8), count=70):
    """A data set whose test images are noise; of digits' sort but for their shape."""
    images = torch.randint(256, (count, *shape), generator=generator(4), dtype=torch.uint8).numpy()
    return digits._replace(name="noise", test=Split(images, np.arange(count)))


def test_values_of_a_chain_with_strange_images(network, coreset: Pair, digits):
    """By hand from the samples: the lineage's NLL in the order of the split, and how entropy and mutual information
    rank noise above digits. The scores are those without strange images."""
    strange = ood_split(digits, noise(digits))
    judged = context_of(digits, "test", SETTINGS, *arrays(coreset), strange)
    chain = Chain("x", network.spec, 0)
    outcome = values(run_chain(judged, chain, "cpu"))
    assert tuple(outcome) == quantities(judged)

    samples = posterior_samples(Passes(network), *coreset, SETTINGS, "dsa", 0)
    inside, outside = (
        predictive(Passes(network), samples, coreset[0], DeviceDataset(*tensors(split, "cpu"), digits.mean, digits.std))
        for split in (digits.test, strange)
    )
    assert len(inside.uncertainty.entropy) == len(digits.test.labels)
    assert len(outside.uncertainty.entropy) == 70
    for name in Uncertainty._fields:
        expected = auroc(getattr(inside.uncertainty, name), getattr(outside.uncertainty, name))
        assert outcome[f"ood_auroc_{name}"] == expected
        assert expected != 0.5
    assert outcome["batch_nll"] == batch_nll(inside.losses, 128)
    assert outcome["mean_sample_nll"] == inside.losses.mean().item()
    assert outcome["nll"] < outcome["batch_nll"] < outcome["mean_sample_nll"]

    without = judged._replace(ood=None)
    alone = values(run_chain(without, chain, "cpu"))
    assert tuple(alone) == quantities(without) == tuple(outcome)[:-2]
    assert alone == {name: outcome[name] for name in alone}


def test_strange_images_are_fitted_or_refused(digits):
    """Grey ones are repeated for networks that see three channels; other sizes are resized where that is asked for, to
    the mean of four pixels at half the size; colour where the networks see grey, and other sizes, are refused."""
    same_kind = ood_split(digits, noise(digits))
    assert np.array_equal(same_kind.images, noise(digits).test.images)
    assert same_kind.labels.tolist() == [0] * 70
    colour = digits._replace(train=Split(np.zeros((2, 3, 8, 8), np.uint8), np.arange(2)), name="colour")
    fitted = ood_split(colour, noise(digits)).images
    assert fitted.shape == (70, 3, 8, 8)
    assert fitted.flags.c_contiguous
    assert all(np.array_equal(fitted[:, c], noise(digits).test.images[:, 0]) for c in range(3))
    with pytest.raises(UserError, match=r"noise has images of 3 channels, digits of 1: choose"):
        ood_split(digits, noise(digits, (3, 8, 8)))
    with pytest.raises(UserError, match=r"noise has images of 16x16, digits of 8x8: .*--ood-resize"):
        ood_split(digits, noise(digits, (1, 16, 16)))
    flat = noise(digits, (1, 16, 16))
    flat.test.images[:] = np.arange(70)[:, None, None, None]
    halved = ood_split(digits, flat, resize=True).images
    assert halved.shape == (70, 1, 8, 8)
    assert np.array_equal(halved[:, 0, 3, 3], np.arange(70))
    stripes = noise(digits, (1, 32, 32))
    stripes.test.images[:] = np.tile([0, 255, 255, 0], 8)
    quartered = ood_split(digits, stripes, resize=True).images
    assert abs(quartered[..., 1:-1].astype(int) - 128).max() < 20, "stripes that the size can't show are grey"
    ramp = noise(digits, (1, 16, 16))
    ramp.test.images[:] = 8 * np.arange(16)
    assert ood_split(digits, ramp, resize=True).images[0, 0, 0, 1:-1].tolist() == [16 * i + 4 for i in range(1, 7)]


def test_training_on_more_real_images_scores_better(small, digits):
    """10 images a class against 1, with chains of 200 epochs: the sampler learns something from its data."""
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


def test_the_prior_is_scaled_to_the_size_of_the_coreset(network, coreset: Pair):
    """One prior for every m: the first step's pull on theta is -eta chain_weight_decay / m theta, by hand."""

    def first(decay):
        settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_d=0.0, chain_weight_decay=decay)
        return posterior_samples(Passes(network), *coreset, settings, "none", seed=0)[0]

    start = network.init(generator(0, "chain", network.spec.architecture, "init"))
    free, pulled = first(0.0), first(40.0)
    for name, value in start.items():
        torch.testing.assert_close(pulled[name] - free[name], -0.03 * 40 / 20 * value, rtol=1e-3, atol=1e-6)


def test_a_chain_starts_where_chain_init_says(network, coreset: Pair):
    """Without steps, theta is the draw: N(0, .1^2) for every parameter, norms included, or that of the network."""
    name = network.spec.architecture

    def start(std, seed=0):
        settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_d=0.0, chain_eta=0.0, chain_init=std)
        return posterior_samples(Passes(network), *coreset, settings, "none", seed=seed)[0]

    assert same(start(0.0), network.init(generator(0, "chain", name, "init")))
    drawn = start(0.1)
    assert {name: value.shape for name, value in drawn.items()} == network.shapes
    values = torch.cat([value.flatten() for value in drawn.values()])
    assert values.mean().abs() < 4 * 0.1 / len(values) ** 0.5
    assert values.std().item() == pytest.approx(0.1, rel=4 / (2 * len(values)) ** 0.5)
    assert all(not torch.equal(value, torch.ones_like(value)) for value in drawn.values())
    assert same(drawn, start(0.1))
    assert not same(drawn, start(0.1, seed=1))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_noise_of_a_chain_is_a_stream_of_its_own_for_every_seed(network, coreset: Pair, seed):
    """By hand, without a gradient (eta = 0): v <- .9 v + sqrt(2 d / m) n, theta <- theta + v, from the prior's draw.

    The noise n is neither another seed's nor the stream that the initialisation was drawn from.
    """
    settings = replace(
        SETTINGS, chain_epochs=2, chain_every=1, chain_noise="literal", chain_d=0.5, chain_eta=0.0, chain_friction=0.1
    )
    first, second = posterior_samples(Passes(network), *coreset, settings, "none", seed=seed)
    name = network.spec.architecture
    expected = network.init(generator(seed, "chain", name, "init"))
    source = generator(seed, "chain", name, "noise")
    velocity = {key: torch.zeros_like(value) for key, value in expected.items()}
    for sample in (first, second):
        for key, value in velocity.items():
            velocity[key] = 0.9 * value + (2 * 0.5 / 20) ** 0.5 * torch.randn(value.shape, generator=source)
            expected[key] = expected[key] + velocity[key]
            torch.testing.assert_close(sample[key], expected[key], rtol=1e-5, atol=1e-6)


def test_noise_initialisation_and_batches_of_a_chain_are_independent(network, coreset: Pair):
    """The first increments of seeds 0 and 1, and each with the first normal numbers of its initialisation's stream: no
    two are correlated (4 / sqrt(n))."""
    settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_noise="literal", chain_d=0.5, chain_eta=0.0)
    name, draws = network.spec.architecture, []
    for seed in (0, 1):
        start = network.init(generator(seed, "chain", name, "init"))
        (sample,) = posterior_samples(Passes(network), *coreset, settings, "none", seed=seed)
        draws.append(torch.cat([(sample[key] - value).flatten() for key, value in start.items()]))
        for purpose in ("init", "batch"):
            source = generator(seed, "chain", name, purpose)
            draws.append(torch.cat([torch.randn(v.shape, generator=source).flatten() for v in start.values()]))
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlation.abs().max() < 4 / len(draws[0]) ** 0.5
