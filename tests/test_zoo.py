"""ConvNet and its norms against a network written out by hand, BatchNorm's two modes, and the prior pi_0."""

import math

import pytest
import torch
from torch.nn.functional import avg_pool2d, conv2d

from fbpc_ray.errors import UserError
from fbpc_ray.rng import generator
from fbpc_ray.vision.convnet import default_depth
from fbpc_ray.vision.zoo import ARCHITECTURES, Network, Spec

NORMS = ("in", "gn", "ln", "bn", "none")
ALL = tuple(f"convnet-{norm}" for norm in NORMS)
SMALL = {"image_shape": (2, 8, 8), "classes": 4, "width": 8, "depth": 2}


def network(name="convnet-in", **changes):
    return Network(Spec(name, **(SMALL | changes)))


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count=6, shape=(2, 8, 8), seed=1, dtype=torch.float32):
    return torch.randn(count, *shape, generator=source(seed), dtype=dtype)


def random_params(net, seed=2, dtype=torch.float32):
    """Like the network's, but with every entry random: a weight of one or a bias of zero would hide what uses it."""
    noise = source(seed)
    return {
        name: torch.randn(value.shape, generator=noise, dtype=dtype) * 0.5 + 0.1
        for name, value in net.init(source()).items()
    }


def moments(x, axes):
    """Mean and biased variance over `axes`, kept for broadcasting."""
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


def normalised(x, norm, stats=None):
    """Each norm by its axes: IN an image's channel, GN a quarter of the channels, LN all of an image, BN the batch."""
    b, c, h, w = x.shape
    if norm == "in":
        mean, variance = moments(x, (2, 3))
    elif norm == "ln":
        mean, variance = moments(x, (1, 2, 3))
    elif norm == "gn":
        x = x.view(b, 4, c // 4, h, w)
        mean, variance = moments(x, (2, 3, 4))
    else:
        mean, variance = moments(x, (0, 2, 3)) if stats is None else (s.view(1, -1, 1, 1) for s in stats)
    return ((x - mean) / (variance + 1e-5).sqrt()).view(b, c, h, w)


def by_hand(params, x, norm, seen=None, stats=None):
    """D x (conv3x3 pad 1 - norm - ReLU - average pool 2), flatten, linear, from the parameters in their order.

    `seen` collects what enters each norm; `stats` [(mean, variance)] replaces BatchNorm's batch statistics.
    """
    values = list(params.values())
    *blocks, head_weight, head_bias = values
    size = 2 if norm == "none" else 4
    for i in range(0, len(blocks), size):
        x = conv2d(x, blocks[i], blocks[i + 1], padding=1)
        if norm != "none":
            if seen is not None:
                seen.append(x)
            weight, bias = (p if p.ndim == 3 else p.view(-1, 1, 1) for p in blocks[i + 2 : i + 4])
            x = normalised(x, norm, stats[i // 4] if stats else None) * weight + bias
        x = avg_pool2d(x.clamp(min=0), 2)
    return x.flatten(1) @ head_weight.T + head_bias


CIFAR = {"image_shape": (3, 32, 32), "classes": 10, "width": 128, "depth": 3}


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("convnet-in", {}, 320_010),
        ("convnet-gn", {}, 320_010),
        ("convnet-bn", {}, 320_010),
        ("convnet-ln", {}, 663_306),
        ("convnet-none", {}, 319_242),
        ("convnet-in", {"classes": 100}, 504_420),
        ("convnet-in", {"image_shape": (3, 64, 64), "classes": 200, "depth": 4}, 857_160),
    ],
)
def test_parameter_counts_are_the_papers(name, changes, count):
    """Method section 2 (P Table 7: 3.2e5). Convs 3,584 + 2 x 147,584, norms 3 x 256, head 2,048 x 10 + 10.

    None has no norms; LN has 2 x 128 x (32^2 + 16^2 + 8^2) in the place of 768; 100 classes take 204,900 in the head,
    and Tiny one block more.
    """
    net = Network(Spec(name, **(CIFAR | changes)))
    assert net.parameter_count == count
    assert sum(value.numel() for value in net.init(source()).values()) == count


def test_the_architectures_are_the_five_norms():
    """Method section 2, so far: ConvNet with IN, GN, LN, BN, and none."""
    assert sorted(ARCHITECTURES) == sorted(ALL)


@pytest.mark.parametrize(("size", "depth"), [(8, 2), (16, 2), (28, 3), (32, 3), (64, 4)])
def test_default_depths(size, depth):
    """3 at 32x32 and 4 at 64x64 (method section 2); 2 at 8x8 (config.py)."""
    assert default_depth(size) == depth


@pytest.mark.parametrize("norm", NORMS)
def test_forward_is_the_network_written_out_by_hand(norm):
    """In float64 and with every parameter random: axes and groups of each norm, eps, both biases, pooling, order."""
    net = network(f"convnet-{norm}")
    params, images = random_params(net, dtype=torch.float64), images_of(dtype=torch.float64)
    logits = net.forward(params, images)
    assert logits.shape == (6, 4)
    torch.testing.assert_close(logits, by_hand(params, images, norm), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 28, 28)])
