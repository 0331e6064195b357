"""`--inference last-layer | mse | ensemble`, and soft labels in every inference."""

from dataclasses import replace

import pytest
import torch
from support.chains import context_of

from fbpc_ray import api
from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.coreset import Coreset, balanced
from fbpc_ray.data.datasets import tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.evaluation import last_layer
from fbpc_ray.evaluation.chains import Chain, CoresetArrays, sample_chain
from fbpc_ray.evaluation.evaluate import evaluate
from fbpc_ray.evaluation.last_layer import closed_form, run_networks, targets_of, train_network
from fbpc_ray.evaluation.scoring import score
from fbpc_ray.execution.serial import Serial
from fbpc_ray.inference.metrics import scores
from fbpc_ray.models.functional import Network, specify
from fbpc_ray.models.passes import Passes

SETTINGS = Evaluation(
    inference="last-layer", net_steps=20, net_lr=0.01, net_ridge=0.05, net_precision=2.0, ensemble_size=2,
    chain_epochs=6, chain_every=3, chain_eta=0.03, num_chains=2,
)  # fmt: skip


def spec_of(digits, name: str = "convnet-in"):
    return specify(name, digits.image_shape, 10, 8, 0)


@pytest.fixture(scope="module")
def coreset(digits):
    real = DeviceDataset(*tensors(digits.train, "cpu"), digits.mean, digits.std)
    images, labels = real.batch(balanced(real.labels, 2, digits.classes, generator(0)))
    return Coreset(images, labels, digits.mean, digits.std, digits.classes)


def context(digits, coreset, settings=SETTINGS, soft_labels=None):
    chain_context = context_of(digits, "test", settings, coreset.images.numpy(), coreset.labels.numpy())
    return chain_context._replace(coresets={"x": CoresetArrays(*chain_context.coresets["x"][:2], soft_labels)})


def scored(result):
    assert result.stats is not None
    return scores(result.stats)


def probabilities(logits):
    return logits.double().softmax(-1).mean(0)


@pytest.mark.parametrize("name", ["convnet-in", "convnet-bn"])
def test_the_closed_form_is_dense_regression_on_the_trained_features(digits, coreset, name):
    """By the h x h covariance; with BatchNorm, the features of coreset and images use the coreset's statistics."""
    shared, spec = context(digits, coreset), spec_of(digits, name)
    chain, network = Chain("x", spec, 0), Network(spec)
    data = targets_of(shared, chain, "cpu")
    assert (len(data.images), data.targets.sum(1).abs().max() < 1e-5) == (40, True)
    params = train_network(network, data, SETTINGS, 0, 0)
    real = DeviceDataset(*tensors(digits.test, "cpu"), digits.mean, digits.std)
    images = real.batch(torch.arange(50)).images
    statistics = network.statistics(params, [data.images])
    phi, at = ((network.predict_features(params, statistics, x)[0] / 32**0.5).double() for x in (data.images, images))
    covariance = torch.linalg.inv(2.0 * torch.eye(32) + phi.T @ phi / (0.05 / 2.0))
    mean = at @ covariance @ phi.T @ data.targets.double() / (0.05 / 2.0)
    variance = ((at @ covariance) * at).sum(1, keepdim=True)
    expected = (mean / (1 + torch.pi / 8 * variance).sqrt()).softmax(1)
    logits = closed_form(network, params, data, SETTINGS)
    torch.testing.assert_close(probabilities(logits(images)), expected, rtol=1e-4, atol=1e-6)
    full = score(logits, real).stats
    assert scored(run_networks(shared, chain, "cpu")) == scores(full)
    assert scores(full).accuracy > 0.4


def test_no_number_depends_on_the_batches_of_the_test_set(digits, coreset, monkeypatch):
    shared, chain = context(digits, coreset), Chain("x", spec_of(digits, "convnet-bn"), 0)
    full = scored(run_networks(shared, chain, "cpu"))
    monkeypatch.setattr("fbpc_ray.evaluation.ensemble.BATCH", 70)
    assert scored(run_networks(shared, chain, "cpu")) == pytest.approx(full, rel=1e-5)


def test_training_is_gradient_descent_on_the_squared_loss_by_adam(digits, coreset):
    """By torch's optimiser, without mirror images; the seed and the member change the start."""
    settings = replace(SETTINGS, net_mirror=False, net_steps=3, net_label_scale=2.0)
    spec = spec_of(digits)
    data, network = targets_of(context(digits, coreset, settings), Chain("x", spec, 0), "cpu"), Network(spec)
    assert len(data.images) == 20
    assert data.targets[0].max() == pytest.approx(1.8)
    start = network.init(generator(1, "network", spec.architecture, 0))
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=settings.net_lr)
    for _ in range(3):
        optimizer.zero_grad()
        (0.5 * (network.forward(leaves, data.images) - data.targets).square().sum(1).mean()).backward()
        optimizer.step()
    outcome = train_network(network, data, settings, 1, 0)
    for name, value in leaves.items():
        if name.endswith("weight"):  # the biases before a norm have no gradient but rounding, whose sign Adam follows
            torch.testing.assert_close(outcome[name], value.detach(), rtol=0, atol=0.05 * settings.net_lr)
    other = train_network(network, data, settings, 1, 1)
    assert not torch.equal(other["head.weight"], outcome["head.weight"])


