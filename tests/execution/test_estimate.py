"""Seconds of the parts of a run from the seconds of its passes, by hand."""

import pytest
from support.runs import silent

from fbpc_ray.core.config import Config
from fbpc_ray.execution.session import open_session
from fbpc_ray.execution.timing import Timings, estimate, snapshots_met

PASSES = Timings(sgd_step=1e-3, map_step=2e-3, map_steps=10, k_step=4e-3, chain_epoch=5e-3, prediction=1e-5)


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


def test_without_a_cache_each_step_takes_its_own_steps_on_real_images(config, digits):
    more = 2 * (4 - SNAPSHOTS) * 4 * 4e-3
    assert seconds(config.updated(trajectory_cache_gb=0.0), digits).distillation == pytest.approx(DISTILLATION + more)


def test_ray_shares_experts_and_chains_between_the_cores_and_gradients_between_the_networks(config, digits):
    ray = config.updated(backend="ray")
    assert seconds(ray, digits, cores=4) == pytest.approx((EXPERTS / 4, DISTILLATION / 2, 2 * CHAIN))
    assert seconds(ray, digits, "cuda", cores=4) == pytest.approx((EXPERTS, DISTILLATION, 8 * CHAIN)), "a GPU is one"


def test_random_images_are_evaluated_alone(config, digits):
    assert seconds(config.updated(method="random"), digits) == pytest.approx((0, 0, 4 * CHAIN))


def test_experts_that_are_there_take_no_time(small, digits):
    assert seconds(small, digits).experts == 0


def test_a_network_of_squared_loss_predicts_the_test_images_once(config, digits):
    """Each of its steps also takes the mirror images."""
    networks = config.updated(inference="last-layer", net_steps=30)
    assert seconds(networks, digits).chains == pytest.approx(8 * (30 * 2 * 5e-3 + 360 * 1e-5))
    plain = networks.updated(net_mirror=False)
    assert seconds(plain, digits).chains == pytest.approx(8 * (30 * 5e-3 + 360 * 1e-5))


def test_snapshots_before_an_epoch_are_those_from_the_first():
    """Of 5 experts, epochs 0, 1 and 2 of those before 3; epochs 3 to 6 of those from it."""
    config = Config().updated(expert_count=5, expert_epochs=6, start_epoch=3, steps=2)
    for rule, count in (("before", 15), ("from", 20)):
        met = snapshots_met(config.updated(start_rule=rule))
        assert met == pytest.approx(1 + (count - 1) / count), "the second draw is another one in all cases but one"
