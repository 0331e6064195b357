"""The names of the protocols of chains, and where they stand: result.json, tables, MLflow, the report."""

import json
import shutil
from dataclasses import replace

import pytest
from support.runs import distil, flags

from fbpc_ray.commands import main
from fbpc_ray.core import inputs
from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.evaluation import calibration, protocols
from fbpc_ray.evaluation.calibration import Calibrated
from fbpc_ray.evaluation.evaluate import EvaluationResult
from fbpc_ray.evaluation.results import ChainScore, from_json, select
from fbpc_ray.reporting import report
from fbpc_ray.tracking import run_contents

NUMBERS = {"accuracy": 0.5, "nll": 0.75, "ece": 0.125, "brier": 0.25}


def test_the_defaults_are_the_protocol_paper():
    assert protocols.name_of(Evaluation()) == "paper"
    assert protocols.name_of(Evaluation(num_chains=7, net_steps=3)) == "paper"
    changed = replace(Evaluation(), chain_epochs=200, chain_eta=0.5)
    assert protocols.name_of(changed) == "paper, changed: --chain-epochs 200 --chain-eta 0.5"
    unlike = replace(Evaluation(), chain_augment=False)
    assert protocols.name_of(unlike) == "paper, changed: --no-chain-augment"
    assert protocols.name_of(Evaluation(inference="mse")) == ""


def test_a_result_of_earlier_code_has_the_protocol_of_its_settings():
    assert protocols.of_result({"protocol": "paper"}, Evaluation(chain_epochs=200)) == "paper"
    assert protocols.of_result({}, Evaluation(chain_eta=0.5)) == "paper, changed: --chain-eta 0.5"
    assert protocols.of_result({}) == ""


def test_calibration_is_of_chains_and_needs_a_validation_split(digits):
    with pytest.raises(UserError, match="there is no validation split; distil with --validation"):
        calibration.check("calibrated", Evaluation(), digits, "distil with --validation 0.1")
    with pytest.raises(
        UserError, match=r"--inference mse has no chains; add --inference sghmc, or leave out --protocol$"
    ):
        calibration.check("calibrated", Evaluation(inference="mse"), digits, "")
    calibration.check("paper", Evaluation(inference="mse"), digits, "")


def test_mlflow_has_both_protocols_beside_each_other():
    paper = [ChainScore("fbpc", "a", 0, NUMBERS | {"nll": 1.5})]
    result = EvaluationResult([ChainScore("fbpc", "a", 0, NUMBERS)], (), {}, {}, {}, [])
    chosen = Calibrated(Evaluation(chain_d=0.0, chain_weight_decay=3.0), [], result)
    assert run_contents.calibrated_metrics(result.scores, "fbpc", "test") == {
        "test/calibrated_accuracy": 0.5, "test/calibrated_nll": 0.75, "test/calibrated_ece": 0.125
    }  # fmt: skip
    assert run_contents.calibrated_metrics(result.scores, "fbpc", "validation")["val/calibrated_nll"] == 0.75
    tags = run_contents.description_tag(Config(), "digits", paper, chosen)
    assert tags["protocol"] == "paper; calibrated"
    first, second = tags["mlflow.note.content"].split("protocol calibrated (--chain-d 0 --chain-weight-decay 3, ")
    assert "over chains, protocol paper:" in first and "1.500" in first and "0.750" in second
    assert run_contents.description_tag(Config().updated(inference="mse"), "digits", paper).keys() == {
        "mlflow.note.content"
    }


@pytest.fixture(scope="module")
def validated_run(small, tmp_path_factory):
    """A run of random images, with a validation split."""
    folder = tmp_path_factory.mktemp("runs") / "validated"
    words = flags(small, backend="serial", method="random", architectures=("convnet-in",), validation=0.1,
                  num_chains=1, out=str(folder))  # fmt: skip
    distil(*words)
    return folder


def test_both_protocols_are_evaluated_and_named(validated_run, tmp_path, monkeypatch, capsys):
    """The calibrated chains are those of their flags; table, result.json and report name both protocols."""
    monkeypatch.setattr(calibration, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(calibration, "PRIORS", (3.0,))
    folder = shutil.copytree(validated_run, tmp_path / "run")
    words = ["evaluate", str(folder), "--backend", "serial", "--json", str(tmp_path / "r.json")]
    main.main([*words, "--tune-chain"])
    out, result = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    chosen = result["calibrated"]
    assert result["protocol"] == "paper, changed: --chain-epochs 20 --chain-every 10"
    assert result["chain_settings"]["chain_epochs"] == 20
    usual = Evaluation()
    count = len({0.0, usual.chain_d}) * len({3.0, usual.chain_weight_decay})
    assert chosen["protocol"] == "calibrated" and len(chosen["candidates"]) == count
    best = f"--chain-d {chosen['chain_d']:g} --chain-weight-decay {chosen['chain_weight_decay']:g}"
    assert f"protocol {result['protocol']}:\n" in out
    assert f"protocol calibrated ({best}, chosen on the validation split):\n" in out
    main.main([*words, *best.split()])
    again = json.loads((tmp_path / "r.json").read_text())
    assert select(from_json(again["coresets"]), "random") == select(from_json(chosen["coresets"]), "random")
    report.report([str(folder)], str(tmp_path / "r.html"), print)
    page = (tmp_path / "r.html").read_text()
    assert f"Protocol calibrated: {best}" in page and "Protocol paper, changed: " in page
    assert inputs.read_checked_json(folder / "result.json")["protocol"] in page


def test_a_run_without_validation_split_is_refused(finished_run, capsys):
    with pytest.raises(SystemExit):
        main.main(["evaluate", str(finished_run), "--protocol", "calibrated", "--backend", "serial"])
    assert "there is no validation split; distil with --validation 0.1" in capsys.readouterr().err


def test_any_coreset_is_calibrated_on_held_out_images(validated_run, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(calibration, "PRIORS", ())
    words = ["--data", "digits", "--validation", "0.1", "--backend", "serial", "--num-chains", "1"]
    main.main([
        "evaluate", "--coreset", str(validated_run), *words, "--protocol", "calibrated", "--json",
        str(tmp_path / "r.json"),
    ])  # fmt: skip
    chosen = json.loads((tmp_path / "r.json").read_text())["calibrated"]
    assert len(chosen["candidates"]) == len({0.0, Evaluation().chain_d})
    assert chosen["coresets"].keys() == {"random", "given"}
