"""The noise, the prior and the start of a chain: their scale, and the random stream of each."""

from dataclasses import replace

import pytest
import torch
from support.chains import SETTINGS, Pair, same

from fbpc_ray.core.rng import generator
from fbpc_ray.evaluation.chains import (
    posterior_samples,
)
from fbpc_ray.models.passes import Passes


def test_noise_is_scaled_to_the_size_of_the_coreset(network, two_per_class: Pair):
    """d = chain_d / m: twice the coreset with the same chain_d has half the noise variance. Seen on the first step."""

    def jump(images, labels):
        settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_d=1e6, chain_weight_decay=0.0)
        (sample,) = posterior_samples(Passes(network), images, labels, settings, "none", seed=0)
        return torch.cat([value.flatten() for value in sample.values()]).std()

    once, double = jump(*two_per_class), jump(two_per_class[0].repeat(2, 1, 1, 1), two_per_class[1].repeat(2))
    assert (once / double).item() == pytest.approx(2**0.5, rel=0.01)


def test_chains_differ_by_seed_and_repeat_by_it(network, two_per_class: Pair):
    one, again, other = (
        posterior_samples(Passes(network), *two_per_class, SETTINGS, "dsa", seed) for seed in (0, 0, 1)
    )
    assert same(one[-1], again[-1])
    assert not same(one[-1], other[-1])


def test_the_prior_is_scaled_to_the_size_of_the_coreset(network, two_per_class: Pair):
    """One prior for every m: the first step's pull on theta is -eta chain_weight_decay / m theta, by hand."""

    def first(decay):
        settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_d=0.0, chain_weight_decay=decay)
        return posterior_samples(Passes(network), *two_per_class, settings, "none", seed=0)[0]

    start = network.init(generator(0, "chain", network.spec.architecture, "init"))
    free, pulled = first(0.0), first(40.0)
    for name, value in start.items():
        torch.testing.assert_close(pulled[name] - free[name], -0.03 * 40 / 20 * value, rtol=1e-3, atol=1e-6)


def test_a_chain_starts_where_chain_init_says(network, two_per_class: Pair):
    """Without steps, theta is the draw: N(0, .1^2) for every parameter, norms included, or that of the network."""
    name = network.spec.architecture

    def start(std, seed=0):
        settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_d=0.0, chain_eta=1e-30, chain_init=std)
        return posterior_samples(Passes(network), *two_per_class, settings, "none", seed=seed)[0]

    own = network.init(generator(0, "chain", name, "init"))
    for key, value in start(0.0).items():
        torch.testing.assert_close(value, own[key], rtol=0, atol=1e-20)
    drawn = start(0.1)
    assert {name: value.shape for name, value in drawn.items()} == network.shapes
    values = torch.cat([value.flatten() for value in drawn.values()])
    assert values.mean().abs() < 4 * 0.1 / len(values) ** 0.5
    assert values.std().item() == pytest.approx(0.1, rel=4 / (2 * len(values)) ** 0.5)
    assert all(not torch.equal(value, torch.ones_like(value)) for value in drawn.values())
    assert same(drawn, start(0.1))
    assert not same(drawn, start(0.1, seed=1))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_noise_of_a_chain_is_a_stream_of_its_own_for_every_seed(network, two_per_class: Pair, seed):
    """By hand, without a gradient (tiny eta): v <- .9 v + sqrt(2 d / m) n, theta <- theta + v, from the prior's draw.

    The noise n is neither another seed's nor the stream that the initialisation was drawn from.
    """
    settings = replace(
        SETTINGS, chain_epochs=2, chain_every=1, chain_noise="literal", chain_d=0.5, chain_eta=1e-30, chain_friction=0.1
    )
    first, second = posterior_samples(Passes(network), *two_per_class, settings, "none", seed=seed)
    name = network.spec.architecture
    expected = network.init(generator(seed, "chain", name, "init"))
    source = generator(seed, "chain", name, "noise")
    velocity = {key: torch.zeros_like(value) for key, value in expected.items()}
    for sample in (first, second):
        for key, value in velocity.items():
            velocity[key] = 0.9 * value + (2 * 0.5 / 20) ** 0.5 * torch.randn(value.shape, generator=source)
            expected[key] = expected[key] + velocity[key]
            torch.testing.assert_close(sample[key], expected[key], rtol=1e-5, atol=1e-6)


def test_noise_initialisation_and_batches_of_a_chain_are_independent(network, two_per_class: Pair):
    """The first increments of seeds 0 and 1, and each with the first normal numbers of its initialisation's stream: no
    two are correlated (4 / sqrt(n))."""
    settings = replace(SETTINGS, chain_epochs=1, chain_every=1, chain_noise="literal", chain_d=0.5, chain_eta=1e-30)
    name, draws = network.spec.architecture, []
    for seed in (0, 1):
        start = network.init(generator(seed, "chain", name, "init"))
        (sample,) = posterior_samples(Passes(network), *two_per_class, settings, "none", seed=seed)
        draws.append(torch.cat([(sample[key] - value).flatten() for key, value in start.items()]))
        for purpose in ("init", "batch"):
            source = generator(seed, "chain", name, purpose)
            draws.append(torch.cat([torch.randn(v.shape, generator=source).flatten() for v in start.values()]))
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlation.abs().max() < 4 / len(draws[0]) ** 0.5
