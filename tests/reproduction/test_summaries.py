"""Mean, spread and differences of a table's cells, by hand and by another library."""

import math

import pytest
from scipy import stats

from fbpc_ray.core.config import Config
from fbpc_ray.reproduction.render import markdown, score_tables
from fbpc_ray.reproduction.summaries import difference, summary
from fbpc_ray.reproduction.tables import SCALES, Request


def test_summary_by_hand():
    """Seeds 0: 10, 30 %; 1: 50, 60, 70; 2: 80. Squares of 200 about the mean of 0 and of 1, of 3 degrees of freedom;
    means 20, 60 and 80, a third of 160 on average, with squares of 5600 / 3 about it."""
    values = ((0, 0.1), (0, 0.3), (1, 0.5), (1, 0.6), (1, 0.7), (2, 0.8))
    rows = [{"distill_seed": seed, "accuracy": value, "nll": None} for seed, value in values]
    result = summary(rows, "accuracy")
    assert result is not None
    assert result.mean == pytest.approx(300 / 6)
    assert result.evaluation == pytest.approx(math.sqrt(400 / 3))
    assert result.distillation == pytest.approx(math.sqrt(5600 / 3 / 2))
    assert (result.values, result.diverged) == (6, 0)
    assert summary(rows, "nll") is None
    assert summary([*rows, {"distill_seed": 0, "accuracy": None}], "accuracy") == result._replace(diverged=1)


def test_a_quantity_that_not_all_rows_have_has_not_diverged():
    """Without --ood a row has no AUROC; a row of a chain that diverged has no accuracy either."""
    values = ((0.5, 0.8), (0.5, None), (None, None))
    rows = [{"distill_seed": 0, "accuracy": accuracy, "ood_auroc_entropy": auroc} for accuracy, auroc in values]
    result = summary(rows, "ood_auroc_entropy")
    assert result is not None and (result.mean, result.values, result.diverged) == (0.8, 1, 1)


def rows_of(name, *scores, column="ipc 1"):
    """Rows of (seed of the distillation, accuracy)."""
    return [{"row": name, "column": column, "distill_seed": s, "accuracy": a, "nll": None} for s, a in scores]


OURS = rows_of("FBPC", (0, 0.50), (0, 0.54), (1, 0.56), (2, 0.53), (4, 0.9))
THEIRS = rows_of("BPC-fKL", (0, 0.50), (1, 0.51), (2, 0.49), (2, 0.51), (3, 0.1))


def test_a_difference_is_paired_by_the_seed_of_the_distillation():
    """Means over chains, then over the seeds that both have: 2, 5 and 3 points, whose t interval scipy has too."""
    result = difference(OURS, THEIRS, "accuracy")
    assert result is not None and result.pairs == 3
    interval = stats.ttest_rel([52, 56, 53], [50, 51, 50]).confidence_interval(0.95)
    assert result[:3] == pytest.approx((10 / 3, interval.low, interval.high))
    assert difference(OURS, THEIRS, "nll") is None
    assert difference(OURS, [row for row in THEIRS if row["distill_seed"] in (0, 3)], "accuracy") is None


def test_differences_to_the_baseline_follow_the_scores():
    rows = [*THEIRS, *OURS, *rows_of("Random", (0, 0.1))]
    one, two = (line for line in score_tables(rows, ("accuracy",), baseline="FBPC") if line.startswith("|"))
    assert one.splitlines()[3] == "| FBPC | 60.6 ± 2.8 ± 18.2 |"  # squares of 8, one degree of freedom; 999, three
    assert two.splitlines()[0] == "| accuracy %, minus FBPC | ipc 1 |"
    assert two.splitlines()[2:] == ["| BPC-fKL | -3.3 (-7.1 to +0.5; 3 pairs) |", "| Random | - |"]
    for baseline in ("", "another row"):
        assert len([line for line in score_tables(rows, ("accuracy",), baseline=baseline) if line]) == 1


def test_the_legend_explains_differences_where_there_are_some():
    request = Request(SCALES["small"], {"cifar10": "digits"}, (1,), {}, Config())
    facts = {"eval_seed": 0, "commit": "c0ffee", "coreset_commit": None, "device": "cpu", "versions": "{}"}
    rows = [row | facts | {"nll": 1.0} for row in (*THEIRS, *OURS)]
    for some, expected in ((rows, True), (rows[-1:], False)):
        text = markdown("table1", "small", request, [], some, [], ())
        assert ("minus FBPC" in text) == ("paired by the seed" in text) == expected


@pytest.mark.parametrize(
    ("distillations", "chains", "expected"),
    [
        (1, 1, "One seed of the distillation, one of the evaluation. *Italics*"),
        (1, 3, "Mean over 3 seeds of the evaluation of one distillation; ± is their standard deviation. *Italics*"),
        (2, 1, "Mean over 2 distillations, each evaluated once; ± is their standard deviation. *Italics*"),
        (
            2,
            3,
            "Mean over 2 seeds of the distillation x 3 of the evaluation; the first ± is the standard deviation over ",
        ),
    ],
)
def test_the_legend_says_what_the_spread_is(distillations, chains, expected):
    request = Request(SCALES["small"], {"cifar10": "digits"}, (1,), {}, Config())
    facts = {"commit": "c0ffee", "coreset_commit": None, "device": "cpu", "versions": "{}", "nll": 1.0}
    rows = [
        row | facts | {"eval_seed": chain}
        for row in rows_of("FBPC", *((seed, 0.5) for seed in range(distillations)))
        for chain in range(chains)
    ]
    assert expected in markdown("table1", "small", request, [], rows, [], ())