@pytest.mark.parametrize("soft", [False, True])
def test_a_target_scale_multiplies_all_targets_and_with_them_the_posterior_mean(digits, coreset, soft):
    """Of the same network: the mean is linear in the targets, its variance does not depend on them."""
    spec, soft_labels = spec_of(digits), torch.randn(20, 10, generator=generator(4)).numpy() if soft else None
    chain, network = Chain("x", spec, 0), Network(spec)
    one, double = (
        targets_of(context(digits, coreset, replace(SETTINGS, net_target_scale=scale), soft_labels), chain, "cpu")
        for scale in (1.0, 2.0)
    )
    assert torch.equal(double.targets, 2 * one.targets)
    params, images = train_network(network, one, SETTINGS, 0, 0), one.images[:5]
    single, twice = (closed_form(network, params, data, SETTINGS)(images) for data in (one, double))
    torch.testing.assert_close(twice, 2 * single, rtol=1e-4, atol=1e-5)


def test_a_step_takes_a_random_batch_of_a_coreset_too_large_for_one(digits, coreset):
    """Of 41 images batches of 5, each a draw without replacement; of 40, all of them."""
    settings = replace(SETTINGS, chain_full_batch=40, chain_batch_size=5, net_steps=200)
    assert set(last_layer._batches(40, settings, generator(0))) == {None}
    batches = [batch for batch in last_layer._batches(41, settings, generator(0)) if batch is not None]
    assert len(batches) == 200
    assert all(len(set(batch.tolist())) == 5 for batch in batches)
    counts = torch.cat(batches).bincount(minlength=41)
    assert counts.min() >= 8 and counts.max() <= 44  # each 200 * 5 / 41 = 24 times in the mean
    assert batches[0].tolist() != batches[1].tolist()


def test_an_ensemble_averages_the_probabilities_of_the_networks(digits, coreset):
    spec = spec_of(digits)
    one, both = (replace(SETTINGS, inference=name) for name in ("mse", "ensemble"))
    chain = Chain("x", spec, 0, keep_samples=True)
    single, pair = (run_networks(context(digits, coreset, s), chain, "cpu") for s in (one, both))
    assert [len(result.samples or []) for result in (single, pair)] == [1, 2]
    network = Network(spec)
    first, second = (params["head.weight"] for params in pair.samples or [])
    assert torch.equal(first, (single.samples or [])[0]["head.weight"])
    assert not torch.equal(first, second)
    images, labels = tensors(digits.test, "cpu")
    real = DeviceDataset(images, labels, digits.mean, digits.std).batch(torch.arange(len(labels)))
    outputs = [network.forward(params, real.images).double().softmax(1) for params in pair.samples or []]
    for result, mean in ((single, outputs[0]), (pair, sum(outputs) / 2)):
        nll = -torch.as_tensor(mean)[torch.arange(len(labels)), labels].log().mean().item()
        assert scored(result).nll == pytest.approx(nll, rel=1e-5)


def test_every_inference_scores_every_seed_and_beats_chance(digits, coreset, small):
    for inference in ("last-layer", "mse", "ensemble"):
        config = small.updated(
            architectures=("convnet-in",), num_chains=2, inference=inference, net_steps=40, net_lr=0.01
        )
        result = evaluate(
            {"x": coreset}, [spec_of(digits)], digits, "test", config, Serial("cpu", Interruption()), lambda line: None
        )
        accuracies = [score.value("accuracy") for score in result.scores]
        assert [score.seed for score in result.scores] == [0, 1]
        assert len(set(accuracies)) == 2
        assert all(value is not None and value > 0.4 for value in accuracies)


def test_a_ridge_too_small_for_float64_is_a_chain_that_diverged(digits, coreset):
    """Finite networks with a last layer of NaN: its accuracy would be the share of class 0."""
    settings = {"inference": "last-layer", "net_steps": 1, "net_ridge": 1e-20, "width": 8, "num_chains": 1}
    lines = list[str]()
    outcome = api.evaluate(coreset, digits, "convnet-in", log=lines.append, **settings)["convnet-in"]
    assert outcome.keys() == {"accuracy", "nll", "ece", "brier", "batch_nll", "mean_sample_nll"}
    assert all(values == [None] for values in outcome.values())
    assert [line for line in lines if "diverged" in line] == [
        "warning: a chain diverged (coreset on convnet-in, seed 0): lower net_lr, or raise net_ridge"
    ]