def test_other_sizes(shape, norm):
    """12 = 12-6-3 and 28 = 28-14-7-3: the pool drops an odd row, and LayerNorm follows the size."""
    net = network(f"convnet-{norm}", image_shape=shape, classes=3, width=12, depth=3 if shape[1] == 28 else 2)
    params, images = random_params(net), images_of(2, shape)
    assert net.init(source())["head.weight"].shape == (3, 12 * 9)
    torch.testing.assert_close(net.forward(params, images), by_hand(params, images, norm), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_forward_equals_the_module_in_training_mode(name):
    """What distillation computes is what the experts' training computed, to the bit."""
    net = network(name)
    module, images = net.module(source(3)), images_of()
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


@pytest.mark.parametrize("name", ALL)
def test_only_batchnorm_sees_its_companions_in_forward(name):
    """Batch statistics throughout distillation: an image's logits change with its batch for BN alone."""
    net = network(name)
    params, images = random_params(net), images_of()
    together, fewer = net.forward(params, images)[:2], net.forward(params, images[:2])
    difference = (together - fewer).abs().max()
    assert difference > 0.05 if name == "convnet-bn" else difference < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_predict_takes_each_image_on_its_own(name):
    """Neither companions, nor their order, nor the size of the batch change a prediction."""
    net = network(name)
    params, images = random_params(net), images_of(9)
    statistics = net.statistics(params, [images_of(7, seed=5)])
    whole = net.predict(params, statistics, images)
    shuffled = torch.tensor([4, 8, 0, 2, 7, 1, 6, 3, 5])
    torch.testing.assert_close(net.predict(params, statistics, images[shuffled]), whole[shuffled])
    alone = torch.cat([net.predict(params, statistics, image[None]) for image in images])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if name != "convnet-bn"])
def test_without_batchnorm_there_are_no_statistics_and_predict_is_forward(name):
    """Only BatchNorm has two modes."""
    net = network(name)
    params, images = random_params(net), images_of()
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
    found = layer_statistics(net.statistics(params, [images]))
    assert len(found) == len(seen) == 2
    for (mean, variance), features in zip(found, seen, strict=True):
        flat = features.transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean, flat.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, flat.var(1, unbiased=True), rtol=1e-4, atol=1e-5)


