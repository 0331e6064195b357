"""Sizes chosen from data: the right values for several data sets, what bounds them, and the words of --time-budget."""

import pytest
from torch import nn

from fbpc_ray.core import sizes
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import default, preset, size_request
from fbpc_ray.core.sizes import (
    LADDER,
    LEVELS,
    Facts,
    Level,
    TrainedNetworks,
    alpha,
    choose,
    describe,
    estimate,
    rungs,
    snapshots_met,
)
from fbpc_ray.models.functional import build, specify

LAPTOP = LEVELS["laptop"]
MINE = Facts(240, 3, (3, 32, 32), 60)
"""The data set of the first run of many users: three classes of 80 small images."""


def settings(facts: Facts, level: Level = LAPTOP) -> dict[str, float]:
    return choose(facts, level).settings()


def test_a_small_data_set_on_two_cores():
    """240 images, three classes. Batches of 16 make 15 SGD steps per epoch, ten epochs 150, two of them 30; alpha is
    20 x m = 60, since the run is short; everything else is a rung of the ladder and the paper's rates."""
    assert settings(MINE) == {
        "width": 32, "expert_count": 5, "expert_epochs": 10, "expert_batch_size": 16, "expert_lr": 0.05,
        "start_epoch": 2, "steps": 100, "alpha": 60.0, "batch_size": 3, "gamma": 0.01, "map_lr": 0.001,
        "lambda_x": 0.05, "lambda_u": 0.01, "real_batch_size": 32, "num_chains": 3, "chain_epochs": 500,
        "chain_every": 50,
    }  # fmt: skip


def test_one_core_takes_a_smaller_rung():
    one, two = (settings(Facts(2000, 10, (3, 32, 32), 500, cores=cores)) for cores in (1, 2))
    assert (one["width"], one["expert_count"], one["steps"]) == (32, 3, 60)
    assert (two["width"], two["expert_count"], two["steps"]) == (32, 5, 100)


@pytest.mark.parametrize(
    "facts, expected",
    [
        # CIFAR-10 in Parquet: two epochs are 1,564 SGD steps, more than a rung asks for.
        (Facts(50000, 10, (3, 32, 32), 10000),
         {"expert_batch_size": 64, "expert_epochs": 2, "alpha": 200.0, "gamma": 0.1}),
        # 100 classes: the paper's rates for CIFAR-100, and its alpha.
        (Facts(50000, 100, (3, 32, 32), 10000),
         {"lambda_x": 0.1, "lambda_u": 0.1, "alpha": 1000.0, "batch_size": 100, "width": 16}),
        # Ten images per class: m = 30.
        (MINE._replace(ipc=10), {"batch_size": 30, "alpha": 600.0, "start_epoch": 4, "expert_epochs": 8}),
        (MINE._replace(ipc=50), {"gamma": 0.2, "batch_size": 100}),
        # 64 images a colour channel of 8x8: 1/16 of the pixels of CIFAR.
        (Facts(1437, 10, (1, 8, 8), 360), {"alpha": 10.0}),
        # Photographs: the smallest rung, and a gradient of as many images as memory holds.
        (Facts(1000, 10, (3, 224, 224), 200, ipc=10), {"width": 16, "steps": 30, "alpha": 1000.0, "batch_size": 37}),
        # A handful: batches of four, and no real batch above the images.
        (Facts(10, 2, (3, 32, 32), 4), {"expert_batch_size": 4, "real_batch_size": 10, "batch_size": 2}),
        (Facts(1, 1, (3, 32, 32), 0), {"expert_batch_size": 4, "expert_epochs": 50, "real_batch_size": 1}),
    ],
)  # fmt: skip
def test_other_data_sets(facts, expected):
    chosen = settings(facts)
    assert {name: chosen[name] for name in expected} == expected


def test_a_gpu_takes_more_and_never_more_than_the_paper():
    chosen = settings(Facts(50000, 10, (3, 32, 32), 10000), LEVELS["gpu"])
    paper = preset("cifar10-ipc1").flat()
    equal = ("width", "steps", "batch_size", "alpha", "map_lr", "expert_batch_size", "expert_lr", "lambda_x")
    assert {name: chosen[name] for name in equal} == {name: paper[name] for name in equal}
    assert all(chosen[name] <= paper[name] for name in ("expert_count", "expert_epochs", "real_batch_size"))