def test_from_python_the_scores_are_those_of_the_evaluation(digits, coreset):
    settings = {"inference": "last-layer", "net_steps": 5, "width": 8, "num_chains": 2}
    outcome = api.evaluate(coreset, digits, ["convnet-in", "convnet-bn"], **settings)
    config = Config().updated(architectures=("convnet-in", "convnet-bn"), **settings)
    specs = [spec_of(digits, name) for name in ("convnet-in", "convnet-bn")]
    result = evaluate({"coreset": coreset}, specs, digits, "test", config, Serial("cpu", Interruption()), print)
    assert outcome == result.to_json()["coresets"]["coreset"]
    assert len(outcome["convnet-bn"]["ece"]) == 2
    with pytest.raises(UserError, match="evaluate has no setting 'steps'"):
        api.evaluate(coreset, digits, steps=3)


@pytest.mark.parametrize("setting", [{"inference": "last-layer"}, {"net_steps": 5}, {"ensemble_size": 2}])
def test_posterior_samples_by_sghmc_alone_and_refuses_settings_of_other_inference(coreset, setting):
    with pytest.raises(UserError, match=f"posterior has no setting '{next(iter(setting))}': known: chain_epochs"):
        api.posterior(coreset, "convnet-in", **setting)


def test_a_network_that_diverges_scores_nothing_and_is_logged(digits, coreset, small):
    lines: list[str] = []
    config = small.updated(architectures=("convnet-in",), inference="mse", net_lr=1e38, num_chains=1)
    result = evaluate(
        {"x": coreset}, [spec_of(digits)], digits, "test", config, Serial("cpu", Interruption()), lines.append
    )
    assert [score.values for score in result.scores] == [None]
    (line,) = [line for line in lines if "diverged" in line]  # a slow machine logs its progress, too
    assert line.endswith(": lower --net-lr")


# ---- soft labels


def test_chains_sample_by_the_cross_entropy_of_soft_labels(digits, coreset):
    """Certain soft labels are hard labels; with others the first step of SGHMC is that of a loss written out."""
    settings = replace(
        SETTINGS, chain_epochs=1, chain_every=1, chain_d=0.0, chain_weight_decay=0.0, chain_augment=False
    )
    spec = spec_of(digits)
    certain = 200 * torch.nn.functional.one_hot(coreset.labels, 10).float().numpy()
    network = Network(spec)

    def sample(soft_labels):
        chain_context = context(digits, coreset, settings, soft_labels)
        return sample_chain(chain_context, Chain("x", spec, 0), Passes(network), "cpu")[1][0]["head.weight"]

    hard = sample(None)
    torch.testing.assert_close(sample(certain), hard, rtol=1e-5, atol=1e-7)
    soft = torch.randn(20, 10, generator=generator(5))
    params = {
        name: value.requires_grad_()
        for name, value in network.init(generator(0, "chain", spec.architecture, "init")).items()
    }
    loss = -(soft.softmax(1) * network.forward(params, coreset.images).log_softmax(1)).sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, params["head.weight"])
    expected = params["head.weight"].detach() - settings.chain_eta * gradient
    torch.testing.assert_close(sample(soft.numpy()), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(hard, expected, atol=1e-5)


def test_soft_labels_are_the_targets_of_networks(digits, coreset):
    soft = torch.randn(20, 10, generator=generator(5))
    chain_context = context(digits, coreset, SETTINGS, soft.numpy())
    data = targets_of(chain_context, Chain("x", spec_of(digits), 0), "cpu")
    assert torch.equal(data.targets, torch.cat([soft, soft]))


def test_every_member_and_seed_has_random_batches_of_its_own(digits, coreset, monkeypatch):
    """Of a coreset too large for whole batches: members of an ensemble would otherwise differ by their start alone."""
    settings = replace(SETTINGS, net_mirror=False, net_steps=3, chain_full_batch=10, chain_batch_size=5)
    spec, batches = spec_of(digits), list[bytes]()

    def step(network, state, batch, learning_rate):
        batches.append(batch.images.numpy().tobytes())
        return state

    monkeypatch.setattr(last_layer.last_layer, "train_step", step)
    data = targets_of(context(digits, coreset, settings), Chain("x", spec, 0), "cpu")
    for seed, member in ((0, 0), (0, 1), (1, 0)):
        train_network(Network(spec), data, settings, seed, member)
    assert len(set(batches)) == len(batches) == 9


@pytest.mark.parametrize("inference", ["mse", "ensemble", "last-layer"])
def test_a_saved_ensemble_predicts_as_the_networks_were_scored(digits, coreset, inference):
    """BatchNorm's statistics are those of the coreset with its mirror images, which the networks were trained on."""
    settings = replace(SETTINGS, inference=inference)
    spec, images = spec_of(digits, "convnet-bn"), digits.test.images[:50]
    shared, chain = context(digits, coreset, settings), Chain("x", spec, 0)
    predictor = last_layer.fit_networks(shared, chain, "cpu")
    assert predictor is not None
    real = DeviceDataset(*tensors(digits.test, "cpu"), digits.mean, digits.std)
    expected = probabilities(predictor.logits(real.batch(torch.arange(50)).images))
    ensemble = last_layer.gathered(Network(spec), predictor.samples, coreset, settings)
    torch.testing.assert_close(ensemble.predict(images).probabilities, expected, rtol=1e-5, atol=1e-6)
