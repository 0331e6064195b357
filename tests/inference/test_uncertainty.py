"""Entropies against slow loops and closed forms, and the AUROC against its definition and sklearn's."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from support import oracles

from fbpc_ray.inference.metrics import log_mixture, log_probabilities
from fbpc_ray.inference.uncertainty import Uncertainty, auroc, uncertainty_of


def some_logits(samples=5, n=40, d=6, seed=0, scale=3.0):
    return scale * torch.randn(samples, n, d, generator=torch.Generator().manual_seed(seed))


def uncertainty(logits):
    """Of logits (S, b, d)."""
    log_probs = log_probabilities(logits)
    return uncertainty_of(log_probs, log_mixture(log_probs))


def test_entropies_equal_a_slow_loop():
    """The three quantities by their definitions, in Python floats: H - E is the mutual information."""
    logits = some_logits()
    result = uncertainty(logits)
    slow = oracles.entropies_slow(logits.double().tolist())
    assert result.entropy.tolist() == pytest.approx([h for h, _ in slow], rel=1e-9)
    assert (result.entropy - result.mutual_information).tolist() == pytest.approx([e for _, e in slow], rel=1e-9)
    assert result.mutual_information.tolist() == pytest.approx([h - e for h, e in slow], rel=1e-8, abs=1e-12)
    assert result.entropy.dtype == result.mutual_information.dtype == torch.float64


def test_samples_that_agree_have_no_mutual_information():
    """Exactly 0 or its last bits, never below: whatever the logits, and however large the entropy."""
    result = uncertainty(some_logits(samples=1).expand(7, -1, -1))
    assert (result.mutual_information >= 0).all()
    assert result.mutual_information.max() < 1e-14
    assert result.entropy.max() > 0.5


def test_samples_that_are_sure_of_different_classes_disagree_about_everything():
    """d samples, each sure of its own class: E = 0 and MI = H = log d. And finite where a probability is 0."""
    result = uncertainty(1000 * torch.eye(4)[:, None, :])
    assert result.entropy.item() == pytest.approx(math.log(4))
    assert result.mutual_information.item() == pytest.approx(math.log(4))
    assert (result.entropy - result.mutual_information).item() == pytest.approx(0, abs=1e-12)


def test_uniform_samples_know_nothing_and_agree():
    result = uncertainty(torch.zeros(3, 2, 10))
    assert result.entropy.tolist() == pytest.approx([math.log(10)] * 2)
    assert result.mutual_information.tolist() == pytest.approx([0, 0], abs=1e-15)


def test_float32_logits_are_reckoned_in_float64():
    """A disagreement of 1e-4 in logits is a mutual information of 1e-9, which float32 would lose: of two samples +-e
    in a class of two at p = 1/2 it is e^2 / 8."""
    e = 2.0**-13
    result = uncertainty(torch.tensor([[[e, 0.0]], [[-e, 0.0]]]))
    assert result.mutual_information.item() == pytest.approx(e * e / 8, rel=1e-5)


def test_parts_put_together_are_the_whole():
    logits = some_logits()
    first, second = logits.split([13, 27], dim=1)
    total, parts = uncertainty(logits), uncertainty(first) + uncertainty(second)
    assert isinstance(parts, Uncertainty)
    for name in Uncertainty._fields:
        torch.testing.assert_close(getattr(parts, name), getattr(total, name))


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_counts_pairs_and_half_of_ties(levels):
    """Against all pairs, one by one, and against sklearn: with many ties, and with few."""
    source = torch.Generator().manual_seed(levels)
    inside = torch.randint(levels, (60,), generator=source).double()
    outside = torch.randint(levels, (45,), generator=source).double() + levels // 4
    result = auroc(inside, outside)
    assert result == pytest.approx(oracles.auroc_slow(inside.tolist(), outside.tolist()), rel=1e-12)
    labels = [0] * 60 + [1] * 45
    assert result == pytest.approx(roc_auc_score(labels, torch.cat([inside, outside]).numpy()), rel=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - result)


def test_auroc_at_its_ends():
    """OOD scores above in-distribution ones is 1, below is 0, all equal is 1/2; an empty side is an error."""
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, 4.0])
    assert (auroc(low, high), auroc(high, low), auroc(low[:1], low[:1])) == (1, 0, 0.5)
    for pair in ((low, high[:0]), (low[:0], high)):
        with pytest.raises(ValueError, match="must be above 0"):
            auroc(*pair)


@pytest.mark.parametrize("form", [torch.Tensor.float, torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
def test_auroc_takes_tensors_arrays_and_lists_of_any_numbers(form):
    """Two types of numbers too: 4 of 6 pairs are in order, one is a tie."""
    inside, outside = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([2.0, 5.0], dtype=torch.float64)
    assert auroc(form(inside), outside) == auroc(inside, form(outside)) == auroc(form(inside), form(outside)) == 4.5 / 6


def test_auroc_refuses_nan_and_other_shapes():
    """NaN sorts above all numbers: it would count as a high score."""
    numbers, some = [0.1, 0.2, 0.3], [math.nan, 0.5, math.nan]
    with pytest.raises(ValueError, match=r"^out_of_distribution: 2 of 3 scores are NaN; leave those images out$"):
        auroc(numbers, some)
    with pytest.raises(ValueError, match=r"^in_distribution: 2 of 3 scores are NaN"):
        auroc(torch.tensor(some), numbers)
    with pytest.raises(ValueError, match=r"^in_distribution: must be scores \(n,\), got the shape \(2, 2\)$"):
        auroc([numbers[:2], numbers[1:]], numbers)
    with pytest.raises(ValueError, match="got 3 and 0 scores: both must be above 0"):
        auroc(numbers, [])
    assert auroc(numbers, [math.inf, -math.inf]) == 0.5