def test_statistics_of_several_batches_are_averaged_with_equal_weight():
    """Mean over the batches, not the exponential average that would favour the last (momentum 0.1)."""
    net = network("convnet-bn")
    params, batches = random_params(net), [images_of(5, seed=seed) for seed in range(3)]
    each = [layer_statistics(net.statistics(params, [batch])) for batch in batches]
    found = layer_statistics(net.statistics(params, iter(batches)))
    for layer in range(2):
        for kind in range(2):
            expected = torch.stack([one[layer][kind] for one in each]).mean(0)
            torch.testing.assert_close(found[layer][kind], expected, rtol=1e-4, atol=1e-5)


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
    kept = {name: value.clone() for name, value in statistics.items()}
    net.statistics(random_params(net, seed=9), [3 * images_of(4, seed=8) + 1])
    net.forward(random_params(net, seed=9), 5 * images)
    assert all(torch.equal(statistics[name], kept[name]) for name in kept)
    assert torch.equal(net.predict(params, statistics, images), prediction)
    assert torch.equal(net.forward(params, images), logits)
    again = net.statistics(params, [images])
    fresh = other.statistics(params, [images])
    assert all(torch.equal(again[name], kept[name]) and torch.equal(fresh[name], kept[name]) for name in kept)


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


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_left_alone_and_predictions_carry_no_gradient(name):
    """Pure functions: no argument changes in place, and only `forward` is part of a graph."""
    net = network(name)
    params, images = random_params(net), images_of()
    kept, kept_images = {n: v.clone() for n, v in params.items()}, images.clone()
    leaves = {n: v.requires_grad_() for n, v in params.items()}
    statistics = net.statistics(leaves, [images])
    assert not net.predict(leaves, statistics, images.clone().requires_grad_()).requires_grad
    net.forward(leaves, images)
    assert all(torch.equal(params[n], kept[n]) for n in kept)
    assert torch.equal(images, kept_images)
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_flows_to_images_and_to_every_parameter(norm):
    """Equal to the gradient through the network written out by hand: BatchNorm's passes through its statistics."""
    net = network(f"convnet-{norm}")
    params = {n: v.requires_grad_() for n, v in random_params(net, dtype=torch.float64).items()}
    images, weights = images_of(dtype=torch.float64).requires_grad_(), images_of(6, (4,), 7, torch.float64)
    leaves = [images, *params.values()]
    found = torch.autograd.grad((net.forward(params, images) * weights).sum(), leaves)
    expected = torch.autograd.grad((by_hand(params, images, norm) * weights).sum(), leaves)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    assert found[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_init_is_torchs_default_and_a_function_of_the_generator(name):
    """pi_0: U(+-1/sqrt(fan in)) for weights and biases of conv and linear (std = bound / sqrt 3), norms at 1 and 0."""
    net = network(name, image_shape=(3, 16, 16), width=64, depth=2, classes=20)
    before = torch.random.get_rng_state()
    first, same, other = net.init(source(0)), net.init(source(0)), net.init(source(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for n, value in first.items():
        assert torch.equal(value, same[n])
        assert not value.requires_grad
        if value.ndim in (2, 4):
            bound = 1 / math.sqrt(value[0].numel())
            for key, close_to_the_bound in ((n, 0.99), (n.replace("weight", "bias"), 0.8)):
                assert close_to_the_bound * bound < first[key].abs().max() <= bound
                assert not torch.equal(first[key], other[key])
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert abs(value.mean()) < 4 * bound / math.sqrt(3 * value.numel())
    constant = {n: value.unique().tolist() for n, value in first.items() if value.unique().numel() == 1}
    assert sorted(constant.values()) == ([] if name == "convnet-none" else [[0.0], [0.0], [1.0], [1.0]])
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
    kept = {name: value.clone() for name, value in params.items()}
    with torch.no_grad():
        for value in net.init(source(5)).values():
            value.fill_(7)
    again = net.init(source(4))
    assert all(torch.equal(again[name], kept[name]) and torch.equal(params[name], kept[name]) for name in kept)


def test_making_a_network_leaves_the_global_generator_alone():
    """Randomness is an argument: a worker's networks don't shift anybody's draws."""
    before = torch.random.get_rng_state()
    network("convnet-bn").module(generator(0, "m"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ALL)
def test_parameters_of_a_snapshot_drops_the_buffers(name):
    """An expert's state has BatchNorm's running statistics; theta_x has parameters alone, in the network's order."""
    net = network(name)
    state = {key: value.clone() for key, value in net.module(source(6)).state_dict().items()}
    assert any("running" in key for key in state) == (name == "convnet-bn")
    params = net.parameters_of(state)
    assert list(params) == list(net.init(source()))
    assert all(torch.equal(params[key], state[key]) for key in params)
    assert net.forward(params, images_of()).shape == (6, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "convnet-in", "depth": 4}, ["8x8", "--depth"]),
        ({"name": "convnet-bn", "image_shape": (3, 7, 7), "depth": 3}, ["7x7", "--depth"]),
        ({"name": "convnet-none", "image_shape": (3, 8, 16)}, ["8x16", "square"]),
        ({"name": "convnet-gn", "width": 10}, ["--width", "10", "4"]),
        ({"name": "convnet-inn"}, ["convnet-inn", "did you mean convnet-in"]),
        ({"name": "resnet"}, ["resnet", "known:", *ALL]),
        ({"name": ""}, ["known:", *ALL]),
    ],
)
def test_what_cannot_be_built_says_why_in_one_line(changes, words):
    """The cause, and the flag or the names that mend it."""
    with pytest.raises(UserError) as caught:
        network(**changes)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ALL)
def test_the_smallest_image_that_fits_works(name):
    """8x8 at depth 3 ends at 1x1 with 2x2 before the last norm: still every image has a finite and varied output."""
    net = network(name, depth=3)
    out = net.forward(net.init(source()), images_of())
    assert torch.isfinite(out).all()
    assert (out.std(0) > 0).all()