@pytest.mark.parametrize("images", [1, 3, 30, 240, 2000, 50000])
@pytest.mark.parametrize("classes, side", [(1, 8), (3, 32), (200, 64), (1000, 224)])
def test_every_choice_is_one_that_a_run_takes(images, classes, side):
    """Batches hold no more than there is, T leaves an epoch, and a chain gives samples."""
    for method in ("fbpc", "fbpc-isotropic", "bpc-fkl", "bpc-w", "vbpc", "frepo", "random"):
        for level in LEVELS.values():
            chosen = settings(Facts(images, classes, (3, side, side), 10, 1, method), level)
            assert chosen["chain_epochs"] // chosen["chain_every"] == 10
            assert chosen.get("real_batch_size", 1) <= images
            assert chosen.get("batch_size", 1) <= classes
            assert 1 <= chosen.get("start_epoch", 1) <= chosen.get("expert_epochs", 1) <= 50
            assert all(value > 0 for value in chosen.values())


def test_experts_have_taken_enough_steps_at_the_start_epoch():
    """At least 30 SGD steps, where half of the epochs has as many: theta_x that knows nothing teaches nothing."""
    for images in (60, 240, 1000, 2000, 20000):
        chosen = settings(Facts(images, 3, (3, 32, 32), 60))
        per_epoch = -(-images // chosen["expert_batch_size"])
        assert chosen["start_epoch"] * per_epoch >= 30
        assert per_epoch * chosen["expert_epochs"] >= 100


def test_flags_win_and_the_others_fit_them():
    values = {"width": 64, "expert_epochs": 4, "chain_epochs": 30, "steps": 7, "ipc": 1}
    chosen = settings(MINE._replace(overrides=values))
    assert not values.keys() & chosen.keys()
    assert (chosen["start_epoch"], chosen["chain_every"], chosen["map_lr"]) == (2, 3, 0.001)
    assert settings(MINE._replace(overrides={"start_epoch": 30}))["expert_epochs"] == 31
    assert settings(MINE._replace(overrides={"chain_every": 800}))["chain_epochs"] == 800


def test_methods_get_the_settings_that_they_use():
    """The weight-space baselines keep their own alpha and take theta_0 from the first half; vbpc has no experts."""
    fkl = settings(MINE._replace(method="bpc-fkl"))
    assert (fkl["start_epoch"], "alpha" in fkl, "gamma" in fkl) == (fkl["expert_epochs"] // 2, False, False)
    assert not {"expert_count", "alpha", "gamma", "start_epoch"} & settings(MINE._replace(method="vbpc")).keys()
    assert settings(MINE._replace(method="random")).keys() == {"width", "num_chains", "chain_epochs", "chain_every"}


def test_the_choice_is_the_largest_rung_that_fits():
    """A longer limit never takes a smaller rung, and the estimate of the choice is within the limit where one fits."""
    widths = []
    for seconds in (1, 60, 240, 1200, 7200, 10**6):
        chosen = choose(MINE, Level(seconds, "cpu"))
        widths.append((chosen.settings()["width"], chosen.settings()["steps"]))
        assert chosen.seconds.total <= seconds or seconds == 1
    assert widths == sorted(widths)
    assert widths[0] == (LADDER[0].width, LADDER[0].steps)
    assert widths[-1] == (LADDER[-1].width, LADDER[-1].steps)


def test_the_estimate_grows_with_what_it_counts():
    """A second core halves experts and chains of an even number; a network more doubles all of them on one core."""
    rung = LADDER[1]._replace(expert_count=4, num_chains=2)
    one, two = (estimate(MINE._replace(cores=cores), rung, "cpu") for cores in (1, 2))
    assert one.experts == pytest.approx(2 * two.experts)
    assert one.chains == pytest.approx(2 * two.chains)
    assert one.distillation == two.distillation
    both = estimate(MINE._replace(cores=1, architectures=("convnet-in", "convnet-bn")), rung, "cpu")
    assert tuple(both) == pytest.approx([2 * part for part in one])


@pytest.mark.parametrize(("shape", "width"), [((3, 32, 32), 32), ((1, 8, 8), 16), ((3, 64, 64), 64)])
def test_the_estimate_counts_the_operations_of_the_networks(shape, width):
    """Two for each multiply-accumulate of a convolution, three times: forwards, and backwards to images and weights.
    A ResNet-18 has eleven times as many and takes eleven times as long, beside a ConvNet six times on average."""
    module = build(specify("convnet-in", shape, 3, width, 0))
    sides = [shape[1] // 2**block for block in range(9)]
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    macs = sum(layer.weight.numel() * side**2 for layer, side in zip(layers, sides, strict=False))
    facts, rung = MINE._replace(image_shape=shape), LADDER[0]._replace(width=width)
    one = sizes._images(facts, rung, "cpu", 1)
    assert one == pytest.approx(shape[1] ** 2 * width * 2e-8 + 2 * 3 * macs / 6e10)
    both = facts._replace(architectures=("convnet-in", "resnet18-in"))
    assert sizes._images(both, rung, "cpu", 10) == pytest.approx(10 * 6 * one)


@pytest.mark.parametrize(("ipc", "m", "map_steps"), [(1, 3, 80), (4, 12, 40)])
def test_the_parts_of_a_distillation_of_fbpc(ipc, m, map_steps):
    """60 steps of Adam steps, 30 SGD steps and 20 passes of Eq. 17 on the m images; and 30 passes of 32 real images for
    each snapshot that is met, of 3 experts and their epochs 2 to 8. From ten images on, a MAP solve ends earlier."""
    facts, rung = MINE._replace(ipc=ipc), LADDER[1]
    u, real = (sizes._pass(facts, rung, "cpu", images) for images in (m, 32))
    expected = 60 * (map_steps + 30 + 20) * u + 21 * (1 - (20 / 21) ** 60) * 30 * real
    assert estimate(facts, rung, "cpu").distillation == pytest.approx(expected)


def test_each_view_of_fbpc_adds_twenty_passes_of_the_coreset_to_a_step():
    rung = LADDER[1]
    one, eight = (estimate(MINE._replace(views=views), rung, "cpu").distillation for views in (1, 8))
    assert eight - one == pytest.approx(60 * 7 * 20 * sizes._pass(MINE, rung, "cpu", 3))
    weights = MINE._replace(method="bpc-w")
    assert estimate(weights._replace(views=8), rung, "cpu") == estimate(weights, rung, "cpu")


def test_draws_of_a_step_cost_a_gradient_each_and_share_the_cores():
    """Four draws are four times the gradients, but no more snapshots of real images than there are: 21 of fbpc."""
    rung, four = LADDER[1], MINE._replace(cores=1, draws=4)
    u, real = (sizes._pass(MINE, rung, "cpu", images) for images in (3, 32))
    expected = 240 * (80 + 30 + 20) * u + 21 * (1 - (20 / 21) ** 240) * 30 * real
    assert estimate(four, rung, "cpu").distillation == pytest.approx(expected)
    assert estimate(four._replace(cores=2), rung, "cpu").distillation == pytest.approx(expected / 2)
    vbpc = MINE._replace(method="vbpc", cores=1)
    one, three = (estimate(vbpc._replace(draws=draws), rung, "cpu").distillation for draws in (1, 3))
    assert three == pytest.approx(3 * one)


def test_a_core_without_an_expert_or_a_chain_of_its_own_saves_nothing():
    """On two cores three experts take as long as four; on four cores two chains, of a coreset each, as long as four."""
    rung = LADDER[1]._replace(expert_count=3, num_chains=1)
    two, four = (MINE._replace(cores=cores) for cores in (2, 4))
    assert estimate(two, rung, "cpu").experts == estimate(two, rung._replace(expert_count=4), "cpu").experts
    assert estimate(four, rung, "cpu").chains == estimate(four, rung._replace(num_chains=2), "cpu").chains
    assert estimate(four, rung, "cpu").chains < estimate(four, rung._replace(num_chains=3), "cpu").chains
    many = [estimate(MINE._replace(cores=cores), rung._replace(expert_count=16), "cpu") for cores in (8, 64)]
    assert many[0] == many[1], "more than 8 cores count as 8"


def test_a_trained_network_predicts_once_and_a_chain_for_each_sample():
    """A pass of 6 images costs p, one of 3 images q, a prediction of the test images t: 50 steps and one prediction of
    each of 2 networks, or 300 epochs and a prediction after every 20 of them."""
    facts, rung = MINE._replace(cores=1), LADDER[1]._replace(num_chains=1)
    p, q = (sizes._pass(facts, rung, "cpu", images) for images in (6, 3))
    t = sizes._images(facts, rung, "cpu", facts.test_images) / 3
    trained = facts._replace(trained=TrainedNetworks(networks=2, steps=50, batch=6))
    assert estimate(trained, rung, "cpu").chains == pytest.approx(2 * 2 * (50 * p + t))
    assert estimate(facts._replace(overrides={"chain_every": 20}), rung, "cpu").chains == pytest.approx(
        2 * (300 * q + 15 * t)
    )
    random = trained._replace(method="random")
    assert estimate(random, rung, "cpu") == pytest.approx((0, 0, 2 * (50 * p + t))), "there is one coreset"


def test_gradients_of_vbpc_are_computed_at_once():
    """Four networks: on two cores in half the time, on eight in a quarter."""
    facts = MINE._replace(method="vbpc", architectures=("convnet-in", "convnet-gn", "convnet-ln", "convnet-bn"))
    one, two, eight = (estimate(facts._replace(cores=n), LADDER[1], "cpu").distillation for n in (1, 2, 8))
    assert (one / two, one / eight) == pytest.approx((2, 4))


@pytest.mark.parametrize(("method", "times"), [("fbpc-isotropic", 1), ("bpc-w", 2), ("vbpc", 10), ("frepo", 10)])
def test_the_estimate_counts_the_steps_of_the_command_line(method, times):
    """A rung of 60 steps of fbpc has more of other methods; as many by --steps cost the same, half of them less."""
    facts, rung = MINE._replace(method=method), LADDER[1]
    usual = choose(facts, LAPTOP, rung)
    assert usual.settings()["steps"] == 60 * times
    seconds = []
    for steps in (60 * times, 30 * times):
        given = facts._replace(overrides={"steps": steps})
        (fitting,) = (one for one in rungs(given) if one.width == 16 and one.expert_count == 3)
        seconds.append(estimate(given, fitting, "cpu").distillation)
    assert seconds[0] == usual.seconds.distillation
    assert 0.4 < seconds[1] / seconds[0] < 0.75


def test_the_estimate_of_one_process():
    """Two cores share nothing there; on a GPU parts follow each other anyway."""
    laptop, gpu = choose(MINE, LAPTOP), choose(MINE, LEVELS["gpu"])
    assert laptop.serial == pytest.approx(
        2 * laptop.seconds.chains + 5 / 3 * laptop.seconds.experts + laptop.seconds.distillation
    )
    assert gpu.serial == gpu.seconds.total


def test_alpha_is_the_papers_from_300_steps_on():
    """10 for each image of 32x32, as Table 4's 100 for ten images; 20 in a shorter run; from 1 to 1000."""
    assert [alpha(10, 1024, steps) for steps in (30, 299, 300, 1000)] == [200, 200, 100, 100]
    assert [alpha(10, 64, 1000), alpha(1, 64, 30), alpha(200, 4096, 30)] == [6, 1, 1000]


def test_snapshots_met():
    """Of s snapshots, n draws meet s (1 - (1 - 1/s)^n): 1 of 1; 1.5 of 2 in two draws."""
    assert snapshots_met(5, 1) == 1
    assert snapshots_met(2, 2) == 1.5


def test_the_table_names_the_papers_value():
    table = describe(choose(MINE, LAPTOP), default("folder:x", None, "paper", None).flat()).splitlines()
    assert table[0].split()[:4] == ["setting", "value", "paper", "why"]
    assert next(line for line in table if line.startswith("--width ")).split()[1:3] == ["32", "128"]
    assert next(line for line in table if line.startswith("--expert-count ")).split()[1:3] == ["5", "100"]
    assert max(map(len, table)) <= 110
    assert table[-1] == ("as the paper: --gamma 0.01, --map-lr 0.001, --lambda-x 0.05, --lambda-u 0.01, --num-chains 3")


def test_which_data_has_its_sizes_chosen():
    """Data by its path or of one's own; names of Table 4 and digits keep their presets, and so does --preset paper."""
    for data in ("folder:x", "npz:x.npz", "parquet:x", "own"):
        assert size_request(data, "", "", ()) is not None
        assert size_request(data, "paper", "", ()) is None
        assert default(data, "10", "paper", None) == default(None, None, "laptop", None)
    for data in (None, "digits", "cifar10", "cifar100", "tiny-imagenet"):
        assert size_request(data, "", "", ()) is None
        assert size_request(data, "laptop", "", {"width"}) == ("laptop", {"width"}, 0.0)
        assert size_request(data, "", "20m", ()) == ("", frozenset(), 1200.0)
    assert default("cifar10", "10", "paper", None) == preset("cifar10-ipc10")
    assert default("cifar10", "10", "", None) == preset("cifar10-ipc10")
    with pytest.raises(UserError, match="--time-budget chooses all sizes, and --preset quick is given"):
        size_request("folder:x", "quick", "20m", ())
