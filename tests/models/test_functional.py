"""Networks as pure functions: forward, predictions, BatchNorm's statistics, gradients, initialisation."""

import math

import pytest
import torch
from support.networks import ALL, EVERY, NORMS, OTHERS, images_for, images_of, network, random_params, source
from support.networks_by_hand import by_hand
from torch.nn.functional import cross_entropy

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.evaluation import ensemble, scoring
from fbpc_ray.models.functional import equal_batches
from fbpc_ray.models.passes import Passes

UNROLLED = ("convnet-none", "convnet-ln", "lenet", "alexnet", "vgg11-in", "vgg11-bn", "resnet18-gn", "resnet18-bn")


@pytest.mark.parametrize("name", UNROLLED)
def test_the_gradient_of_an_unrolled_step_is_the_slope(name):
    """A weight-space method differentiates through SGD on u: second derivatives, against a central difference."""
    net = network(name, width=2 if name.startswith("vgg") else 8, **({"depth": 1} if name in ALL else {}))
    params, images = random_params(net, dtype=torch.float64), images_for(net, 4, dtype=torch.float64)
    labels, direction = torch.arange(4), images_for(net, 4, seed=7, dtype=torch.float64)

    def after_a_step(u):
        leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
        loss = cross_entropy(net.forward(leaves, u), labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        moved = {key: value - 0.1 * g for (key, value), g in zip(leaves.items(), gradients, strict=True)}
        return cross_entropy(net.forward(moved, images), labels)

    u = images.clone().requires_grad_()
    (result,) = torch.autograd.grad(after_a_step(u), u)
    slope = (after_a_step(images + 1e-6 * direction) - after_a_step(images - 1e-6 * direction)) / 2e-6
    assert abs(slope) > 1e-4
    torch.testing.assert_close((result * direction).sum(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_forward_equals_the_module_in_training_mode(name):
    """What distillation computes is what the experts' training computed, to the bit."""
    net = network(name)
    module, images = net.module(source(3)), images_for(net)
    params = {key: value.detach().clone() for key, value in module.named_parameters()}
    assert module.training
    assert torch.equal(net.forward(params, images), module(images))


@pytest.mark.parametrize("norm", NORMS)
def test_instance_norm_is_per_image_and_channel(norm):
    """conv(s x) + b = s conv(x) + b, and taking the mean and std of each image's channel takes b and s away.

    So the contrast of each image counts for nothing, in IN alone: in the others b is shared over channels or images.
    """
    net = network(f"convnet-{norm}")
    params, images = random_params(net), images_of()
    contrast = torch.tensor([1.0, 2.0, 3.0, 5.0, 10.0, 20.0]).view(-1, 1, 1, 1)
    difference = (net.forward(params, contrast * images) - net.forward(params, images)).abs().max()
    assert difference < 1e-2 if norm == "in" else difference > 0.03


@pytest.mark.parametrize("name", EVERY)
def test_only_batchnorm_sees_its_companions_in_forward(name):
    """Batch statistics throughout distillation: an image's logits change with its batch for BN alone."""
    net = network(name)
    params, images = random_params(net), images_for(net)
    together, fewer = net.forward(params, images)[:2], net.forward(params, images[:2])
    difference = (together - fewer).abs().max() / together.abs().max().clamp(min=1)
    assert difference > 0.05 if name.endswith("-bn") else difference < 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_predict_takes_each_image_on_its_own(name):
    """Neither companions, nor their order, nor the size of the batch change a prediction."""
    net = network(name)
    params, images = random_params(net), images_for(net, 9)
    statistics = net.statistics(params, [images_for(net, 7, seed=5)])
    whole = net.predict(params, statistics, images)
    atol = 1e-5 * max(1.0, float(whole.abs().max()))
    shuffled = torch.tensor([4, 8, 0, 2, 7, 1, 6, 3, 5])
    result = net.predict(params, statistics, images[shuffled])
    torch.testing.assert_close(result, whole[shuffled], rtol=1e-4, atol=atol)
    alone = torch.cat([net.predict(params, statistics, image[None]) for image in images])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", ["convnet-bn", "resnet18-bn", "vgg11-bn"])
def test_an_evaluation_depends_on_neither_order_nor_size_of_the_test_batches(name, digits, monkeypatch):
    """Statistics of each posterior sample from the pseudocoreset: the same losses, image by image, in any batches."""
    net = network(name, image_shape=(1, 8, 8), classes=10)
    samples, coreset_images = [random_params(net, seed) for seed in (0, 1)], images_of(20, (1, 8, 8))
    images, labels = torch.tensor(digits.test.images[:45]), torch.tensor(digits.test.labels[:45])
    order = torch.randperm(45, generator=source())

    def losses(size, chosen, given=coreset_images):
        monkeypatch.setattr(ensemble, "BATCH", size)
        test = DeviceDataset(images[chosen], labels[chosen], digits.mean, digits.std)
        return scoring.score(scoring.average_of(Passes(net), samples, given), test)

    whole = losses(500, torch.arange(45))
    for size in (45, 16, 1):
        result = losses(size, order)
        torch.testing.assert_close(result.losses, whole.losses[:, order], rtol=1e-3, atol=1e-3)
        assert result.stats.correct == whole.stats.correct
        assert result.stats.nll == pytest.approx(whole.stats.nll, rel=1e-4)
    other = losses(500, torch.arange(45), images_of(20, (1, 8, 8), seed=9))
    assert (other.losses - whole.losses).abs().max() > 0.05  # the statistics are the pseudocoreset's


@pytest.mark.parametrize("name", [name for name in EVERY if not name.endswith("-bn")])
def test_without_batchnorm_there_are_no_statistics_and_predict_is_forward(name):
    """Only BatchNorm has two modes."""
    net = network(name)
    params, images = random_params(net), images_for(net)
    statistics = net.statistics(params, [images])
    assert statistics == {}
    assert torch.equal(net.predict(params, statistics, images), net.forward(params, images))


def layer_statistics(statistics):
    """[(mean, variance)] by layer."""
    names = [name.removesuffix(".running_mean") for name in statistics if name.endswith("running_mean")]
    return [(statistics[f"{name}.running_mean"], statistics[f"{name}.running_var"]) for name in names]


def test_statistics_are_the_mean_and_unbiased_variance_of_what_enters_each_batchnorm():
    """By hand, layer after layer, over batch, rows and columns; PyTorch's running variance divides by n - 1."""
    net = network("convnet-bn")
    params, images, seen = random_params(net), images_of(), []
    by_hand(params, images, "bn", seen)
    result = layer_statistics(net.statistics(params, [images]))
    assert len(result) == len(seen) == 2
    for (mean, variance), features in zip(result, seen, strict=True):
        flat = features.transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean, flat.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, flat.var(1, unbiased=True), rtol=1e-4, atol=1e-5)


def test_statistics_of_several_batches_are_averaged_with_equal_weight():
    """Mean over the batches, not the exponential average that would favour the last (momentum 0.1)."""
    net = network("convnet-bn")
    params, batches = random_params(net), [images_of(5, seed=seed) for seed in range(3)]
    each = [layer_statistics(net.statistics(params, [batch])) for batch in batches]
    result = layer_statistics(net.statistics(params, iter(batches)))
    for layer in range(2):
        for kind in range(2):
            expected = torch.stack([one[layer][kind] for one in each]).mean(0)
            torch.testing.assert_close(result[layer][kind], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [7, 256, 258, 600])
def test_statistics_of_a_large_sorted_coreset_are_those_of_all_its_images(count):
    """258 images, the last two unlike the others: batches of 256 and 2, weighed equally, would take their mean for half
    of all. Of the first layer, by hand over all images."""
    net = network("convnet-bn")
    params, images = random_params(net), images_of(count)
    images[-2:] += 20
    images[: count // 2] -= 1
    seen = []
    by_hand(params, images, "bn", seen)
    flat = seen[0].transpose(0, 1).flatten(1)
    (statistics,) = ensemble.statistics_of(net, [params], images)
    mean, variance = layer_statistics(statistics)[0]
    torch.testing.assert_close(mean, flat.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(variance, flat.var(1), rtol=2e-2, atol=1e-4)


def test_equal_batches_hold_every_image_once():
    for count, sizes in ((1, [1]), (256, [256]), (257, [129, 128]), (1000, [250] * 4)):
        batches = equal_batches(torch.arange(count))
        assert [len(batch) for batch in batches] == sizes
        assert torch.equal(torch.cat(batches).sort().values, torch.arange(count))


def test_predict_normalises_with_the_statistics_given():
    """By hand with mean and variance of the coreset in the place of the batch's."""
    net = network("convnet-bn")
    params, images = random_params(net), images_of()
    statistics = net.statistics(params, [images_of(7, seed=5)])
    expected = by_hand(params, images, "bn", stats=layer_statistics(statistics))
    torch.testing.assert_close(net.predict(params, statistics, images), expected, rtol=1e-3, atol=1e-4)
    assert (net.forward(params, images) - expected).abs().max() > 0.05


def test_calls_leave_no_state_behind():
    """forward, statistics and predict of some parameters change nothing for others, in whatever order they come."""
    net, other = network("convnet-bn"), network("convnet-bn")
    params, images = random_params(net), images_of()
    statistics = net.statistics(params, [images])
    prediction, logits = net.predict(params, statistics, images), net.forward(params, images)
    copies = {name: value.clone() for name, value in statistics.items()}
    net.statistics(random_params(net, seed=9), [3 * images_of(4, seed=8) + 1])
    net.forward(random_params(net, seed=9), 5 * images)
    assert all(torch.equal(statistics[name], copies[name]) for name in copies)
    assert torch.equal(net.predict(params, statistics, images), prediction)
    assert torch.equal(net.forward(params, images), logits)
    again = net.statistics(params, [images])
    fresh = other.statistics(params, [images])
    assert all(torch.equal(again[name], copies[name]) and torch.equal(fresh[name], copies[name]) for name in copies)


def test_statistics_that_fail_leave_predict_as_it_was():
    """A bad batch (one channel too few) in the middle raises; predictions made after it still see no companions."""
    net = network("convnet-bn")
    params, images = random_params(net), images_of()
    statistics = net.statistics(params, [images])
    prediction = net.predict(params, statistics, images[:2])
    with pytest.raises(RuntimeError):
        net.statistics(params, [images, images[:, :1]])
    assert torch.equal(net.predict(params, statistics, images[:2]), prediction)


def test_predict_never_falls_back_on_the_statistics_of_an_earlier_call():
    """Without statistics, or with half of them, a BatchNorm network answers with an error, also after an estimate."""
    net = network("convnet-bn")
    params, images = random_params(net), images_of()
    statistics = net.statistics(params, [5 * images + 2])
    for missing in ({}, dict(list(statistics.items())[:2])):
        with pytest.raises(ValueError, match="convnet-bn"):
            net.predict(params, missing, images)


@pytest.mark.parametrize("name", EVERY)
def test_inputs_are_left_alone_and_predictions_carry_no_gradient(name):
    """Pure functions: no argument changes in place, and only `forward` is part of a graph."""
    net = network(name)
    params, images = random_params(net), images_for(net)
    copies, kept_images = {n: v.clone() for n, v in params.items()}, images.clone()
    leaves = {n: v.requires_grad_() for n, v in params.items()}
    statistics = net.statistics(leaves, [images])
    assert not net.predict(leaves, statistics, images.clone().requires_grad_()).requires_grad
    net.forward(leaves, images)
    assert all(torch.equal(params[n], copies[n]) for n in copies)
    assert torch.equal(images, kept_images)
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_flows_to_images_and_to_every_parameter(norm):
    """Equal to the gradient through the network written out by hand: BatchNorm's passes through its statistics."""
    net = network(f"convnet-{norm}")
    params = {n: v.requires_grad_() for n, v in random_params(net, dtype=torch.float64).items()}
    images, weights = images_of(dtype=torch.float64).requires_grad_(), images_of(6, (4,), 7, torch.float64)
    leaves = [images, *params.values()]
    result = torch.autograd.grad((net.forward(params, images) * weights).sum(), leaves)
    expected = torch.autograd.grad((by_hand(params, images, norm) * weights).sum(), leaves)
    for actual, want in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-7, atol=1e-7)
    assert result[0].abs().max() > 1e-3


NORMED_LAYERS = {"convnet": 2, "vgg11": 8, "resnet18": 20, "resnet34": 36}


@pytest.mark.parametrize("name", EVERY)
def test_init_is_torchs_default_and_a_function_of_the_generator(name):
    """pi_0: U(+-1/sqrt(fan in)) for weights and biases of conv and linear (std = bound / sqrt 3), norms at 1 and 0."""
    small = {"width": 16} if name in OTHERS else {"width": 64}
    net = network(name, image_shape=(3, 16, 16), depth=2, classes=20, **small)
    before = torch.random.get_rng_state()
    first, same, other = net.init(source(0)), net.init(source(0)), net.init(source(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for n, value in first.items():
        assert torch.equal(value, same[n])
        assert not value.requires_grad
        if value.ndim in (2, 4):
            bound, count = 1 / math.sqrt(value[0].numel()), value.numel()
            assert (1 - 10 / count) * bound < value.abs().max() <= bound  # e^-10 that a true one fails
            assert not torch.equal(value, other[n])
            assert abs(value.std().item() / (bound / math.sqrt(3)) - 1) < 4 / math.sqrt(count)
            assert abs(value.mean()) < 4 * bound / math.sqrt(3 * count)
            if (bias := first.get(n.replace("weight", "bias"))) is not None:
                assert (0.8 if len(bias) > 15 else 0.3) * bound < bias.abs().max() <= bound
                assert not torch.equal(bias, other[n.replace("weight", "bias")])
    constant = {n: value.unique().tolist() for n, value in first.items() if value.unique().numel() == 1}
    norms = 0 if name in ("lenet", "alexnet") or name.endswith("none") else NORMED_LAYERS[name.split("-")[0]]
    assert sorted(constant.values()) == norms * [[0.0]] + norms * [[1.0]]
    assert all((value == [1.0]) == n.endswith("weight") for n, value in constant.items())


def test_two_draws_of_one_generator_differ():
    """theta_u is fresh at every step."""
    net, one = network(), source()
    first, second = net.init(one), net.init(one)
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_init_is_the_module_of_the_same_generator_and_owns_its_memory():
    """`init` and the experts' `module` draw from one prior; changing one draw in place changes no other."""
    net = network("convnet-bn")
    params, module = net.init(source(4)), net.module(source(4))
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert all(torch.equal(params[name], value) for name, value in module.named_parameters())
    copies = {name: value.clone() for name, value in params.items()}
    with torch.no_grad():
        for value in net.init(source(5)).values():
            value.fill_(7)
    again = net.init(source(4))
    assert all(torch.equal(again[name], copies[name]) and torch.equal(params[name], copies[name]) for name in copies)


def test_making_a_network_leaves_the_global_generator_alone():
    """Randomness is an argument: a worker's networks don't shift anybody's draws."""
    before = torch.random.get_rng_state()
    network("convnet-bn").module(generator(0, "m"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", EVERY)
def test_parameters_of_a_snapshot_drops_the_buffers(name):
    """An expert's state has BatchNorm's running statistics; theta_x has parameters alone, in the network's order."""
    net = network(name)
    state = {key: value.clone() for key, value in net.module(source(6)).state_dict().items()}
    assert any("running" in key for key in state) == name.endswith("-bn")
    params = net.parameters_of(state)
    assert list(params) == list(net.init(source()))
    assert all(torch.equal(params[key], state[key]) for key in params)
    assert net.forward(params, images_for(net)).shape == (6, 4)


def test_experts_of_another_network_are_refused():
    """A user's network may have changed since its experts were made: in a name, or in a shape."""
    net = network("vgg11-in")
    state = dict(net.module(source()).state_dict())
    for other in (dict(list(state.items())[1:]), {**state, "head.bias": torch.zeros(5)}):
        with pytest.raises(UserError, match=r"experts of vgg11-in .* give another --experts folder"):
            net.parameters_of(other)
