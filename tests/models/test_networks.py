"""Networks by name: sizes, names, and each architecture against one written out by hand."""

import pytest
import torch
from support.networks import ALL, NORMS, OTHERS, SMALL, images_for, images_of, network, random_params, source
from support.networks_by_hand import by_hand, normalised
from torch import nn
from torch.nn.functional import conv2d, max_pool2d

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.execution import session, validation
from fbpc_ray.models.convnet import default_depth
from fbpc_ray.models.functional import ARCHITECTURES, Network, Spec, build, canonical, specify

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
        with pytest.raises(UserError, match="resnet18-in: resnet18-in is given twice; name each network once"):
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
