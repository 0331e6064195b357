"""Names of metrics in MLflow, and the description of a run."""

from fbpc_ray.core.config import Config
from fbpc_ray.evaluation.evaluate import EvaluationResult
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.tracking import run_logging


def score(coreset: str, architecture: str, seed: int, accuracy: float) -> ChainScore:
    values = {"accuracy": accuracy, "nll": 1 - accuracy, "ece": 0.125, "brier": 0.5, "batch_nll": 2.0}
    return ChainScore(coreset, architecture, seed, values)


def evaluation(scores: list[ChainScore]) -> EvaluationResult:
    return EvaluationResult(scores, (), {}, {}, {}, [])


SCORES = [
    score("random", "a", 0, 0.25), score("fbpc", "a", 0, 0.5), score("fbpc", "a", 1, 0.75), score("fbpc", "b", 0, 1),
]  # fmt: skip


def test_the_test_scores_lead_and_the_rest_is_below_debug():
    metrics = run_logging.score_metrics(evaluation(SCORES), "fbpc")
    leading = {name: value for name, value in metrics.items() if not name.startswith("debug/")}
    assert leading == {"test/accuracy": 0.75, "test/nll": 0.25, "test/ece": 0.125}
    assert metrics["debug/test/accuracy/fbpc/a"] == 0.625 and metrics["debug/test/batch_nll/random/a"] == 2.0
    validation = run_logging.score_metrics(evaluation(SCORES), "fbpc", "validation")
    assert validation["val/nll"] == 0.25 and "test/nll" not in validation and "debug/val/nll/fbpc/b" in validation


def test_a_diverged_chain_leaves_no_leading_score():
    metrics = run_logging.score_metrics(evaluation([*SCORES, ChainScore("fbpc", "b", 1, None)]), "fbpc")
    assert all(name.startswith("debug/") for name in metrics)


def test_of_a_step_the_loss_leads():
    metrics = run_logging.step_metrics({"loss": 1.0, "loss/a": 1.0, "seconds/step": 2.0, "map_steps/a": 3.0})
    assert metrics == {"loss": 1.0, "debug/loss/a": 1.0, "debug/seconds/step": 2.0, "debug/map_steps/a": 3.0}


def test_the_description_is_a_markdown_table():
    text = run_logging.description_tag(Config(), "digits", SCORES[:2])["mlflow.note.content"]
    assert text == (
        "fbpc on digits, 1 a class; mean +- standard deviation over chains:\n\n"
        "| architecture | coreset | accuracy % | NLL | ECE | Brier |\n"
        "|---|---|---|---|---|---|\n"
        "| a | random | 25.0 +- 0.0 | 0.750 +- 0.000 | 0.125 +- 0.000 | 0.500 +- 0.000 |\n"
        "| a | fbpc | 50.0 +- 0.0 | 0.500 +- 0.000 | 0.125 +- 0.000 | 0.500 +- 0.000 |"
    )
