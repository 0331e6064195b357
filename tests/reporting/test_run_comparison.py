"""A comparison names the better run where scores compare, and says why it does not where they don't."""

import pytest
import torch
from support.ended_runs import ended_run

from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.reporting import run_comparison
from fbpc_ray.reporting.document import Table


def test_the_better_run_is_named_with_its_distance():
    outcome = run_comparison.conclusion(
        [ended_run("A", [0.5, 0.52]), ended_run("B", [0.7, 0.72], method="bpc-fkl", alpha=1.0)]
    )
    assert outcome == (
        "On a: best accuracy % B (BPC-fKL) 71.0 ± 1.4, before A (FBPC) 51.0 ± 1.4; "
        "best NLL B (BPC-fKL) 0.290 ± 0.014, before A (FBPC) 0.490 ± 0.014. "
        "As many random real images as those of B: 25.0 % accuracy, NLL 0.750. "
        "One distillation each: another seed may say otherwise."
    )


def test_means_are_over_the_networks_of_all_runs():
    """Of each seed over a and b; c, which is B's alone, counts nowhere, and neither do random images on it."""

    def scored(label, by_network, random):
        scores = [
            ChainScore(name, network, seed, {"accuracy": value, "nll": 1 - value, "ece": 0.1, "brier": 0.5})
            for name, values in (("fbpc", by_network), ("random", {n: [v] * 2 for n, v in random.items()}))
            for network, pair in values.items() for seed, value in enumerate(pair)
        ]  # fmt: skip
        return ended_run(label, [])._replace(scores=scores)

    first = scored("A", {"a": [0.2, 0.24], "b": [0.3, 0.34]}, {"a": 0.1, "b": 0.1})
    second = scored("B", {"c": [0.0, 0.0], "a": [0.6, 0.62], "b": [0.8, 0.86]}, {"c": 0.9, "a": 0.1, "b": 0.3})
    assert run_comparison.conclusion([first, second]).startswith(
        "On a and b: best accuracy % B (FBPC) 72.0 ± 2.8, before A (FBPC) 27.0 ± 2.8; "
        "best NLL B (FBPC) 0.280 ± 0.028, before A (FBPC) 0.730 ± 0.028. "
        "As many random real images as those of B: 20.0 % accuracy, NLL 0.800. "
    )


def test_a_gap_within_the_spread_is_no_difference():
    """Of both together: 8 points between 53 ± 1.4 and 45 ± 7.1 are above each of them and below their sum, 11 above."""
    first = ended_run("A", [0.4, 0.5])
    outcome = run_comparison.conclusion([first, ended_run("B", [0.52, 0.54], ipc=10)])
    assert "accuracy % of B (FBPC) 53.0 ± 1.4 and A (FBPC) 45.0 ± 7.1 don't differ by more than chains do" in outcome
    assert "best" not in outcome
    outcome = run_comparison.conclusion([first, ended_run("B", [0.55, 0.57], ipc=10)])
    assert "best accuracy % B (FBPC) 56.0 ± 1.4, before A (FBPC) 45.0 ± 7.1" in outcome


@pytest.mark.parametrize(
    ("changes", "result", "words"),
    [
        ({"validation": 0.1}, {}, "validation share (0, 0.1)"),
        ({"seed": 1}, {}, "seed (0, 1)"),
        ({"seed": 1, "chain_epochs": 10}, {}, "seed (0, 1) and epochs of a chain (1000, 10)"),
        ({"normalisation": "cifar10"}, {}, "normalisation (auto, cifar10)"),
        ({"width": 32}, {}, "width (128, 32)"),
        ({"depth": 4}, {}, "depth (0, 4)"),
        ({"expert_seed": 1}, {}, "seed of the experts (0, 1)"),
        ({}, {"images_scored": 100}, "images scored (360, 100)"),
        ({}, {"split": "validation"}, "split (test, validation)"),
        ({}, {"data": "other"}, "data set (digits, other)"),
    ],
)
def test_no_conclusion_where_settings_differ(changes, result, words):
    outcome = run_comparison.conclusion(
        [ended_run("A", [0.5, 0.5]), ended_run("B", [0.9, 0.9], result=result, **changes)]
    )
    assert outcome == f"No conclusion: the runs differ in {words}, so that their scores don't compare."


@pytest.mark.parametrize(
    ("inference", "unused", "used"),
    [
        ("sghmc", {"net_steps": 7, "net_ridge": 7.0, "ensemble_size": 7}, {"chain_d": 7.0}),
        ("last-layer", {"chain_epochs": 7, "ensemble_size": 7}, {"net_ridge": 7.0}),
        ("mse", {"chain_d": 7.0, "net_ridge": 7.0, "net_precision": 7.0}, {"net_label_scale": 7.0}),
        ("ensemble", {"chain_eta": 7.0, "net_ridge": 7.0}, {"ensemble_size": 7}),
    ],
)
def test_settings_that_an_inference_does_not_use_may_differ(inference, unused, used):
    first = ended_run("A", [0.5, 0.5], inference=inference)
    for changes, compare in ((unused, True), (used, False)):
        second = ended_run("B", [0.9, 0.9], inference=inference, **changes)
        assert run_comparison.conclusion([first, second]).startswith("On a: best accuracy") == compare


