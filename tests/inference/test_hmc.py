"""HMC against exact distributions, and SGHMC (Eq. 27) against HMC: what evaluates coresets samples what it says."""

from itertools import islice, pairwise, repeat

import pytest
import torch
from sklearn.datasets import load_digits
from support import hmc as module
from support import oracles
from support.hmc import accept_probability, acceptance, hmc, in_float64, kinetic, leapfrog, tempered

from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch
from fbpc_ray.inference.sghmc import noise_variance, sghmc
from fbpc_ray.models.functional import Network, Spec

PRECISION = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -3.0], dtype=torch.float64)


def gaussian(params):
    """E of N(MEAN, PRECISION^-1), by chain: w (..., 2)."""
    error = params["w"] - MEAN
    return 0.5 * ((error @ PRECISION) * error).sum(-1)


def quartic(params):
    """E = w^4 / 4, by chain: w (chains,)."""
    return params["w"] ** 4 / 4


def many(energy, start, transitions, step, leapfrogs=3, seed=0):
    """The last of `transitions`, of chains that begin at `start`."""
    chain = hmc(energy, start, step=step, leapfrogs=leapfrogs, source=generator(seed, "hmc"))
    return list(islice(chain, transitions))


def gaussian_draws(chains, seed=0):
    lower = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    return MEAN + torch.randn(chains, 2, generator=generator(seed), dtype=torch.float64) @ lower.T


def test_moments_of_a_gaussian_are_exact():
    """4,000 chains from one far point: the mean to 0.1 (3.5 standard errors) and the covariance to 8 % (3.5) of the
    inverse precision. The step is large: half of the proposals are refused, and without that they would be far off."""
    run = many(gaussian, {"w": torch.full((4000, 2), 5.0, dtype=torch.float64)}, 60, step=1.25)
    assert 0.4 < acceptance(run[30:]).rate.mean() < 0.6
    draws = run[-1].params["w"]
    torch.testing.assert_close(draws.mean(0), MEAN, atol=0.1, rtol=0)
    torch.testing.assert_close(draws.T.cov(), torch.linalg.inv(PRECISION), rtol=0.08, atol=0)


WRONG = {
    "the sign of the change": lambda change: change.clamp(max=0).exp(),
    "everything accepted": torch.ones_like,
    "half the change": lambda change: (-change / 2).clamp(max=0).exp(),
}


def distance_from_invariance():
    """Exact draws after three transitions: how far the share within |w| < 1 is from its exact value, in errors."""
    start = {"w": oracles.quartic_draws(20000, generator(3))}
    run = many(quartic, start, 3, step=1.4, leapfrogs=2)
    assert acceptance(run).rate.mean() > 0
    within = (run[-1].params["w"].abs() < 1).double()
    return abs(float((within.mean() - oracles.QUARTIC_WITHIN_1) / within.std()) * len(within) ** 0.5)


def test_the_target_is_invariant():
    """Exact draws of exp(-w^4 / 4) stay what they are, though half of the proposals are refused."""
    assert distance_from_invariance() < 3


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_accept_step_is_seen(wrong, monkeypatch):
    """The test above fails for an accept step with a fault that peers have."""
    monkeypatch.setattr(module, "accept_probability", WRONG[wrong])
    assert distance_from_invariance() > 8


def test_a_kinetic_energy_of_the_wrong_sign_is_seen(monkeypatch):
    """H = E - |p|^2 / 2, which the lineage's code has."""
    monkeypatch.setattr(module, "kinetic", lambda p, chains: -kinetic(p, chains))
    assert distance_from_invariance() > 8


def test_acceptance_by_its_formula():
    """Downhill always, uphill by exp(-change), never where the proposal is not finite."""
    change = torch.tensor([-3.0, 0.0, 1.0, 800.0, torch.inf])
    assert accept_probability(change).tolist() == pytest.approx([1, 1, 0.36787944, 0, 0])


def test_acceptance_goes_to_one_as_the_step_shrinks():
    """|change| is of second order in the step at a fixed length of the trajectory: a third of it leaves a ninth."""
    start = {"w": gaussian_draws(500)}
    changes = []
    for step, leapfrogs in ((0.6, 2), (0.2, 6), (0.2 / 3, 18)):
        (transition,) = many(gaussian, start, 1, step, leapfrogs)
        changes.append(transition.change.abs().mean().item())
    for coarse, fine in pairwise(changes):
        assert coarse / fine == pytest.approx(9, rel=0.12)
    assert acceptance([transition]).probability.mean() > 0.99


