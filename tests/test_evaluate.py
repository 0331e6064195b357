"""Chains and their scores: which samples are kept, what is averaged, and that the test set's order cannot matter."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fbpc_ray import evaluate, pipeline, plan
from fbpc_ray.config import Evaluation
from fbpc_ray.evaluate import Chain, judge, posterior_samples, predictive, run_chain
from fbpc_ray.inference.metrics import scores
from fbpc_ray.vision.datasets import Split, tensors
from fbpc_ray.vision.realdata import RealData
from fbpc_ray.vision.zoo import Network

Pair = tuple[Tensor, Tensor]
SETTINGS = Evaluation(chain_steps=30, chain_every=10)


@pytest.fixture(scope="module")
def coreset(digits):
    state, labels = pipeline.first_state(digits, 2, 0)
    return state.images, labels


@pytest.fixture(scope="module", params=[0, 1], ids=["convnet-in", "convnet-bn"])
def network(request, small, digits):
    return Network(plan.specs(small, digits)[request.param])


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_samples_are_the_states_after_every_tenth_epoch(network, coreset: Pair):
    """30 epochs with one sample every 10 give 3; those of a longer chain begin with the same three."""
    samples = posterior_samples(network, *coreset, SETTINGS, "dsa", seed=0)
    assert len(samples) == 3
    longer = posterior_samples(network, *coreset, replace(SETTINGS, chain_steps=45), "dsa", seed=0)
    assert len(longer) == 4
    assert all(same(a, b) for a, b in zip(samples, longer, strict=False))
    often = posterior_samples(network, *coreset, replace(SETTINGS, chain_every=5), "dsa", seed=0)
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
        chain_steps=1,
        chain_every=1,
    )
    (sample,) = posterior_samples(network, *coreset, settings, "none", seed=3)
    from fbpc_ray.rng import generator

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
        settings = replace(SETTINGS, chain_steps=1, chain_every=1, chain_d=1e6, chain_weight_decay=0.0)
        (sample,) = posterior_samples(network, images, labels, settings, "none", seed=0)
        return torch.cat([value.flatten() for value in sample.values()]).std()

    once, double = jump(*coreset), jump(coreset[0].repeat(2, 1, 1, 1), coreset[1].repeat(2))
    assert (once / double).item() == pytest.approx(2**0.5, rel=0.01)


def test_chains_differ_by_seed_and_repeat_by_it(network, coreset: Pair):
    one, again, other = (posterior_samples(network, *coreset, SETTINGS, "dsa", seed) for seed in (0, 0, 1))
    assert same(one[-1], again[-1])
    assert not same(one[-1], other[-1])


def test_the_augmentation_switch_acts(network, coreset: Pair):
    plain = posterior_samples(network, *coreset, replace(SETTINGS, chain_augment=False), "dsa", 0)
    none = posterior_samples(network, *coreset, SETTINGS, "none", 0)
    assert same(plain[-1], none[-1])
    assert not same(plain[-1], posterior_samples(network, *coreset, SETTINGS, "dsa", 0)[-1])


def test_scores_do_not_depend_on_batches_or_order_of_the_test_set(network, coreset: Pair, digits, monkeypatch):
    """BatchNorm too: its statistics come from the coreset, not from the test images that share a batch."""
    samples = posterior_samples(network, *coreset, SETTINGS, "dsa", 0)
    images, labels = tensors(digits.test, "cpu")
    found = []
    for size, order in ((500, torch.arange(len(labels))), (7, torch.arange(len(labels)).flip(0))):
        monkeypatch.setattr(evaluate, "TEST_BATCH", size)
        test = RealData(images[order], labels[order], digits.mean, digits.std)
        found.append(scores(predictive(network, samples, coreset[0], test)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_average_is_over_the_samples(network, coreset: Pair, digits):
    """Its probabilities are the mean of the softmax of every sample: by hand for all three."""
    samples = posterior_samples(network, *coreset, SETTINGS, "dsa", 0)
    test = RealData(*tensors(digits.test, "cpu"), digits.mean, digits.std)
    batch = test.batch(torch.arange(len(test)))
    p = torch.stack(
        [network.predict(s, network.statistics(s, [coreset[0]]), batch.images).double().softmax(1) for s in samples]
    ).mean(0)
    nll = -p[torch.arange(len(p)), batch.labels].log().mean().item()
    assert scores(predictive(network, samples, coreset[0], test)).nll == pytest.approx(nll, rel=1e-6)


def test_a_chain_task_scores_the_split_it_is_given(network, coreset: Pair, digits):
    """The task gives what its parts give, on the split of the judge."""
    settings, few = SETTINGS, Split(digits.test.images[:50], digits.test.labels[:50])
    chain = Chain("x", coreset[0].numpy(), coreset[1].numpy(), network.spec, 0)
    result = run_chain(judge(digits._replace(validation=few), "validation", settings, "dsa"), chain, "cpu")
    assert result.stats is not None
    assert result.stats.examples == 50
    samples = posterior_samples(network, *coreset, settings, "dsa", 0)
    expected = predictive(network, samples, coreset[0], RealData(*tensors(few, "cpu"), digits.mean, digits.std))
    assert scores(result.stats) == scores(expected)


def test_a_chain_that_explodes_says_so(network, coreset: Pair, digits):
    settings = replace(SETTINGS, chain_eta=1e20)
    chain = Chain("x", coreset[0].numpy(), coreset[1].numpy(), network.spec, 0)
    assert run_chain(judge(digits, "test", settings, "dsa"), chain, "cpu").stats is None


def test_training_on_more_real_images_scores_better(small, digits):
    """10 images a class against 1, with chains of 200 epochs: the sampler learns something from its data."""
    spec = plan.specs(small, digits)[0]
    accuracy = []
    for ipc in (1, 10):
        state, labels = pipeline.first_state(digits, ipc, 0)
        chain = Chain("x", state.images.numpy(), labels.numpy(), spec, 0)
        settings = replace(SETTINGS, chain_steps=200, chain_every=100)
        result = run_chain(judge(digits, "test", settings, "dsa"), chain, "cpu")
        assert result.stats is not None
        accuracy.append(scores(result.stats).accuracy)
    assert accuracy[0] > 0.3
    assert accuracy[1] > accuracy[0] + 0.1
