"""Chain scores: their forms in memory, in result.json, as a table and as metrics say the same."""

import math

import pytest

from fbpc_ray.evaluation import results
from fbpc_ray.evaluation.results import ChainScore


def values(accuracy: float, nll: float, **others: float) -> dict[str, float]:
    return {"accuracy": accuracy, "nll": nll, "ece": 0.1, "brier": 0.2, **others}


SCORES = [
    ChainScore("random", "convnet-in", 0, values(0.5, 1.0)),
    ChainScore("random", "convnet-in", 1, values(0.7, 2.0)),
    ChainScore("random", "lenet", 0, values(0.25, 3.0)),
    ChainScore("random", "lenet", 1, values(0.25, 3.0)),
    ChainScore("fbpc", "convnet-in", 0, values(0.9, 0.5)),
    ChainScore("fbpc", "convnet-in", 1, None),
    ChainScore("fbpc", "lenet", 0, None),
    ChainScore("fbpc", "lenet", 1, None),
]


def test_json_nests_by_coreset_architecture_and_quantity():
    nested = results.to_json(SCORES)
    assert list(nested) == ["random", "fbpc"] and list(nested["fbpc"]) == ["convnet-in", "lenet"]
    assert list(nested["fbpc"]["lenet"]) == ["accuracy", "nll", "ece", "brier"]
    assert nested["random"]["convnet-in"]["nll"] == [1.0, 2.0]
    assert nested["fbpc"]["convnet-in"]["accuracy"] == [0.9, None]
    assert nested["fbpc"]["lenet"]["brier"] == [None, None]


def test_json_and_back_is_the_same():
    assert results.from_json(results.to_json(SCORES)) == SCORES
    reordered = sorted(SCORES, key=lambda score: -score.seed)  # as chains end in any order
    assert results.to_json(reordered) == results.to_json(SCORES)


def test_all_chains_diverged_still_have_every_key():
    lost = [score._replace(values=None) for score in SCORES]
    by_quantity = results.to_json(lost)["random"]["lenet"]
    assert list(by_quantity) == ["accuracy", "nll", "ece", "brier", "batch_nll", "mean_sample_nll"]
    assert results.from_json(results.to_json(lost, ["accuracy"])) == lost


def test_what_is_not_finite_is_missing_and_old_names_are_read():
    nested = {"a": {"b": {"nll": [float("nan"), 1.0], "accuracy": [None, math.inf], "nll_of_samples": [None, 2.0]}}}
    assert results.from_json(nested) == [
        ChainScore("a", "b", 0, None),
        ChainScore("a", "b", 1, {"nll": 1.0, "mean_sample_nll": 2.0}),
    ]


@pytest.mark.parametrize("nested", [{"a": {"b": {}}}, {"a": {"b": {"nll": []}}}, {"a": {"b": {"x": [1], "y": [1, 2]}}},
                                    {"a": {"b": {"nll": ["x"]}}}, {"a": {"b": {"nll": 1}}}, {"a": []}, []])  # fmt: skip
def test_another_form_is_an_error(nested):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        results.from_json(nested)


def test_a_selection_is_by_coreset_or_architecture_or_both():
    assert [score.seed for score in results.select(SCORES, "random", "lenet")] == [0, 1]
    assert results.select(SCORES, "fbpc") == SCORES[4:]
    assert {score.coreset for score in results.select(SCORES, architecture="lenet")} == {"random", "fbpc"}
    assert results.values_of(SCORES, "accuracy") == [0.5, 0.7, 0.25, 0.25, 0.9]


def test_means_are_over_networks_and_chains_and_none_where_a_chain_diverged():
    means = results.mean_scores(results.select(SCORES, "random"))
    assert means == pytest.approx({"accuracy": 0.425, "nll": 2.25, "ece": 0.1, "brier": 0.2})
    assert results.mean_scores(results.select(SCORES, "fbpc")) == {}


def test_the_table_groups_by_network():
    """One seed has a value and no spread."""
    assert results.table(SCORES) == (
        "architecture  coreset  accuracy %    NLL             ECE             Brier\n"
        "convnet-in    random   60.0 +- 14.1  1.500 +- 0.707  0.100 +- 0.000  0.200 +- 0.000\n"
        "convnet-in    fbpc     90.0          0.500           0.100           0.200\n"
        "lenet         random   25.0 +- 0.0   3.000 +- 0.000  0.100 +- 0.000  0.200 +- 0.000\n"
        "lenet         fbpc     diverged      diverged        diverged        diverged"
    )
    ood = [score._replace(values=values(0.5, 1.0, ood_auroc_entropy=0.75)) for score in SCORES[:1]]
    assert results.table(ood).splitlines()[0].endswith("Brier  OOD entropy")
    assert results.table(ood).splitlines()[1].endswith("  0.750")


def test_metrics_are_means_of_the_chains_that_have_a_value():
    metrics = results.metrics(SCORES)
    assert metrics["test/accuracy/random/convnet-in"] == pytest.approx(0.6)
    assert metrics["test/nll/fbpc/convnet-in"] == 0.5
    assert not [name for name in metrics if name.endswith("fbpc/lenet")]
    assert len(metrics) == 12
    assert "val/ece/random/lenet" in results.metrics(SCORES, "validation")


def test_a_result_is_of_the_step_of_its_coreset():
    assert results.is_of_step({"steps": 4}, "4") and results.is_of_step({"steps": 4}, None)
    assert not results.is_of_step({"steps": 4}, "5")
