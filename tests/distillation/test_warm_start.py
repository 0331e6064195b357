"""`--map-init warm`: which solutions begin where, that they are used and kept, and that nothing else changes."""

import numpy as np
import pytest
import torch
from support.runs import assert_same, run_on

from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation.methods.common import Gradient, GradientStats
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import GradientTask, State, initial_state, keep_solutions, map_start
from fbpc_ray.distillation.warm_start import slot_of, start_of, starts_from_prior, with_solutions
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.worker_group import worker_group
from fbpc_ray.reproduction.rows import coreset_key


def test_slots_are_taken_in_turn_and_begun_anew_one_after_the_other():
    """By hand, two slots, four uses: slot 0 (even steps) in its turns 0, 4, ..; slot 1, half a period on, 2, 6, .."""
    assert [slot_of(1, 0, step, 2) for step in range(3)] == ["1/0/0", "1/0/1", "1/0/0"]
    assert [step for step in range(24) if starts_from_prior(step, 2, 4)] == [0, 5, 8, 13, 16, 21]
    assert all(starts_from_prior(step, 3, 1) for step in range(9))


def test_a_solve_begins_at_what_its_slot_holds():
    value = torch.arange(3.0)
    solutions = with_solutions({}, [("0/0/1", value), ("0/0/0", None)])
    assert solutions.keys() == {"0/0/1"}
    assert start_of(solutions, 0, 0, 3, 2, 100) is value
    assert start_of(solutions, 0, 0, 5, 2, 4) is None  # used up
    assert start_of(solutions, 0, 0, 2, 2, 100) is None  # nothing there
    assert start_of(solutions, 1, 0, 3, 2, 100) is None  # another architecture's


def test_only_with_the_pool_are_solutions_kept(small):
    state = State(7, torch.zeros(1), torch.zeros(1), 0.0)
    units, result = (
        [GradientTask(0, 0), GradientTask(0, 1)],
        [Gradient(torch.zeros(1), GradientStats(0.0), solution=torch.ones(2)), None],
    )
    settings = small.updated(map_init="warm", warm_pool_size=5, warm_pool_uses=100).distillation
    after = keep_solutions(state, 7, units, result, settings)
    assert after.solutions.keys() == {"0/0/2"}
    start = map_start(after._replace(step=12), GradientTask(0, 0), settings)
    assert start is not None
    assert start.tolist() == [1, 1]
    assert map_start(after._replace(step=12), GradientTask(0, 0), small.distillation) is None
    assert keep_solutions(state, 7, units, result, small.distillation) is state


@pytest.fixture
def worker(small, digits):
    config = small.updated(map_init="warm")
    specs = session.network_specs(config, digits)
    stores = [session.expert_store(config, digits, spec) for spec in specs]
    state, labels = initial_state(digits, 1, 0)
    worker = Worker(**worker_group(config, digits, labels, specs, stores).worker._asdict(), device="cpu")
    return worker, state.images.numpy()


def test_the_solve_begins_at_the_solution_it_gets(worker):
    """At its own solution hardly a step is left, and the solution is the start; at the prior's draw, all as before."""
    worker, images = worker
    value, stats, _, solution, *_ = worker.gradient(GradientTask(0, 0), 3, images, 0.0)
    assert stats.map_steps > 5
    _, again, _, moved, *_ = worker.gradient(GradientTask(0, 0), 3, images, 0.0, start=solution)
    assert again.map_steps <= 2
    assert again.map_steps or (moved == solution).all()
    assert np.linalg.norm(moved - solution) < 0.1 * np.linalg.norm(solution)
    prior = worker.passes[0].network.init(worker._context(GradientTask(0, 0)).rng(3, "prior"))
    vector = torch.cat([value_of_prior.flatten() for value_of_prior in prior.values()]).numpy()
    result = worker.gradient(GradientTask(0, 0), 3, images, 0.0, start=vector)
    assert (result[0] == value).all()
    assert result[1].map_steps == stats.map_steps


def test_a_run_with_the_pool_takes_fewer_map_steps_and_resumes_to_the_bit(small, digits, tmp_path):
    """Two solutions, 12 steps: from the third step on warm; anew in step 9 (slot 0) and 6 (slot 1). Stopped and resumed
    in the middle, and through a checkpoint's file."""
    config = small.updated(map_init="warm", warm_pool_size=2, warm_pool_uses=4, steps=12, checkpoint_every=5)
    backend = Serial("cpu", Interruption())
    undisturbed = run_on(backend, config, digits, tmp_path / "whole")
    steps = {row["step"]: row["map_steps"] for row in undisturbed[1] if row["architecture"] == "convnet-in"}
    fresh = {1, 2, 6, 9}
    assert max(count for step, count in steps.items() if step not in fresh) < min(steps[step] for step in fresh)
    run_on(backend, config.updated(steps=5), digits, tmp_path / "part")
    run = RunDirectory(tmp_path / "part")
    _, labels = initial_state(digits, 1, 0)
    restored = run.restore(labels, digits.image_shape)
    assert restored is not None
    state, rows = restored
    assert state.solutions.keys() == {f"{architecture}/0/{slot}" for architecture in (0, 1) for slot in (0, 1)}
    rows = [{k: v for k, v in row.items() if k != "seconds_step"} for row in rows]
    assert_same(run_on(backend, config, digits, tmp_path / "rest", state=state, rows=rows), undisturbed)
    other = run_on(backend, config.updated(map_init="prior"), digits, tmp_path / "fresh")
    assert not torch.equal(other[0], undisturbed[0])


def test_results_that_know_no_pool_keep_their_keys(small):
    assert coreset_key(small.updated(warm_pool_size=3, warm_pool_uses=5)) == coreset_key(small)
    pooled = small.updated(map_init="warm")
    assert coreset_key(pooled) != coreset_key(small)
    assert coreset_key(pooled.updated(warm_pool_size=3)) != coreset_key(pooled)
