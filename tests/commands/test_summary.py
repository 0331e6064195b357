"""The sentences at the end of a run."""

import pytest

from fbpc_ray.commands import summary
from fbpc_ray.evaluation.results import ChainScore

NLL = "NLL 1.00 against 1.00 is equal"


def scores(**accuracies):
    return [
        ChainScore(name, "convnet-in", seed, value and {"accuracy": value, "nll": 1.0, "ece": 1.0, "brier": 1.0})
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "ours, images, verdict",
    [
        # Two standard errors of .4 against .2 are 200 sqrt((.24 + .16) / n): 18.3 points at 48 images, 13 at 100.
        (0.4, 48, f"the distilled images are 20 points better than random ones; {NLL}"),
        (0.4, 36, f"no clear difference in accuracy: on 36 images up to 21 points may be chance; {NLL}"),
        (0.2, 10**6, f"no clear difference in accuracy: on 1,000,000 images up to 0 points may be chance; {NLL}"),
        (0.1, 1000, f"the distilled images are 10 points WORSE than random ones; {NLL}: see docs/faq.md#"),
    ],
)
def test_a_difference_counts_where_it_is_above_two_standard_errors(ours, images, verdict):
    text = summary.describe(scores(random=[0.1, 0.3], fbpc=[ours, ours]), 3, images)
    first, second, *advice = text.splitlines()
    assert len(advice) == verdict.startswith("no clear")
    right = f"fbpc: {100 * ours:.1f} % of {images:,} test images right"
    assert first == f"{right}; as many random real images: 20.0 %; guessing: 33.3 %"
    assert second.startswith(verdict)
    evaluated = summary.describe(scores(random=[0.1, 0.3], fbpc=[ours, ours]), 3, images, "validation", advice=False)
    assert evaluated.splitlines() == [first.replace("test images", "validation images"), second]


@pytest.mark.parametrize(
    "method, advice",
    [("fbpc", "a larger --ipc or --time-budget, or --method vbpc, may"), ("vbpc", "-budget may raise")],
)
def test_the_advice_names_no_method_that_was_used(method, advice):
    text = summary.describe(scores(**{"random": [0.2], method: [0.2]}), 3, 48).splitlines()[-1]
    assert advice in text and ("--method vbpc" in text) == (method != "vbpc")


@pytest.mark.parametrize(
    "nll, words",
    [(0.5, "NLL 0.50 against 1.00 is better (lower is better)"), (2.0, "NLL 2.00 against 1.00 is worse (lower is"),
     (1.001, "NLL 1.00 against 1.00 is equal")],
)  # fmt: skip
def test_the_nll_is_compared_in_words(nll, words):
    ours = [score._replace(values={**(score.values or {}), "nll": nll}) for score in scores(fbpc=[0.2])]
    assert words in summary.describe(scores(random=[0.2]) + ours, 3, 48)


@pytest.mark.parametrize("accuracies", [{"random": [0.1]}, {"random": [0.1], "fbpc": [None]}, {"fbpc": [0.5]}])
def test_nothing_is_compared_where_there_is_nothing_to_compare(accuracies):
    assert summary.describe(scores(**accuracies), 3, 100) == ""


def test_the_next_commands_name_the_run_as_a_shell_takes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "fbpc report 'runs/a b'  #" in summary.next_steps(tmp_path / "runs" / "a b")
    assert "fbpc export /elsewhere --format hf" in summary.next_steps(tmp_path.parents[-1] / "elsewhere")
