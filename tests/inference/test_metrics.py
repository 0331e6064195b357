"""Scores against a slow loop over examples, and the invariances that sums and counts give."""

import math

import pytest
import torch
from support import oracles

from fbpc_ray.inference.metrics import (
    BINS,
    batch_nll,
    log_mixture,
    log_probabilities,
    predictive_stats,
    sample_losses,
    scores,
)


def some_predictions(samples=7, n=60, d=5, seed=0, scale=3.0):
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(samples, n, d, generator=source), torch.randint(d, (n,), generator=source)


def test_scores_equal_a_slow_loop_over_examples():
    logits, labels = some_predictions()
    result = scores(predictive_stats(log_mixture(log_probabilities(logits)), labels))._asdict()
    slow = oracles.scores_slow(logits.double().tolist(), labels.tolist(), BINS)
    assert result == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 13, 40], [59, 1]])
def test_any_partition_of_the_test_set_gives_the_same(sizes):
    logits, labels = some_predictions()
    log_probability = log_mixture(log_probabilities(logits))
    whole = scores(predictive_stats(log_probability, labels))
    parts = [predictive_stats(p, y) for p, y in zip(log_probability.split(sizes), labels.split(sizes), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert scores(total) == pytest.approx(whole, rel=1e-12)


def test_order_of_examples_and_names_of_classes_do_not_matter():
    logits, labels = some_predictions()
    source = torch.Generator().manual_seed(9)
    order, names = torch.randperm(60, generator=source), torch.randperm(5, generator=source)
    renamed = torch.empty_like(logits)
    renamed[..., names] = logits
    whole = scores(predictive_stats(log_mixture(log_probabilities(logits)), labels))
    moved = scores(predictive_stats(log_mixture(log_probabilities(renamed[:, order])), names[labels][order]))
    assert moved == pytest.approx(whole, rel=1e-9)


def test_the_samples_are_mixed_for_each_example_before_the_logarithm():
    """Two samples sure of opposite classes: the average says 1/2, so the NLL is log 2 and not the mean of 0 and 40."""
    logits = torch.tensor([[[40.0, 0.0]], [[0.0, 40.0]]])
    result = scores(predictive_stats(log_mixture(log_probabilities(logits)), torch.tensor([0])))
    assert result.nll == pytest.approx(0.693147, abs=1e-6)


def test_certain_and_right_is_perfect_certain_and_wrong_is_finite():
    right = scores(predictive_stats(torch.tensor([[0.0, -800.0]]), torch.tensor([0])))
    assert right == pytest.approx((1.0, 0.0, 0.0, 0.0))
    wrong = scores(predictive_stats(torch.tensor([[0.0, -800.0]]), torch.tensor([1])))
    assert wrong == pytest.approx((0.0, 800.0, 1.0, 2.0))


def test_uniform_predictions_have_known_scores():
    """p = 1/d: NLL log d, Brier 1 - 1/d, and ECE the gap between accuracy and 1/d."""
    labels = torch.arange(10)
    result = scores(predictive_stats(log_mixture(log_probabilities(torch.zeros(3, 10, 10))), labels))
    assert result.nll == pytest.approx(2.302585, abs=1e-6)
    assert result.brier == pytest.approx(0.9)
    assert result.ece == pytest.approx(abs(result.accuracy - 0.1), abs=1e-9)


def test_ece_keeps_the_bins_apart():
    """Half the examples sure and wrong half the time, half at p = .55 and always right: .45 of gap in both bins, of
    opposite signs, which would cancel were they one bin."""
    sure, unsure = torch.tensor([0.95, 0.05]).log(), torch.tensor([0.55, 0.45]).log()
    stats = predictive_stats(torch.stack([sure, sure, unsure, unsure]), torch.tensor([0, 1, 0, 0]))
    assert scores(stats).ece == pytest.approx(0.45)


def test_bins_are_closed_on_the_right():
    """Fifteen bins: .95 and 1 lie in (14/15, 1], .93 in the one below, and one half in (7/15, 8/15]."""
    p = torch.tensor([0.95, 1.0, 0.93, 0.5])
    stats = predictive_stats(torch.stack([p, 1 - p], 1).log(), torch.tensor([0, 0, 0, 1]))
    assert stats.bin_count.nonzero().flatten().tolist() == [7, 13, 14]
    assert stats.bin_count[[7, 13, 14]].tolist() == [1, 1, 2]


def test_a_confidence_at_the_edge_of_two_bins_counts_in_the_lower():
    """3/5 = 9/15 lies in (8/15, 9/15], the ninth bin; the next number above it in the tenth."""
    p = torch.tensor([0.6, math.nextafter(0.6, 1) + 1e-15], dtype=torch.float64)
    assert p[0].log().exp() * BINS == 9  # or the test could not tell
    stats = predictive_stats(torch.stack([p, 1 - p], 1).log(), torch.tensor([0, 0]))
    assert stats.bin_count.nonzero().flatten().tolist() == [8, 9]


def test_nothing_scored_is_an_error():
    empty = predictive_stats(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="no example"):
        scores(empty)


def test_losses_of_samples_are_their_own_nll():
    """(S, n): of each sample by itself, so that the NLL is -log mean_s exp(-loss)."""
    logits, labels = some_predictions()
    losses = sample_losses(log_probabilities(logits), labels)
    slow = [[-math.log(oracles.softmax_slow(one)[y]) for one, y in zip(s, labels.tolist(), strict=True)]
            for s in logits.double().tolist()]  # fmt: skip
    torch.testing.assert_close(losses, torch.tensor(slow, dtype=torch.float64))
    nll = math.log(len(losses)) - (-losses).logsumexp(0)
    assert nll.mean().item() == pytest.approx(
        scores(predictive_stats(log_mixture(log_probabilities(logits)), labels)).nll
    )


@pytest.mark.parametrize("size", [1, 16, 25, 60, 256])
def test_the_lineages_nll_equals_a_slow_loop(size):
    """Also where the last batch is smaller, and where one batch holds all."""
    logits, labels = some_predictions()
    losses = sample_losses(log_probabilities(logits), labels)
    assert batch_nll(losses, size) == pytest.approx(oracles.nll_of_batches_slow(losses.tolist(), size), rel=1e-10)


def test_the_lineages_nll_is_the_nll_at_size_one_and_grows_with_the_batch():
    """Averaging before mixing only adds (log-mean-exp is convex), up to the mean loss of a sample."""
    logits, labels = some_predictions(n=64)
    losses = sample_losses(log_probabilities(logits), labels)
    items = [batch_nll(losses, size) for size in (1, 2, 4, 8, 16, 32, 64)]
    assert items[0] == pytest.approx(scores(predictive_stats(log_mixture(log_probabilities(logits)), labels)).nll)
    assert items == sorted(items)
    assert items[-1] > items[0] + 0.1
    assert items[-1] < losses.mean()
    assert batch_nll(losses[:1], 16) == pytest.approx(losses[0].mean().item()), "one sample: nothing is mixed"
