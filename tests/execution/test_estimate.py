"""Seconds of the parts of a run from the seconds of its passes, by hand."""

import pytest
from support.runs import silent

from fbpc_ray.commands.planning import _chains
from fbpc_ray.core.config import Config
from fbpc_ray.execution.session import open_session
from fbpc_ray.execution.timing import Timings, estimate, snapshots_met

PASSES = Timings(sgd_step=1e-3, map_step=2e-3, map_steps=10, k_step=4e-3, chain_epoch=5e-3, prediction=1e-5)
TIMING = Timings(sgd_step=0, map_step=3, map_steps=0, k_step=0, chain_epoch=2, prediction=0.01)


def session_of(digits, **changes):
    settings = {"backend": "serial", "method": "vbpc", "ipc": 1, "width": 8, "num_chains": 3, "steps": 4} | changes
    return open_session(Config().updated(**settings), silent, digits)


def seconds(config: Config, digits, device: str = "cpu", cores: int = 2):
    session = open_session(config, silent, digits)
    return estimate(session, [PASSES] * len(session.specs), device, cores)


@pytest.fixture
def config(small, tmp_path) -> Config:
    """Two networks; two experts of each are missing, of 3 epochs of 15 SGD steps: 1,437 digits in batches of 100."""
    return small.updated(experts=str(tmp_path), expert_batch_size=100, backend="serial", trajectory_cache_gb=1.0)


EXPERTS = 2 * 2 * 3 * 15 * 1e-3
SNAPSHOTS = 6 * (1 - (5 / 6) ** 4)
"""Of 2 experts and the epochs 1, 2 and 3, that 4 steps meet."""
DISTILLATION = 2 * (4 * (10 + 1.7 * 4 + 3) * 2e-3 + SNAPSHOTS * 4 * 4e-3)
CHAIN = 20 * 5e-3 + 2 * 360 * 1e-5
"""20 epochs, and 2 samples that predict 360 images."""


def test_one_part_after_the_other_on_one_process(config, digits):
    """Two chains of each network, on the coreset and on random images."""
    assert seconds(config, digits) == pytest.approx((EXPERTS, DISTILLATION, 2 * 2 * 2 * CHAIN))


def test_ray_shares_experts_and_chains_between_the_cores_and_gradients_between_the_networks(config, digits):
    ray = config.updated(backend="ray")
    assert seconds(ray, digits, cores=4) == pytest.approx((EXPERTS / 4, DISTILLATION / 2, 2 * CHAIN))
    assert seconds(ray, digits, "cuda", cores=4) == pytest.approx((EXPERTS, DISTILLATION, 8 * CHAIN)), "a GPU is one"


def test_each_draw_of_a_step_has_a_gradient_and_a_worker_of_its_own(config, digits):
    """8 draws of snapshots in 4 steps; on Ray four gradients at once."""
    two = config.updated(draws_per_step=2)
    expected = 2 * (8 * (10 + 1.7 * 4 + 3) * 2e-3 + 6 * (1 - (5 / 6) ** 8) * 4 * 4e-3)
    assert seconds(two, digits).distillation == pytest.approx(expected)
    assert seconds(two.updated(backend="ray"), digits, cores=8).distillation == pytest.approx(expected / 4)


def test_random_images_are_evaluated_alone(config, digits):
    assert seconds(config.updated(method="random"), digits) == pytest.approx((0, 0, 4 * CHAIN))


def test_experts_that_are_there_take_no_time(small, digits):
    assert seconds(small, digits).experts == 0


def test_snapshots_before_an_epoch_are_those_from_the_first():
    """Of 5 experts, epochs 0, 1 and 2 of those before 3; epochs 3 to 6 of those from it."""
    config = Config().updated(expert_count=5, expert_epochs=6, start_epoch=3, steps=2)
    for rule, count in (("before", 15), ("from", 20)):
        met = snapshots_met(config.updated(start_rule=rule))
        assert met == pytest.approx(1 + (count - 1) / count), "the second draw is another one in all cases but one"


@pytest.mark.parametrize(
    ("changes", "a_seed", "words"),
    [
        ({"chain_epochs": 50, "chain_every": 10}, 50 * 2 + 5 * 3.6, "6 chains of 50 epochs, half"),
        ({"inference": "mse", "net_mirror": False}, 70 * 2 + 3.6, "6 trained networks (mse)"),
        ({"inference": "last-layer"}, 70 * 2 * 2 + 3.6, "6 trained networks (last-layer)"),
        ({"inference": "ensemble", "ensemble_size": 4}, 4 * (70 * 2 * 2 + 3.6), "24 trained networks (ensemble)"),
        ({"inference": "mse", "chain_full_batch": 19, "chain_batch_size": 5}, 70 * 2 / 2 + 3.6, "6 trained networks"),
    ],
)
def test_an_evaluation(digits, changes, a_seed, words):
    """Three seeds of the coreset and of random images: ten, twenty with their mirror images; 360 test images."""
    session = session_of(digits, net_steps=70, **changes)
    assert len(session.dataset.test.labels) == 360
    assert estimate(session, [TIMING], "cpu", 1).chains == pytest.approx(6 * a_seed)
    assert _chains(session).startswith(words)


@pytest.mark.parametrize(("views", "draws"), [(0, 30), (7, 30), (40, 40)])
def test_a_gradient_of_bpc_fkl_has_a_draw_for_each_view_and_sample(digits, views, draws):
    session = session_of(digits, method="bpc-fkl", mc_samples=30, views=views, syn_steps=50, start_epoch=1)
    assert estimate(session, [TIMING], "cpu", 1).distillation == pytest.approx(4 * (50 + 2 * draws) * 3)


@pytest.mark.parametrize(("gigabytes", "trajectories"), [(20.0, 6 * (1 - (5 / 6) ** 40)), (0.0, 40)])
def test_k_steps_on_real_images_are_taken_once_for_each_snapshot_in_the_cache(digits, gigabytes, trajectories):
    """40 steps draw from 2 experts x 3 epochs; without a cache each of them takes its own K steps."""
    changes = {"expert_count": 2, "expert_epochs": 3, "posterior_steps": 5, "trajectory_cache_gb": gigabytes}
    session = session_of(digits, method="fbpc", steps=40, **changes)
    only_k_steps = Timings(0, 0, 0, 7, 0, 0)
    assert estimate(session, [only_k_steps], "cpu", 1).distillation == pytest.approx(trajectories * 5 * 7)
