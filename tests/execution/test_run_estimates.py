"""Seconds of a run's parts from those of its passes, by hand."""

import pytest
from support.runs import silent

from fbpc_ray.commands.planning import _chains
from fbpc_ray.core.config import Config
from fbpc_ray.execution.session import open_session
from fbpc_ray.execution.timing import Timings, estimate

TIMING = Timings(sgd_step=0, map_step=3, map_steps=0, k_step=0, chain_epoch=2, prediction=0.01)


def session_of(digits, **changes):
    settings = {"backend": "serial", "method": "vbpc", "ipc": 1, "width": 8, "num_chains": 3, "steps": 4} | changes
    return open_session(Config().updated(**settings), silent, digits)


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
