"""DSA as method.md section 3 states it: each operation against a slow loop, then ranges, draws and gradients."""

import math

import numpy as np
import pytest
import torch
from support.augmentations_by_hand import SLOW
from torch.nn.functional import affine_grid, grid_sample

from fbpc_ray.data import augment
from fbpc_ray.data.augment import AUGMENTATIONS, Draw, apply, draw, dsa

SIX = tuple(SLOW)
ALMOST_ONE = 1 - 2.0**-24  # the largest float32 below 1


def images_of(count=5, channels=3, height=8, width=8, dtype=torch.float32, seed=0):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniforms(count=5, seed=1):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 16), (2, 9, 14), (3, 7, 7)])
@pytest.mark.parametrize("name", SIX)
def test_each_operation_equals_its_slow_loop(name, shape):
    """Image by image and pixel by pixel in numpy float64, at random parameters and at both ends of their range."""
    c, h, w = shape
    uniform = torch.cat([uniforms(8), torch.tensor([[0.0, 0.0, 0.0], [ALMOST_ONE] * 3, [0.0, ALMOST_ONE, 0.0]])])
    images = images_of(len(uniform), c, h, w)
    result = apply(Draw(name, uniform), images)
    for image, u, out in zip(images.double().numpy(), uniform.double().numpy(), result, strict=True):
        np.testing.assert_allclose(out.numpy(), SLOW[name](image.copy(), u), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 14)])
