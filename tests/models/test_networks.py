"""The networks against networks written out by hand, BatchNorm's two modes and the prior pi_0."""

import math

import pytest
import torch
from support.networks import ALL, EVERY, NORMS, OTHERS, SMALL, images_for, images_of, network, random_params, source
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, max_pool2d

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.core.rng import generator
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.evaluation import chains
from fbpc_ray.execution import session, validation
from fbpc_ray.models.convnet import default_depth
from fbpc_ray.models.functional import ARCHITECTURES, Network, Spec, build, canonical, specify
from fbpc_ray.models.passes import Passes


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
        ("lenet", {}, 62_006),
        ("alexnet", {}, 1_872_202),
        ("vgg11-in", {}, 9_231_114),
        ("resnet18-in", {}, 11_173_962),
        ("resnet18-bn", {}, 11_173_962),
        ("resnet34-in", {}, 21_282_122),
    ],
)
def test_parameter_counts_are_the_papers(name, changes, count):
    """Method section 2 (P Table 7: 3.2e5). Convs 3,584 + 2 x 147,584, norms 3 x 256, head 2,048 x 10 + 10.

    None has no norms; LN has 2 x 128 x (32^2 + 16^2 + 8^2) in the place of 768; 100 classes take 204,900 in the head,
    and Tiny one block more. LeNet, AlexNet, VGG11 and the ResNets: method section 2.
    """
    net = Network(Spec(name, **(CIFAR | changes)))
    assert net.parameter_count == count
    if count < 1e6:
        assert sum(value.numel() for value in net.init(source()).values()) == count


def test_the_architectures_are_the_papers():
    """Method section 2: four families with five norms each, and two without any."""
    normed = {f"{name}-{norm}" for name in ("convnet", "vgg11", "resnet18", "resnet34") for norm in NORMS}
    assert set(ARCHITECTURES) == normed | {"lenet", "alexnet"}


def test_a_network_has_one_name():
    """A bare name means the paper's norm, IN; what is canonical stays as it is, and an import path too."""
    assert [canonical(name) for name in ("convnet", "vgg11", "resnet18", "resnet34", "lenet", "alexnet")] == [
        "convnet-in", "vgg11-in", "resnet18-in", "resnet34-in", "lenet", "alexnet"
    ]  # fmt: skip
    assert all(canonical(name) == name for name in (*ARCHITECTURES, "package.module:build"))
    bare = Network(Spec("vgg11", **SMALL))
    assert bare.spec.architecture == "vgg11-in"
    assert torch.equal(
        bare.forward(bare.init(source()), images_of()), network("vgg11-in").forward(bare.init(source()), images_of())
    )


@pytest.mark.parametrize(
    ("name", "width", "depth", "expected"),
    [
        ("convnet", 32, 0, ("convnet-in", 32, 2)),
        ("convnet-ln", 32, 1, ("convnet-ln", 32, 1)),
        ("resnet18", 32, 3, ("resnet18-in", 32, 0)),
        ("vgg11-bn", 64, 0, ("vgg11-bn", 64, 0)),
        ("alexnet", 64, 4, ("alexnet", 64, 0)),
        ("lenet", 64, 4, ("lenet", 0, 0)),
        ("nets:build", 64, 4, ("nets:build", 0, 0)),
    ],
)
def test_a_network_has_one_spec(name, width, depth, expected):
    """--depth is ConvNet's, and --width not LeNet's nor a user's own: what changes nothing makes no other experts."""
    assert specify(name, (1, 8, 8), 10, width, depth) == Spec(expected[0], (1, 8, 8), 10, *expected[1:])


def test_the_plan_uses_canonical_names_and_refuses_one_network_twice(digits):
    """In the configuration, so that files, metrics and --resume see one name, and in the networks made from it."""
    config = preset("digits").updated(architectures=("resnet18", "vgg11-bn"), width=8)
    assert validation.canonical(config).networks.architectures == ("resnet18-in", "vgg11-bn")
    assert [spec.architecture for spec in session.network_specs(config, digits)] == ["resnet18-in", "vgg11-bn"]
    for check in (validation.canonical, validation.check):
        with pytest.raises(UserError, match="resnet18-in: resnet18-in is there twice; name each network once"):
            check(config.updated(architectures=("resnet18", "resnet18-in")))
    with pytest.raises(UserError, match="8x8 are too small for lenet"):
        session.network_specs(config.updated(architectures=("lenet",)), digits)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("convnet-in", {"features.0.weight": (32, 3, 3, 3)}),
        ("vgg11-in", {"features.0.weight": (16, 3, 3, 3), "head.weight": (10, 128)}),
        ("resnet18-in", {"stem.0.weight": (16, 3, 3, 3), "head.weight": (10, 128)}),
        ("alexnet", {"features.0.weight": (32, 3, 5, 5), "head.weight": (10, 48 * 16)}),
        ("lenet", {"features.0.weight": (6, 3, 5, 5), "head.0.weight": (120, 400)}),
    ],
)
def test_width_scales_the_papers_channels(name, shapes):
    """At --width 32 a quarter of 64 or 128 first channels, of the last's 512 or 192; LeNet stays as it is."""
    params = network(name, **CIFAR | {"width": 32}).init(source())
    assert {key: tuple(params[key].shape) for key in shapes} == shapes


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