def test_leapfrog_goes_back_the_way_it_came_and_keeps_volume():
    """Reversed momentum retraces 40 steps; and the Jacobian of (theta, p) -> (theta', p') has determinant 1."""
    start = {"w": torch.tensor([0.3, 2.0], dtype=torch.float64)}
    momentum = {"w": torch.tensor([-1.1, 0.4], dtype=torch.float64)}
    there, arrived = leapfrog(quartic_of_both, start, momentum, step=0.1, leapfrogs=40)
    back, undone = leapfrog(quartic_of_both, there, {"w": -arrived["w"]}, step=0.1, leapfrogs=40)
    assert (there["w"] - start["w"]).abs().min() > 0.1
    torch.testing.assert_close(back["w"], start["w"], rtol=0, atol=1e-10)
    torch.testing.assert_close(-undone["w"], momentum["w"], rtol=0, atol=1e-10)

    def move(z):
        there, arrived = leapfrog(quartic_of_both, {"w": z[:2]}, {"w": z[2:]}, step=0.3, leapfrogs=3)
        return torch.cat([there["w"], arrived["w"]])

    z, h = torch.cat([start["w"], momentum["w"]]), 1e-5
    columns = [(move(z + h * e) - move(z - h * e)) / (2 * h) for e in torch.eye(4, dtype=torch.float64)]
    assert torch.linalg.det(torch.stack(columns)).item() == pytest.approx(1, abs=1e-6)


def quartic_of_both(params):
    """E = (x^2 + x y + y^2)^2 / 4, one chain."""
    x, y = params["w"]
    return (x * x + x * y + y * y) ** 2 / 4


def test_leapfrog_of_an_oscillator_by_hand():
    """E = w^2 / 2 at w = 1, p = 0, step .5: p = -.25, w = .875, p = -.25 - .21875; twice that as a matrix power."""
    one = leapfrog(
        lambda p: 0.5 * p["w"] ** 2, {"w": torch.tensor(1.0)}, {"w": torch.tensor(0.0)}, step=0.5, leapfrogs=1
    )
    assert one[0]["w"].item() == pytest.approx(0.875)
    assert one[1]["w"].item() == pytest.approx(-0.46875)
    # By linearity the map is [[1 - h^2/2, h], [-h + h^3/4, 1 - h^2/2]]; see test above for its determinant.
    matrix = torch.tensor([[0.875, 0.5], [-0.46875, 0.875]])
    two = leapfrog(
        lambda p: 0.5 * p["w"] ** 2, {"w": torch.tensor(1.0)}, {"w": torch.tensor(0.0)}, step=0.5, leapfrogs=2
    )
    expected = matrix @ matrix @ torch.tensor([1.0, 0.0])
    assert [two[0]["w"].item(), two[1]["w"].item()] == pytest.approx(expected.tolist())