def test_settings_that_only_one_of_two_methods_uses_may_differ():
    """The soft labels of vbpc have no scale of one-hot labels, and vbpc has no experts; the others have both."""
    first = ended_run("A", [0.5, 0.5], inference="mse")
    second = ended_run("B", [0.9, 0.9], inference="mse", net_label_scale=3.0, method="vbpc", expert_seed=1)
    learned = second._replace(coreset=second.coreset._replace(soft_labels=torch.zeros(2, 2)))
    assert run_comparison.conclusion([first, learned]).startswith("On a: best accuracy")
    assert "differ in net label scale (1, 3), so" in run_comparison.conclusion([first, second])


def test_runs_of_several_numbers_of_chains_compare():
    outcome = run_comparison.conclusion(
        [ended_run("A", [0.5, 0.52], num_chains=2), ended_run("B", [0.7, 0.72, 0.71], num_chains=3)]
    )
    assert outcome.startswith("On a: best accuracy % B (FBPC) 71.0 ± 1.0, before A (FBPC) 51.0 ± 1.4;")


@pytest.mark.parametrize(
    ("common", "name", "value", "compare"),
    [
        ({"method": "vbpc", "inference": "last-layer"}, "augment", "none", True),
        ({"method": "vbpc"}, "augment", "none", False),
        ({"method": "vbpc", "chain_augment": False}, "augment", "none", True),
        ({"method": "fbpc"}, "augment", "none", False),
        ({"method": "fbpc"}, "resize", "stretch", True),
        ({"method": "fbpc", "image_size": 8}, "resize", "stretch", False),
        ({"method": "frepo", "inference": "mse"}, "chain_full_batch", 9, False),
    ],
)
def test_a_setting_that_neither_run_uses_may_differ(common, name, value, compare):
    first, second = ended_run("A", [0.5, 0.5], **common), ended_run("B", [0.9, 0.9], **common | {name: value})
    assert run_comparison.conclusion([first, second]).startswith("On a: best accuracy") == compare


def test_a_setting_must_agree_among_the_runs_that_use_it():
    """A third run that has no experts makes those of the others comparable no more than without it."""
    runs = [ended_run("A", [0.5, 0.5]), ended_run("B", [0.6, 0.6], expert_seed=1)]
    for these in (runs, [*runs, ended_run("C", [0.9, 0.9], method="random")]):
        assert "No conclusion: the runs differ in seed of the experts (0, 1)" in run_comparison.conclusion(these)


def test_runs_of_two_inferences_differ_in_the_inference():
    outcome = run_comparison.conclusion(
        [ended_run("A", [0.5, 0.5]), ended_run("B", [0.9, 0.9], inference="mse", chain_d=7.0, net_steps=7)]
    )
    assert outcome == "No conclusion: the runs differ in inference (sghmc, mse), so that their scores don't compare."


def test_no_conclusion_without_common_networks_spread_or_values():
    first = ended_run("A", [0.5, 0.5])
    for other, words in (
        (ended_run("B", [0.9, 0.9], networks=("b",)), "no network was scored on all coresets"),
        (ended_run("B", [0.9, None]), "a chain diverged"),
        (first._replace(coreset=first.coreset._replace(facts={"fingerprint": "g"})), "training images (f, g)"),
    ):
        assert words in run_comparison.conclusion([first, other])
    assert "no spread is known" in run_comparison.conclusion([ended_run("A", [0.5]), ended_run("B", [0.9])])


def test_what_differs_is_a_table_of_flags():
    _, runs, settings = run_comparison.comparison(
        [ended_run("A", [0.5]), ended_run("B", [0.5], ipc=10, threads=2, out="x")]
    )
    assert isinstance(runs, Table) and isinstance(settings, Table)
    assert settings.lines == [["setting", "A", "B"], ["--ipc", "1", "10"], ["--threads", "0", "2"]]
    assert runs.lines[2] == ["B: B", "fbpc", "digits", "10", "convnet-in", "9"]


def test_the_table_of_flags_leaves_out_what_no_run_uses():
    """A flag is there if it differs among the runs that use it; the others have a dash."""
    vbpc = ended_run("A", [0.5], method="vbpc", inference="last-layer", ridge=0.1, expert_count=5, chain_d=1.0)
    frepo = ended_run("B", [0.5], method="frepo", inference="last-layer", ridge=0.2, alpha=7.0, prior_precision=2.0)
    fbpc = ended_run("C", [0.5], method="fbpc", inference="last-layer", expert_count=9, syn_steps=3)
    settings = run_comparison.comparison([vbpc, frepo, fbpc])[-1]
    assert isinstance(settings, Table)
    assert settings.lines == [
        ["setting", "A", "B", "C"], ["--method", "vbpc", "frepo", "fbpc"], ["--ridge", "0.1", "0.2", "-"],
    ]  # fmt: skip