def conv_norm(values, x, norm, *, bias, **options):
    """conv, then the norm with its weight and bias, from the next of `values`."""
    x = conv2d(x, next(values), next(values) if bias else None, **options)
    if norm == "none":
        return x
    weight, shift = (p if p.ndim == 3 else p.view(-1, 1, 1) for p in (next(values), next(values)))
    return normalised(x, norm) * weight + shift


def vgg_by_hand(params, x, norm, pooled):
    """Eight convs 3x3 with ReLU; a max-pool after those numbered in `pooled`; one linear layer."""
    values = iter(params.values())
    for number in range(1, 9):
        x = conv_norm(values, x, norm, bias=True, padding=1).clamp(min=0)
        if number in pooled:
            x = max_pool2d(x, 2)
    return x.flatten(1) @ next(values).T + next(values)


def resnet_by_hand(params, x, norm, blocks, strides):
    """Stem; in each block relu(B(relu(A(x))) + x), x through a 1x1 conv and norm where a stage changes the shape."""
    values = iter(params.values())
    x = conv_norm(values, x, norm, bias=False, padding=1).clamp(min=0)
    for stage, count in enumerate(blocks):
        for index in range(count):
            stride = strides[stage] if index == 0 else 1
            y = conv_norm(values, x, norm, bias=False, padding=1, stride=stride).clamp(min=0)
            y = conv_norm(values, y, norm, bias=False, padding=1)
            if stage and index == 0:
                x = conv_norm(values, x, norm, bias=False, stride=stride)
            x = (x + y).clamp(min=0)
    return x.mean((2, 3)) @ next(values).T + next(values)


def agrees_with(by_hand, name, shape, *args):
    net = network(name, image_shape=shape)
    params, images = random_params(net, dtype=torch.float64), images_for(net, 3, dtype=torch.float64)
    logits, expected = net.forward(params, images), by_hand(params, images, *args)
    assert logits.std(0).min() > 1e-3 * logits.abs().max()  # the images count
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9 * float(logits.abs().max()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("size", "pooled"), [(32, (1, 2, 4, 6, 8)), (16, (1, 2, 4, 8)), (8, (1, 2, 8))])
def test_vgg11_is_the_network_written_out_by_hand(norm, size, pooled):
    """Five pools from 32x32 on; of smaller images a later norm still has 2x2."""
    agrees_with(vgg_by_hand, f"vgg11-{norm}", (3, size, size), norm, pooled)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("size", "strides"), [(16, (1, 2, 2, 2)), (8, (1, 2, 2, 1))])
def test_resnet18_is_the_network_written_out_by_hand(norm, size, strides):
    """Three halvings from 16x16 on; of 8x8 two, so that the last norms have 2x2."""
    agrees_with(resnet_by_hand, f"resnet18-{norm}", (3, size, size), norm, (2, 2, 2, 2), strides)


def test_resnet34_is_the_network_written_out_by_hand():
    agrees_with(resnet_by_hand, "resnet34-bn", (3, 16, 16), "bn", (3, 4, 6, 3), (1, 2, 2, 2))


@pytest.mark.parametrize(("size", "padding"), [(32, 0), (28, 2), (12, 2), (36, 0)])
def test_lenet_is_the_network_written_out_by_hand(size, padding):
    """Two convs 5x5 with max-pools, three linear layers; 28x28 is padded to 32x32."""

    def by_hand(params, x):
        values = iter(params.values())
        for pad in (padding, 0):
            x = max_pool2d(conv2d(x, next(values), next(values), padding=pad).clamp(min=0), 2)
        x = (x.flatten(1) @ next(values).T + next(values)).clamp(min=0)
        x = (x @ next(values).T + next(values)).clamp(min=0)
        return x @ next(values).T + next(values)

    agrees_with(by_hand, "lenet", (1, size, size))


