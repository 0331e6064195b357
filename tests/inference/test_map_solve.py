"""Algorithm 1's inner loop: Adam as published, the stopping rule, and an honest ending."""

from itertools import repeat

import pytest
import torch
from torch.nn.functional import cross_entropy

from fbpc_ray.core.types import Batch
from fbpc_ray.inference.map_solve import map_solve
from fbpc_ray.inference.posterior import loss_and_grad
from fbpc_ray.inference.solution import SolverStatus


def linear(params, images):
    return images.flatten(1) @ params["w"]


SEPARABLE = Batch(torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 1]))


def solve(batches=None, params=None, **settings):
    defaults = {"threshold": 0.05, "learning_rate": 0.05, "max_steps": 2000}
    return map_solve(
        loss_and_grad(linear), params or {"w": torch.zeros(4, 3)}, batches or repeat(SEPARABLE), **(defaults | settings)
    )


def test_it_stops_at_the_first_loss_at_or_below_the_threshold():
    """The returned parameters have that loss, and those of one step less have not: the current loss decides."""
    solution = solve()
    assert solution.status == SolverStatus.CONVERGED
    loss = cross_entropy(linear(solution.value, SEPARABLE.images), SEPARABLE.labels).item()
    assert loss <= 0.05
    assert solution.stats.loss == pytest.approx(loss, rel=1e-6)
    one_less = solve(max_steps=solution.stats.steps - 1)
    assert one_less.status == SolverStatus.MAX_STEPS
    assert one_less.stats.steps == solution.stats.steps - 1
    assert cross_entropy(linear(one_less.value, SEPARABLE.images), SEPARABLE.labels).item() > 0.05


def test_a_loss_equal_to_the_threshold_ends_the_solve():
    """Of 0.5, 0.25, 0.125 with gamma = 0.25: at most gamma, so the second ends it, after one step."""
    losses = iter([0.5, 0.25, 0.125])
    solution = map_solve(
        lambda params, batch: (torch.tensor(next(losses)), params), {"w": torch.zeros(4, 3)}, repeat(SEPARABLE),
        threshold=0.25, learning_rate=0.01, max_steps=100,
    )  # fmt: skip
    assert (solution.status, solution.stats.steps, solution.stats.loss) == (SolverStatus.CONVERGED, 1, 0.25)


def test_a_start_below_the_threshold_takes_no_step():
    good = {"w": 20.0 * torch.eye(3)[SEPARABLE.labels]}
    solution = solve(params=good)
    assert (solution.status, solution.stats.steps) == (SolverStatus.CONVERGED, 0)
    assert torch.equal(solution.value["w"], good["w"])


def test_steps_are_those_of_adam():
    """Kingma and Ba, algorithm 1, by hand in float64: betas .9 and .999, eps 1e-8, bias-corrected, no weight decay."""
    w = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(SEPARABLE.images.double(), SEPARABLE.labels)
    result = solve(repeat(batch), {"w": w}, threshold=0.0, max_steps=6, learning_rate=0.02).value["w"]
    first, second, x = torch.zeros_like(w), torch.zeros_like(w), batch.images.flatten(1)
    onehot = torch.eye(3, dtype=torch.float64)[batch.labels]
    for t in range(1, 7):
        gradient = x.T @ ((x @ w).softmax(1) - onehot) / 4
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        w = w - 0.02 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(result, w, rtol=1e-9, atol=1e-9)


def test_the_start_is_left_alone_and_no_gradient_flows_out():
    start = {"w": torch.zeros(4, 3)}
    solution = solve(params=start, max_steps=3, threshold=0.0)
    assert torch.equal(start["w"], torch.zeros(4, 3))
    assert not solution.value["w"].requires_grad


def test_a_loss_that_is_not_finite_ends_the_solve_and_says_so():
    bad = SEPARABLE._replace(images=SEPARABLE.images.index_fill(0, torch.tensor([1]), float("nan")))
    solution = solve(iter([SEPARABLE, SEPARABLE, bad, SEPARABLE]), threshold=0.0)
    assert (solution.status, solution.stats.steps) == (SolverStatus.NONFINITE, 2)


def test_minibatches_stop_on_the_mean_loss_of_a_whole_pass():
    """One easy minibatch at loss 0 and one at log 3: their mean is above the threshold, so neither may stop it."""
    easy, hard = Batch(torch.zeros(1, 1, 2, 2), torch.tensor([0])), SEPARABLE

    def forward(params, images):
        flat = images.flatten(1)
        return flat @ params["w"] + torch.tensor([30.0, 0.0, 0.0]) * (flat.abs().sum(1, keepdim=True) == 0)

    def alternate():
        while True:
            yield hard
            yield easy

    settings = {"threshold": 0.25, "learning_rate": 0.01, "max_steps": 400, "batches_per_pass": 2}
    solution = map_solve(loss_and_grad(forward), {"w": torch.zeros(4, 3)}, alternate(), **settings)
    assert solution.status == SolverStatus.CONVERGED
    hard_loss = cross_entropy(forward(solution.value, hard.images), hard.labels).item()
    assert (
        0.4 < hard_loss < 0.51
    )  # the mean of about .5 and 0 has reached .25; one batch alone would have stopped at once


def test_no_solve_converges_before_a_whole_pass():
    """20 batches per pass, as Tiny-ImageNet has at ipc 10: losses of 0 in the first 19 don't end the solve.

    A window that is filled beforehand, with zeros or with the first loss, would converge after the first batch. The
    20th loss, 1.2, keeps the mean of a pass at .06, above gamma, until the 39th; that of batches 21 to 40 is 0.
    """
    losses = iter([0.0] * 19 + [1.2] + [0.0] * 100)
    settings = {"threshold": 0.05, "learning_rate": 0.01, "max_steps": 100, "batches_per_pass": 20}

    def loss_of_batch(params, batch):
        return torch.tensor(next(losses)), {"w": torch.ones(4, 3)}

    solution = map_solve(loss_of_batch, {"w": torch.zeros(4, 3)}, repeat(SEPARABLE), **settings)
    assert (solution.status, solution.stats.steps) == (SolverStatus.CONVERGED, 39)
    assert solution.stats.loss == 0.0


def test_a_pass_of_low_losses_converges_at_its_last_batch():
    """19 steps, one after each of the first 19 of 20 batches; the mean is that of all 20: .04."""
    losses = iter([0.08] * 10 + [0.0] * 10)
    settings = {"threshold": 0.05, "learning_rate": 0.01, "max_steps": 100, "batches_per_pass": 20}
    solution = map_solve(
        lambda params, batch: (torch.tensor(next(losses)), params), {"w": torch.zeros(4, 3)}, repeat(SEPARABLE),
        **settings,
    )  # fmt: skip
    assert (solution.status, solution.stats.steps) == (SolverStatus.CONVERGED, 19)
    assert solution.stats.loss == pytest.approx(0.04)


def test_a_solve_that_ends_within_its_first_pass_says_the_mean_of_the_losses_it_saw():
    """Of 1, 2 and 3 with at most two steps: 2, not 6 / 20."""
    losses = iter([1.0, 2.0, 3.0])
    solution = map_solve(
        lambda params, batch: (torch.tensor(next(losses)), params), {"w": torch.zeros(4, 3)}, repeat(SEPARABLE),
        threshold=0.05, learning_rate=0.01, max_steps=2, batches_per_pass=20,
    )  # fmt: skip
    assert (solution.status, solution.stats.steps, solution.stats.loss) == (SolverStatus.MAX_STEPS, 2, 2.0)
