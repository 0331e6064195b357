"""Names of metrics in MLflow, and the description of a run."""

from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import preset
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.tracking import run_contents


def score(coreset: str, architecture: str, seed: int, accuracy: float) -> ChainScore:
    values = {"accuracy": accuracy, "nll": 1 - accuracy, "ece": 0.125, "brier": 0.5, "batch_nll": 2.0}
    return ChainScore(coreset, architecture, seed, values)


SCORES = [
    score("random", "a", 0, 0.25), score("fbpc", "a", 0, 0.5), score("fbpc", "a", 1, 0.75), score("fbpc", "b", 0, 1),
]  # fmt: skip


def test_the_test_scores_lead_and_the_rest_is_below_debug():
    metrics = run_contents.score_metrics(SCORES, [], "fbpc")
    leading = {name: value for name, value in metrics.items() if not name.startswith("debug/")}
    assert leading == {"test/accuracy": 0.75, "test/nll": 0.25, "test/ece": 0.125}
    assert metrics["debug/test/accuracy/fbpc/a"] == 0.625 and metrics["debug/test/batch_nll/random/a"] == 2.0
    validation = run_contents.score_metrics(SCORES, [], "fbpc", "validation")
    assert validation["val/nll"] == 0.25 and "test/nll" not in validation and "debug/val/nll/fbpc/b" in validation


def test_a_diverged_chain_leaves_no_leading_score():
    metrics = run_contents.score_metrics([*SCORES, ChainScore("fbpc", "b", 1, None)], [], "fbpc")
    assert all(name.startswith("debug/") for name in metrics)


def test_of_a_step_the_loss_leads():
    metrics = run_contents.step_metrics({"loss": 1.0, "loss/a": 1.0, "seconds/step": 2.0, "map_steps/a": 3.0})
    assert metrics == {"loss": 1.0, "debug/loss/a": 1.0, "debug/seconds/step": 2.0, "debug/map_steps/a": 3.0}


def test_the_rows_of_a_run_give_the_metrics_of_all_its_steps():
    """As read from Parquet: two networks, a validation of the start and of step 2; by hand."""
    rows = [
        {"step": 0, "architecture": "a", "loss": None, "seconds_step": None, "val_nll": 2.0, "val_accuracy": 0.25},
        {"step": 0, "architecture": "b", "loss": None, "seconds_step": None, "val_nll": 4.0, "val_accuracy": 0.75},
        {"step": 1, "architecture": "a", "loss": 1.0, "seconds_step": 0.5, "val_nll": None, "val_accuracy": None},
        {"step": 1, "architecture": "b", "loss": 2.0, "seconds_step": 0.5, "val_nll": None, "val_accuracy": None},
        {"step": 2, "architecture": "a", "loss": 1.5, "seconds_step": 0.25, "val_nll": 1.0, "val_accuracy": 0.5},
        {"step": 2, "architecture": "b", "loss": 1.5, "seconds_step": 0.25, "val_nll": None, "val_accuracy": 0.5},
    ]
    assert run_contents.metrics_of_rows(rows) == {
        0: {"val/nll": 3.0, "val/accuracy": 0.5},
        1: {"loss": 3.0, "debug/loss/a": 1.0, "debug/loss/b": 2.0, "debug/seconds/step": 0.5},
        2: {
            "loss": 3.0, "debug/loss/a": 1.5, "debug/loss/b": 1.5, "debug/seconds/step": 0.25, "val/accuracy": 0.5
        },
    }  # fmt: skip


def test_the_description_is_a_markdown_table():
    text = run_contents.description_tag(Config(), "digits", SCORES[:2])["mlflow.note.content"]
    assert text == (
        "fbpc on digits, 1 per class; mean +- standard deviation over chains, protocol paper:\n\n"
        "| architecture | coreset | accuracy % | NLL | ECE | Brier |\n"
        "|---|---|---|---|---|---|\n"
        "| a | random | 25.0 | 0.750 | 0.125 | 0.500 |\n"
        "| a | fbpc | 50.0 | 0.500 | 0.125 | 0.500 |"
    )


def test_params_are_the_preset_and_what_differs_from_it_but_for_places():
    config = preset("cifar10-ipc1").updated(gamma=0.5, alpha=100.0, threads=3, out="runs/x", data_root="/data")
    assert run_contents.run_params(config) == {
        "preset": "cifar10-ipc1", "gamma": 0.5, "method": "fbpc", "data": "cifar10", "ipc": 1,
        "architectures": "convnet-in", "width": 128, "steps": 1000, "alpha": 100.0, "start_epoch": 1,
        "start_rule": "from", "seed": 0,
    }  # fmt: skip
    assert run_contents.run_params(Config().updated(data="npz:x.npz"))["preset"] == "none"


def test_scores_under_the_calibrated_protocol_are_the_coresets():
    expected = {"calibrated_accuracy": 0.75, "calibrated_nll": 0.25, "calibrated_ece": 0.125}
    for split, prefix in (("test", "test"), ("validation", "val")):
        metrics = run_contents.calibrated_metrics(SCORES, "fbpc", split)
        assert metrics == {f"{prefix}/{name}": value for name, value in expected.items()}
