"""The driver's part of a step: rates, sums over draws and architectures, updates, averages, refusals."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.methods.common import (
    Gradient,
    GradientStats,
    draw_expert,
)
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import (
    GradientTask,
    State,
    average_images,
    check_gradients,
    check_state,
    combine,
    coreset_images,
    gradient_tasks,
    image_rate,
    update,
)
from fbpc_ray.distillation.worker import METHODS
from fbpc_ray.execution import used_settings

STATS = GradientStats(loss=1.0, map_status="converged", map_loss=0.5)


def test_alpha_decays_with_the_inverse_root_of_the_steps():
    settings = replace(Config().distillation, alpha=100.0, alpha_decay=8)
    assert [image_rate(settings, step) for step in (0, 8, 24)] == pytest.approx([100, 100 / math.sqrt(2), 50])
    assert image_rate(replace(settings, alpha_decay=0), 24) == 100.0


def test_the_average_of_images_is_a_mean_at_first_and_exponential_then(tmp_path):
    """Decay .75: means of the first 4 steps, 1, 1.5, 2, 2.5, then 2.5 + (5 - 2.5) / 4; decay 1: the mean of all."""
    zero = torch.zeros(1, 1, 1, 1)
    for decay, expected in ((0.75, [1, 1.5, 2, 2.5, 3.125]), (1.0, [1, 1.5, 2, 2.5, 3])):
        before, averages = State(0, zero, zero, 0.0), []
        for step in range(1, 6):
            before = average_images(State(step, zero + step, zero, 0.0), before, decay)
            averages.append(coreset_images(before).item())
        assert averages == expected
        assert before.images.item() == 5
    run = RunDirectory(tmp_path)
    run.save(before, [])  # a resume goes on with the average, to the bit
    restored, _ = run.restore(torch.zeros(1), (1, 1, 1)) or (None, None)
    assert restored is not None and torch.equal(coreset_images(restored), coreset_images(before))
    state = State(1, zero, zero, 0.0)
    assert average_images(state, state, 0.0) is state
    assert coreset_images(state) is state.images


def test_the_learned_inner_rate_follows_its_gradient():
    """By hand: rate 0.1, gradients 2 + 3, learning rate 0.01, momentum 0.5: 0.1 - 0.05 = 0.05, then -0.025."""
    state = State(0, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0.1)
    parts = [Gradient(torch.zeros(1, 1, 1, 1), STATS, value) for value in (2.0, 3.0)]
    state = update(state, parts, alpha=1.0, momentum=0.5, inner_alpha=0.01)
    assert (state.inner_lr, state.inner_velocity) == (pytest.approx(0.05), 5.0)
    check_state(state)
    state = update(state, parts, alpha=1.0, momentum=0.5, inner_alpha=0.01)
    assert (state.inner_lr, state.inner_velocity) == (pytest.approx(-0.025), 7.5)
    with pytest.raises(UserError, match="--inner-alpha"):
        check_state(state)


def test_theta_x_is_drawn_uniformly_from_experts_and_epochs():
    """Of 3,000 draws from two experts and epochs 2..4, each of the six snapshots gets 500, give or take 4 sigma."""
    drawn = Counter(draw_expert(2, range(2, 5), generator(0, "step", step)) for step in range(3000))
    assert set(drawn) == {(expert, epoch) for expert in (0, 1) for epoch in (2, 3, 4)}
    assert max(abs(count - 500) for count in drawn.values()) < 4 * math.sqrt(500)


def test_update_is_momentum_sgd_on_the_sum_in_order():
    """By hand: v1 = g, u1 = u0 - alpha g; v2 = mu v1 + g, u2 = u1 - alpha v2, with g = g_a + g_b."""
    a, b, u = torch.full((2, 1, 1, 1), 0.25), torch.full((2, 1, 1, 1), 1.0), torch.zeros(2, 1, 1, 1)
    state = State(0, u, torch.zeros_like(u), 0.01)
    gradients = [Gradient(a, STATS), Gradient(b, STATS)]
    state = update(state, gradients, alpha=2.0, momentum=0.5, inner_alpha=0.0)
    assert (state.step, state.images[0].item(), state.velocity[0].item()) == (1, -2.5, 1.25)
    state = update(state, gradients, alpha=2.0, momentum=0.5, inner_alpha=0.0)
    assert (state.step, state.images[0].item(), state.velocity[0].item()) == (2, -6.25, 1.875)
    assert u.abs().sum() == 0


def test_units_are_the_draws_of_each_architecture_in_turn():
    assert gradient_tasks(2, 3) == [
        GradientTask(0, 0),
        GradientTask(0, 1),
        GradientTask(0, 2),
        GradientTask(1, 0),
        GradientTask(1, 1),
        GradientTask(1, 2),
    ]


def combined(*values: float | None, architectures: int, draws: int = 1) -> list[tuple[float, float]]:
    """(gradient, that of the inner learning rate: ten times as large) of each architecture that is left."""
    gradients = [None if v is None else Gradient(torch.full((1, 1, 1, 1), v), STATS, 10 * v) for v in values]
    return [
        (gradient.value.item(), gradient.inner_lr)
        for gradient in combine(gradient_tasks(architectures, draws), gradients)
    ]


def test_draws_are_averaged_and_architectures_kept_apart():
    """By hand: (1 + 2 + 6) / 3 and (10 + 20 + 0) / 3; one that is skipped leaves the mean of the other two."""
    assert combined(1, 2, 6, 10, 20, 0, architectures=2, draws=3) == [(3.0, 30.0), (10.0, 100.0)]
    assert combined(1, None, 6, 10, 20, 0, architectures=2, draws=3) == [(3.5, 35.0), (10.0, 100.0)]


def test_the_others_stand_in_for_an_architecture_that_is_skipped():
    """By hand: of three architectures two are there, so each counts 3 / 2: the sum still estimates the sum of three."""
    assert combined(2, None, 4, architectures=3) == [(3.0, 30.0), (6.0, 60.0)]
    with pytest.raises(ValueError, match="at least one"):
        combined(None, None, architectures=2)


def test_a_single_draw_of_each_architecture_keeps_its_bits():
    value = torch.randn(3, 1, 2, 2, generator=generator(0, "bits")) * 1e-30  # scaling would round the subnormal ones
    (result,) = combine(gradient_tasks(1, 1), [Gradient(value, STATS)])
    assert torch.equal(result.value, value)


def test_metrics_of_a_step_average_over_draws_and_sum_over_architectures():
    """By hand: losses 1 and 3 of one architecture, 10 of the other, one draw skipped: 2 + 10."""
    draws = (("a", 1.0, 4, "converged"), ("a", 3.0, 6, "max_steps"), ("b", 10.0, 7, "converged"))
    rows = [
        {
            "step": 3, "architecture": name, "draw": 0, "val_nll": 9.0, "seconds_step": 0.5,
            **GradientStats(loss, map_steps=steps, map_status=status).row(),
        }
        for name, loss, steps, status in draws
    ]  # fmt: skip
    expected = {
        "loss/a": 2.0, "loss/b": 10.0, "map_steps/a": 5.0, "map_steps/b": 7.0, "map_converged/a": 0.5,
        "map_converged/b": 1.0, "loss": 12.0, "seconds/step": 0.5,
    }  # fmt: skip
    assert loop.metrics_of_rows(rows) == expected
    assert loop.metrics_of_rows([row | {"map_lr": None} for row in rows]) == expected, "as read from Parquet"
    step = loop.Step(State(3, torch.zeros(1), torch.zeros(1), 0.01), [], 1, 0.5, rows)
    assert step.metrics() == {**expected, "skipped": 1.0}
    assert step._replace(skipped=0).metrics() == expected


def test_sum_follows_the_order_of_the_architectures():
    """Float addition is not associative: (1e8 + 1) - 1e8 = 0 in float32, while (1e8 - 1e8) + 1 = 1."""
    one = [torch.full((1, 1, 1, 1), value) for value in (1e8, 1.0, -1e8)]
    state = State(0, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0.01)

    def moved(order):
        return update(
            state, [Gradient(one[i], STATS) for i in order], alpha=1.0, momentum=0.0, inner_alpha=0.0
        ).images.item()

    assert (moved([0, 1, 2]), moved([0, 2, 1])) == (0.0, -1.0)


@pytest.mark.parametrize(
    "ending, value", [("nonfinite", 0.0), ("converged", float("nan")), ("converged", float("inf"))]
)
def test_what_is_not_finite_is_refused_by_name(ending, value):
    bad = Gradient(torch.full((1, 1, 1, 1), value), replace(STATS, map_status=ending))
    good = Gradient(torch.zeros(1, 1, 1, 1), STATS)
    check_gradients(["a"], [good], 0, "fbpc")
    with pytest.raises(UserError, match=r"step 7 on b .*--alpha"):
        check_gradients(["a", "b"], [good, bad], 6, "fbpc")


@pytest.mark.parametrize("method", METHODS)
def test_the_rates_to_lower_are_those_of_the_method(method):
    bad = Gradient(torch.full((1, 1, 1, 1), float("nan")), GradientStats(0.0))
    with pytest.raises(UserError, match="lower --") as caught:
        check_gradients(["a"], [bad], 0, method)
    named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", str(caught.value))}
    config = Config().updated(method=method)
    rates = ("alpha", "lambda_x", "lambda_u", "inner_lr", "image_lr", "label_lr", "ridge")
    assert named == {name for name in rates if used_settings.uses(config, name)}