@pytest.mark.parametrize("size", [32, 8])
def test_alexnet_is_the_network_written_out_by_hand(size):
    """5x5 - pool - 5x5 - pool - 3x3 - 3x3 - 3x3 - pool - linear."""

    def by_hand(params, x):
        values = iter(params.values())
        for kernel, pool in ((5, True), (5, True), (3, False), (3, False), (3, True)):
            x = conv2d(x, next(values), next(values), padding=kernel // 2).clamp(min=0)
            x = max_pool2d(x, 2) if pool else x
        return x.flatten(1) @ next(values).T + next(values)

    agrees_with(by_hand, "alexnet", (3, size, size))


@pytest.mark.parametrize("name", [name for name in OTHERS if not name.endswith(("-ln", "-gn", "-none"))])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 64, 64), (3, 17, 17)])
def test_sizes_of_other_networks(name, shape):
    """MNIST's, CIFAR's, Tiny-ImageNet's, and an odd one, of one or three channels: images count."""
    net = network(name, image_shape=shape)
    logits = net.forward(net.init(source()), images_for(net, 3))
    assert logits.shape == (3, 4)
    assert (logits.std(0) > 0).all()


@pytest.mark.parametrize("family", ["vgg11", "resnet18"])
@pytest.mark.parametrize("size", [8, 9, 10, 12, 15, 16, 28, 31, 32, 64])
def test_no_norm_sees_a_single_value(family, size):
    """Instance norm makes a constant of one value, and torch raises in training: every norm has 2x2 or more."""
    module, seen = build(specify(family, (1, size, size), 4, 2, 0)), []
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(min(inputs[0].shape[2:])))
    module(images_of(2, (1, size, size)))
    assert len(seen) == {"vgg11": 8, "resnet18": 20}[family]
    assert min(seen) >= 2


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
    (found,) = torch.autograd.grad(after_a_step(u), u)
    slope = (after_a_step(images + 1e-6 * direction) - after_a_step(images - 1e-6 * direction)) / 2e-6
    assert abs(slope) > 1e-4
    torch.testing.assert_close((found * direction).sum(), slope, rtol=1e-4, atol=1e-7)


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
    found = net.predict(params, statistics, images[shuffled])
    torch.testing.assert_close(found, whole[shuffled], rtol=1e-4, atol=atol)
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
        monkeypatch.setattr(chains, "TEST_BATCH", size)
        test = DeviceDataset(images[chosen], labels[chosen], digits.mean, digits.std)
        return chains.predictive(Passes(net), samples, given, test)

    whole = losses(500, torch.arange(45))
    for size in (45, 16, 1):
        found = losses(size, order)
        torch.testing.assert_close(found.losses, whole.losses[:, order], rtol=1e-3, atol=1e-3)
        assert found.stats.correct == whole.stats.correct
        assert found.stats.nll == pytest.approx(whole.stats.nll, rel=1e-4)
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


@pytest.mark.parametrize("name", EVERY)
def test_inputs_are_left_alone_and_predictions_carry_no_gradient(name):
    """Pure functions: no argument changes in place, and only `forward` is part of a graph."""
    net = network(name)
    params, images = random_params(net), images_for(net)
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "convnet-in", "depth": 4}, ["8x8", "--depth"]),
        ({"name": "convnet-bn", "image_shape": (3, 7, 7), "depth": 3}, ["7x7", "--depth"]),
        ({"name": "convnet-none", "image_shape": (3, 8, 16)}, ["8x16", "square"]),
        ({"name": "convnet-gn", "width": 10}, ["--width", "10", "4"]),
        ({"name": "vgg11-gn", "width": 12}, ["--width", "12", "4 groups", "multiple of 8"]),
        ({"name": "resnet34-gn", "width": 12}, ["--width", "12", "4 groups", "multiple of 8"]),
        ({"name": "resnet18-in", "width": 9}, ["resnet18-in", "--width", "9", "multiple of 2"]),
        ({"name": "alexnet", "width": 9}, ["alexnet", "--width", "9", "multiple of 2"]),
        ({"name": "lenet", "image_shape": (1, 8, 8)}, ["8x8", "lenet", "12x12"]),
        ({"name": "alexnet", "image_shape": (1, 7, 7)}, ["7x7", "alexnet", "8x8"]),
        ({"name": "vgg11-bn", "image_shape": (1, 7, 7)}, ["7x7", "vgg11-bn", "8x8"]),
        ({"name": "resnet18-bn", "image_shape": (3, 4, 4)}, ["4x4", "resnet18-bn", "8x8"]),
        ({"name": "resnet18-in", "image_shape": (3, 32, 16)}, ["32x16", "square"]),
        ({"name": "lenet-bn"}, ["lenet-bn", "lenet has no norms", "give lenet"]),
        ({"name": "alexnet-in"}, ["alexnet-in", "give alexnet"]),
        ({"name": "convnet-inn"}, ["convnet-inn", "did you mean convnet-in"]),
        ({"name": "resnet"}, ["resnet", "known:", *ARCHITECTURES, "MODULE:FUNCTION"]),
        ({"name": ""}, ["known:", *ALL]),
    ],
)
def test_what_cannot_be_built_says_why_in_one_line(changes, words):
    """The cause, and the flag or the names that fix it."""
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