def test_bilinear_sampling_is_that_of_torch(height, width):
    """Values and gradient, with positions on pixels, between them, at the edge, and outside."""
    positions = torch.rand(5, height, width, 2, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    positions[0] = affine_grid(torch.eye(2, 3)[None], [1, 3, height, width], align_corners=False)[0]
    cotangent = images_of(5, 3, height, width, seed=2)

    def value_and_gradient(function):
        images = images_of(5, 3, height, width).requires_grad_()
        value = function(images)
        return value.detach(), torch.autograd.grad(value, images, cotangent)[0]

    ours = value_and_gradient(lambda images: augment.sample_bilinear(images, positions))
    torch.testing.assert_close(
        ours, value_and_gradient(lambda images: grid_sample(images, positions, align_corners=False))
    )


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_a_linear_ramp_is_warped_exactly(name):
    """Bilinear reading of f(x, y) = (x, y) is f itself: near the middle the output is the matrix times the position."""
    size, u = 16, uniforms(50)
    axis = torch.arange(size) + 0.5 - size / 2
    ramp = torch.stack([axis.expand(size, size), axis[:, None].expand(size, size)]).expand(50, 2, size, size)
    x, y = (apply(Draw(name, u), ramp)[:, k, 9, 10] for k in range(2))  # there the position is (2.5, 1.5)
    if name == "scale":
        low, span = 1 / 1.2, 1.2 - 1 / 1.2
        torch.testing.assert_close(x / 2.5, low + span * u[:, 0])
        torch.testing.assert_close(y / 1.5, low + span * u[:, 1])
    else:
        torch.testing.assert_close(x**2 + y**2, torch.full((50,), 2.5**2 + 1.5**2))  # a rotation keeps lengths
        turned = torch.rad2deg(torch.atan2(y, x) - math.atan2(1.5, 2.5))
        torch.testing.assert_close(turned, 30 * u[:, 0] - 15, rtol=1e-4, atol=1e-3)


def measured(name, u):
    """{parameter: its value} for each row of `u`, read off what the operation does to chosen images."""
    n, size = len(u), 16
    if name == "color":  # grey checks (equal in both channels) tell contrast, opposite channels saturation x contrast
        checks = (torch.arange(size)[:, None] + torch.arange(size)) % 2 * 2.0 - 1
        grey = apply(Draw(name, u), checks.expand(n, 2, size, size))
        opposite = apply(Draw(name, u), torch.tensor([1.0, -1.0])[:, None, None].expand(n, 2, size, size))
        contrast = (grey[:, 0, 0, 1] - grey[:, 0, 0, 0]) / 2
        saturation = (opposite[:, 0, 0, 0] - opposite[:, 1, 0, 0]) / 2 / contrast
        return {"brightness": grey.mean((1, 2, 3)), "saturation": saturation, "contrast": contrast}
    if name == "crop":  # a single white pixel in the middle
        image = torch.zeros(n, 1, size, size)
        image[:, :, 8, 8] = 1
        where = apply(Draw(name, u), image).flatten(1).argmax(1)
        return {"down": where // size - 8, "right": where % size - 8}
    if name == "cutout":  # rows and columns that have a zero; fewer than 8 where it hangs over the edge
        cut = apply(Draw(name, u), torch.ones(n, 1, size, size))[:, 0] == 0
        result = {}
        for key, hit in (("top", cut.any(2)), ("left", cut.any(1))):
            first, length = hit.int().argmax(1), hit.sum(1)
            result[key] = torch.where(first > 0, first, length - 8)
        return result
    axis = torch.arange(size) + 0.5 - size / 2
    ramp = torch.stack([axis.expand(size, size), axis[:, None].expand(size, size)]).expand(n, 2, size, size)
    x, y = apply(Draw(name, u), ramp)[:, :, 8, 8].unbind(1)  # there the position is (.5, .5)
    if name == "scale":
        return {"horizontal": 2 * x, "vertical": 2 * y}
    if name == "rotate":
        return {"degrees": torch.rad2deg(torch.atan2(y, x)) - 45}
    return {"mirrored": (x < 0).float()}


RANGES = {
    "color": {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)},
    "scale": {"horizontal": (1 / 1.2, 1.2), "vertical": (1 / 1.2, 1.2)},
    "rotate": {"degrees": (-15, 15)},
}


@pytest.mark.parametrize("name", RANGES)
def test_continuous_parameters_fill_their_range_and_no_more(name):
    """Of 4,000 draws none is outside, the ends are reached to 1 %, and every tenth of the range holds a tenth."""
    values = measured(name, torch.cat([uniforms(3998), torch.zeros(1, 3), torch.full((1, 3), ALMOST_ONE)]))
    assert values.keys() == RANGES[name].keys()
    for key, (low, high) in RANGES[name].items():
        share = (values[key].double() - low) / (high - low)
        assert -1e-4 < share.min() < 0.01, key
        assert 0.99 < share.max() < 1 + 1e-4, key
        tenths = torch.histc(share, 10, 0, 1) / 4000
        assert (tenths - 0.1).abs().max() < 0.02, key  # 4 standard deviations


@pytest.mark.parametrize(("name", "low", "high"), [("crop", -2, 2), ("cutout", -4, 12)])
def test_whole_parameters_take_every_value_of_their_range_equally_often(name, low, high):
    """16 pixels: +-12.5 % are the 5 shifts -2..2; a square of side 8 with its centre in 0..16 starts in -4..12."""
    values = measured(name, torch.cat([uniforms(7998), torch.zeros(1, 3), torch.full((1, 3), ALMOST_ONE)]))
    assert len(values) == 2
    for key, result in values.items():
        number, count = result.unique(return_counts=True)
        assert number.tolist() == list(range(low, high + 1)), key
        expected = 8000 / len(number)
        assert ((count - expected).square() / expected).sum() < 40, key  # chi-square, at most 16 degrees of freedom


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_a_shift_is_at_most_an_eighth_of_the_side_and_reaches_it(size):
    """+-12.5 % of 8, 16, 32 and 64 pixels are 1, 2, 4 and 8."""
    image = torch.zeros(2, 1, size, size)
    image[:, :, size // 2, size // 2] = 1
    out = apply(Draw("crop", torch.tensor([[0.0, 0.0, 0.0], [ALMOST_ONE] * 3])), image)
    where = out.flatten(1).argmax(1)
    assert (where // size - size // 2).tolist() == [-size // 8, size // 8]
    assert (where % size - size // 2).tolist() == [-size // 8, size // 8]


def test_half_of_the_images_are_mirrored_left_and_right():
    """p = .5 for each image, left-right and never upside down."""
    mirrored = measured("flip", uniforms(4000))["mirrored"]
    assert abs(mirrored.mean() - 0.5) < 0.03
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(40, 1, 2, 2)
    result = {tuple(out.flatten().tolist()) for out in apply(Draw("flip", uniforms(40)), image)}
    assert result == {(1.0, 2.0, 3.0, 4.0), (2.0, 1.0, 4.0, 3.0)}


@pytest.mark.parametrize("name", [name for name in SIX if name not in ("flip", "rotate")])
def test_the_parameters_of_an_image_are_independent(name):
    """The two axes (and the three of color) don't share a draw: their correlation over 4,000 images is about 0."""
    values = torch.stack([value.double() for value in measured(name, uniforms(4000)).values()])
    off_diagonal = torch.corrcoef(values) - torch.eye(len(values))
    assert off_diagonal.abs().max() < 0.06  # 4 standard deviations


@pytest.mark.parametrize("name", SIX)
def test_each_image_of_a_batch_has_parameters_of_its_own(name):
    """Equal images come out different, and each as it does alone with its own row of the draw."""
    uniform = uniforms(12)
    images = images_of(1).expand(12, 3, 8, 8)
    together = apply(Draw(name, uniform), images)
    results = {tuple(out.flatten().tolist()) for out in together}
    assert len(results) >= (2 if name == "flip" else 5)
    for i in range(12):
        alone = apply(Draw(name, uniform[i : i + 1]), images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=1e-6)


def test_the_operations_are_the_six_of_the_method_and_none_is_the_identity():
    """Method section 3: six, "no identity op": each changes at least one of twelve images."""
    assert sorted(augment.OPERATIONS) == sorted(SIX)
    images = images_of(12)
    for name in SIX:
        assert not torch.equal(apply(Draw(name, uniforms(12)), images), images), name


def test_the_operation_is_drawn_uniformly():
    """6,000 draws from one generator: chi-square with 5 degrees of freedom stays below 20.5 (p = .001)."""
    source = torch.Generator().manual_seed(0)
    names = [draw(1, source).operation for _ in range(6000)]
    counts = [names.count(name) for name in SIX]
    assert sum(counts) == 6000
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 20.5


def test_the_operation_says_nothing_about_the_parameters():
    """Within each operation the parameters are uniform too: mean 1/2 in every column."""
    source = torch.Generator().manual_seed(1)
    draws = [draw(3, source) for _ in range(1200)]
    for name in SIX:
        mean = torch.cat([d.uniform for d in draws if d.operation == name]).mean(0)
        assert (mean - 0.5).abs().max() < 0.06, name  # 4.5 standard deviations at 500 images


def test_a_draw_is_a_row_of_fresh_uniforms_for_each_image():
    """(b, 3) on [0, 1), the next draw of the same generator is another one, and the global generator plays no part."""
    source, before = torch.Generator().manual_seed(0), torch.random.get_rng_state()
    first, second = draw(500, source), draw(500, source)
    assert first.uniform.shape == (500, 3)
    assert 0 <= first.uniform.min() < 0.01
    assert 0.99 < first.uniform.max() < 1
    assert first.uniform.unique().numel() > 1400
    assert not torch.equal(first.uniform, second.uniform)
    for name in SIX:
        apply(first._replace(operation=name), images_of(500))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_draw_depends_on_the_generator_alone():
    """Same seed, same draw, whatever the global generator; another seed, another draw."""
    seeds = [0, 0, 1]
    draws = []
    for seed in seeds:
        torch.rand(7)
        draws.append(draw(4, torch.Generator().manual_seed(seed)))
    assert draws[0].operation == draws[1].operation
    assert torch.equal(draws[0].uniform, draws[1].uniform)
    assert not torch.equal(draws[0].uniform, draws[2].uniform)


@pytest.mark.parametrize("name", SIX)
def test_siamese_the_same_draw_does_the_same_every_time(name):
    """Both terms of the loss see one augmentation: applying a draw twice gives the same bits, and changes no input."""
    drawn, images = Draw(name, uniforms()), images_of()
    originals = images.clone()
    assert torch.equal(apply(drawn, images), apply(drawn, images))
    assert torch.equal(images, originals)
    assert torch.equal(drawn.uniform, uniforms())


def test_dsa_is_one_draw_as_a_function():
    """`dsa` draws when it is made, not when it is called: two calls agree, and equal `apply` of the draw."""
    images = images_of(4)
    names = set()
    for seed in range(30):
        drawn = draw(4, torch.Generator().manual_seed(seed))
        names.add(drawn.operation)
        function = dsa(4, torch.Generator().manual_seed(seed))
        assert torch.equal(function(images), apply(drawn, images))
        assert torch.equal(function(images), apply(drawn, images))
    assert names == set(SIX)
    assert AUGMENTATIONS["dsa"] is dsa


@pytest.mark.parametrize("name", SIX)
def test_gradient_is_that_of_finite_differences(name):
    """gradcheck in float64 on images that are not square; the operations are affine, so it is exact."""
    images = images_of(3, 2, 5, 4, torch.float64).requires_grad_()
    uniform = torch.tensor([[0.1, 0.9, 0.3], [0.7, 0.2, 0.8], [0.95, 0.6, 0.05]])
    assert torch.autograd.gradcheck(lambda x: apply(Draw(name, uniform), x), (images,))


@pytest.mark.parametrize("name", SIX)
def test_gradient_in_float32_is_the_transpose_of_the_operation(name):
    """f(x) = A x + b: <A v, w> = <v, A^T w>, with A v = f(v) - f(0) and A^T w what autograd gives."""
    drawn, v, w = Draw(name, uniforms()), images_of(seed=2).requires_grad_(), images_of(seed=3)
    out = apply(drawn, v)
    (back,) = torch.autograd.grad(out, v, w)
    forward = (out - apply(drawn, torch.zeros_like(v))).detach()
    assert back.abs().sum() > 0
    torch.testing.assert_close((forward * w).sum(), (v.detach() * back).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SIX if name != "color"])
def test_what_comes_in_from_outside_is_zero(name):
    """Zero is the channel mean: of an image of ones every value is from 0 to 1, and moving brings zeros to the edge."""
    out = apply(Draw(name, uniforms(200)), torch.ones(200, 2, 16, 16))
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    edge = torch.cat([out[:, :, 0], out[:, :, -1], out[:, :, :, 0], out[:, :, :, -1]], 2)
    assert (edge < 0.9).any() == (name != "flip")
    assert torch.equal(apply(Draw(name, uniforms(4)), torch.zeros(4, 2, 16, 16)), torch.zeros(4, 2, 16, 16))


def test_cutout_takes_half_the_side_in_the_middle_of_the_image():
    """A square wholly inside has (side / 2)^2 pixels, a quarter of the image, in every channel; the rest is kept."""
    images = images_of(1, 3, 16, 16)
    out = apply(Draw("cutout", torch.full((1, 3), 0.5)), images)
    assert (out == 0).sum() == 3 * 64
    assert torch.equal(out[out != 0], images[out != 0])
    assert (out[:, :, 4:12, 4:12] == 0).all()


def test_a_parameter_that_rounds_up_to_one_stays_in_range():
    """In bfloat16 the largest uniform becomes 1, which is no draw: the centre is 16, and the lower right 4x4 is cut."""
    out = apply(Draw("cutout", torch.full((1, 3), ALMOST_ONE)), torch.ones(1, 1, 16, 16, dtype=torch.bfloat16))
    assert (out == 0).sum() == 16
    assert (out[:, :, 12:, 12:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SIX)
def test_shape_and_type_stay(name, dtype):
    """Batches of one, one channel, and images that are not square; no operation casts."""
    for shape in [(1, 1, 8, 8), (4, 3, 10, 6), (2, 5, 3, 17)]:
        out = apply(Draw(name, uniforms(shape[0])), images_of(*shape, dtype=dtype))
        assert out.shape == shape
        assert out.dtype == dtype
        assert torch.isfinite(out).all()


def test_none_is_the_identity_and_lets_the_gradient_through():
    """`--augment none`: the same values, a gradient of ones, and nothing drawn."""
    source = torch.Generator().manual_seed(0)
    before = source.get_state()
    images = images_of().requires_grad_()
    out = AUGMENTATIONS["none"](len(images), source)(images)
    assert torch.equal(out, images)
    (gradient,) = torch.autograd.grad(out.sum(), images)
    assert torch.equal(gradient, torch.ones_like(images))
    assert torch.equal(source.get_state(), before)
    assert set(AUGMENTATIONS) == {"dsa", "none"}