def test_chains_side_by_side_are_those_one_by_one():
    """Three chains in the first dimension accept each for itself, and an energy () is one chain of several tensors."""
    start = {"w": gaussian_draws(3), "v": torch.zeros(3, dtype=torch.float64)}

    def both(params):
        return gaussian(params) + 0.5 * params["v"] ** 2

    run = many(both, start, 30, step=1.3)
    accepted = torch.stack([t.accepted for t in run])
    assert accepted.shape == (30, 3)
    assert accepted.any(1).ne(accepted.all(1)).any(), "chains accept together"
    for before, after in pairwise(run):
        stays = ~after.accepted
        assert torch.equal(after.params["w"][stays], before.params["w"][stays])
        assert torch.equal(after.params["v"][stays], before.params["v"][stays])
        assert (after.params["w"][after.accepted] != before.params["w"][after.accepted]).all()
    single = many(both, {"w": start["w"][0], "v": start["v"][0]}, 5, step=0.3)
    assert single[0].accepted.shape == ()
    moved = kinetic({"w": torch.tensor([3.0, 4.0]), "v": torch.tensor(2.0)}, 0)
    assert moved.item() == pytest.approx((9 + 16 + 4) / 2)
    assert kinetic({"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}, 1).tolist() == [12.5, 0.5]


def test_it_repeats_by_its_generator_and_leaves_the_start_alone():
    start = {"w": torch.ones(5, 2, dtype=torch.float64)}
    one, again, other = (many(gaussian, start, 4, 0.5, seed=seed)[-1].params["w"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(start["w"], torch.ones(5, 2, dtype=torch.float64))


def test_a_proposal_that_is_not_finite_is_refused_and_counted():
    """A step of 1e200 leaves the finite numbers: the chain stays, and says so."""
    start = {"w": gaussian_draws(4)}
    run = many(gaussian, start, 3, step=1e200)
    assert torch.equal(run[-1].params["w"], start["w"])
    result = acceptance(run)
    assert (result.proposals, result.diverged.tolist(), result.rate.tolist()) == (3, [3.0] * 4, [0.0] * 4)
    halves = acceptance(run[:1]) + acceptance(run[1:])
    assert halves.proposals == 3
    assert torch.equal(halves.diverged, result.diverged)
    with pytest.raises(ValueError, match="energy at the start"):
        many(gaussian, {"w": torch.full((2, 2), torch.nan)}, 1, 0.1)
    with pytest.raises(ValueError, match="leapfrog"):
        many(gaussian, start, 1, 0.1, leapfrogs=0)
    with pytest.raises(ValueError, match="no transition"):
        acceptance([])


def test_the_temperature_turns_the_mean_loss_into_the_sum():
    """E = U / d with d = c / m is (sum of losses + m wd / 2 |theta|^2) / c."""
    source = generator(0)
    batch = Batch(torch.randn(7, 3, generator=source), torch.tensor([0, 1, 0, 1, 1, 0, 1]))
    w = torch.randn(3, 2, generator=source)
    energy = tempered(oracles.cross_entropy_potential(lambda p, x: x @ p["w"], 0.3), batch, 0.01 / 7)
    loss = -(batch.images @ w).log_softmax(1)[torch.arange(7), batch.labels].sum()
    assert energy({"w": w}).item() == pytest.approx(((loss + 7 * 0.15 * w.square().sum()) / 0.01).item(), rel=1e-5)


def test_a_network_in_double_precision():
    """A ConvNet in float64: H changes by less than 1e-4 of a thousand nats over small steps, and half of them change it
    by less than half; in float32, whose rounding is of that size, neither can be seen."""
    network = Network(Spec("convnet-in", (1, 8, 8), 10, 4, 2))
    batch = Batch(torch.rand(6, 1, 8, 8, generator=generator(1)), torch.arange(6))
    params, batch = in_float64(network.init(generator(0)), batch)
    energy = tempered(oracles.cross_entropy_potential(network.forward, 0.01), batch, 0.01 / 6)
    assert energy(params) > 1000
    coarse, fine = (many(energy, params, 1, step, n)[0] for step, n in ((1e-5, 5), (5e-6, 10)))
    assert 1e-8 < abs(coarse.change.item()) < 1e-4
    assert abs(fine.change.item()) < 0.5 * abs(coarse.change.item())
    assert coarse.accepted
    assert {value.dtype for value in coarse.params.values()} == {torch.float64}


def linear(params, images):
    return images @ params["w"]


def hidden(params, images):
    return (images @ params["w"]).tanh() @ params["v"]


FEATURES, CLASSES, UNITS = 8, 3, 3
SHAPES = {linear: {"w": (FEATURES, CLASSES)}, hidden: {"w": (FEATURES, UNITS), "v": (UNITS, CLASSES)}}


@pytest.mark.parametrize(("forward", "steps"), [(linear, 300), pytest.param(hidden, 600, marks=pytest.mark.slow)])
def test_sghmc_agrees_with_hmc_on_digits(forward, steps):
    """Consistent SGHMC has the predictive mean and variance of HMC at temperature d, on a linear softmax and on a
    network with a hidden layer: 12 digits of 3 classes in 8 features, the probabilities of 30 other digits.

    The chains are independent and each gives one sample, so that the difference of two averages over its standard error
    is about a standard normal; its mean square over images and classes, which are correlated, was 0.4 to 2.3 for eight
    pairs of seeds. HMC at twice the temperature gives 65 to 78.
    """
    data, labels = load_digits(n_class=CLASSES, return_X_y=True)
    data = torch.tensor(data[:42]).double()
    data = (data - data.mean(0)) @ torch.randn(64, FEATURES, generator=generator(5), dtype=torch.float64) / 64
    batch, rest = Batch(data[:12], torch.tensor(labels[:12])), data[12:]
    d, chains = 0.3 / 12, 1500
    potential = torch.func.vmap(oracles.cross_entropy_potential(forward, 0.05), in_dims=(0, None))
    start = {
        name: torch.randn(chains, *shape, generator=generator(6, name), dtype=torch.float64)
        for name, shape in SHAPES[forward].items()
    }

    def predictive(params):
        p = torch.func.vmap(forward, in_dims=(0, None))(params, rest).softmax(-1)
        return p, (p - p.mean(0)).square()

    def by_hmc(temperature):
        run = many(tempered(potential, batch, temperature), start, 40, step=0.12, leapfrogs=9)
        assert 0.9 < acceptance(run[20:]).rate.mean() < 0.999
        return predictive(run[-1].params)

    variance = noise_variance("consistent", eta=0.03, alpha=0.1, d=d)
    gradient = torch.func.grad(lambda p, b: potential(p, b).sum())
    chain = sghmc(
        lambda p, b: (torch.zeros(()), gradient(p, b)), start, repeat(batch),
        eta=0.03, alpha=0.1, variance=variance, source=generator(7),
    )  # fmt: skip
    ours = predictive(next(islice(chain, steps, None)))

    def distances(others):
        """Mean square of difference / standard error, of the predictive mean and of the predictive variance."""
        return [
            float(((a.mean(0) - b.mean(0)).square() / ((a.var(0) + b.var(0)) / chains)).mean())
            for a, b in zip(ours, others, strict=True)
        ]

    assert max(distances(by_hmc(d))) < 4
    assert max(distances(by_hmc(2 * d))) > 30
