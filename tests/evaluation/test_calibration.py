"""Temperature and prior are chosen by the validation split alone."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Split
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import calibration, diagnostics
from fbpc_ray.evaluation.calibration import Candidate
from fbpc_ray.evaluation.evaluate import EvaluationResult
from fbpc_ray.evaluation.results import MAIN_QUANTITIES, ChainScore
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial


def test_the_lowest_validation_nll_wins_and_no_test_image_is_seen(small, digits, monkeypatch):
    monkeypatch.setattr(calibration, "TEMPERATURES", (0.0, 1e-2))
    monkeypatch.setattr(calibration, "PRIORS", (0.05, 1e4))  # the second shrinks all weights: NLL log 10
    settings = {"chain_epochs": 20, "chain_every": 10, "chain_d": 1e-2, "chain_weight_decay": 0.05}
    config = small.updated(architectures=("convnet-in",), **settings)
    state, labels = initial_state(digits, 2, 0)
    coresets = {"fbpc": Coreset(state.images, labels, digits.mean, digits.std, digits.classes)}
    blind = digits._replace(
        validation=Split(digits.train.images[:100], digits.train.labels[:100]),
        test=Split(digits.test.images[:0], digits.test.labels[:0]),
    )
    workers, specs, lines = Serial("cpu", Interruption()), session.network_specs(config, digits), list[str]()
    chosen, tried = calibration.choose(coresets, specs, blind, config, workers, lines.append)
    assert len(tried) == 4
    best = calibration.best_of(tried, config.evaluation, coresets)
    assert (chosen.evaluation.chain_d, chosen.evaluation.chain_weight_decay) == (best.chain_d, best.chain_weight_decay)
    assert best.chain_weight_decay == 0.05
    assert replace(chosen.evaluation, chain_d=0, chain_weight_decay=0) == replace(
        config.evaluation, chain_d=0, chain_weight_decay=0
    )
    assert lines[0] == "calibrating on 100 validation images: 4 settings of the chains"
    assert "lowest validation NLL of 4 settings" in lines[-1]


def test_the_settings_of_paper_are_tried_too():
    settings = Evaluation(chain_d=0.25, chain_weight_decay=0.75, num_chains=5)
    tried = {(one.chain_d, one.chain_weight_decay) for one in calibration.candidates(settings)}
    assert tried == {(d, decay) for d in (*calibration.TEMPERATURES, 0.25) for decay in (*calibration.PRIORS, 0.75)}
    assert {one.num_chains for one in calibration.candidates(settings)} == {1}


def test_calibration_is_not_silent(monkeypatch):
    """Lines of the chains pass, with the number of the setting; what one short chain says of mixing does not."""

    def evaluate(*arguments):
        arguments[-1]("evaluate: chain 1/2 (50 %), 40 s/chain, 40 s left")
        arguments[-1](f"{diagnostics.NOT_MIXED}: fbpc on a (R-hat 3)")
        return EvaluationResult([ChainScore("fbpc", "a", 0, dict.fromkeys(MAIN_QUANTITIES, 0.5))], (), {}, {}, {}, [])

    monkeypatch.setattr(calibration, "evaluate", evaluate)
    monkeypatch.setattr(calibration, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(calibration, "PRIORS", (0.5,))
    dataset: Any = SimpleNamespace(validation=SimpleNamespace(labels=range(100)))
    config, lines = Config().updated(chain_d=0.0, chain_weight_decay=0.25), list[str]()
    calibration.choose({}, [], dataset, config, cast(Any, None), lines.append)
    assert lines[1:-1] == [
        "setting 1/2: evaluate: chain 1/2 (50 %), 40 s/chain, 40 s left",
        "setting 2/2: evaluate: chain 1/2 (50 %), 40 s/chain, 40 s left",
    ]


def test_a_setting_that_diverged_is_not_chosen():
    tried = [Candidate(0.0, 0.05, {}), Candidate(1e-3, 0.5, {"nll": 2.0}), Candidate(0.0, 3.0, {"nll": 1.5})]
    coresets: Any = {"fbpc": SimpleNamespace(labels=range(20))}
    assert calibration.best_of(tried, Evaluation(), coresets) is tried[2]
    with pytest.raises(UserError, match=r"all chains diverged; lower --chain-eta \(now 0.018\)$"):
        calibration.best_of(tried[:1], Evaluation(), coresets)


@pytest.mark.parametrize(("names", "choosing"), [(["fbpc", "random"], ["fbpc"]), (["random"], ["random"])])
def test_random_images_choose_no_setting_of_a_coreset(monkeypatch, names, choosing):
    """They would choose a prior for themselves; the chosen settings score all coresets on the test split."""
    calls = []

    def evaluate(coresets, specs, dataset, split, config, workers, log):
        calls.append((list(coresets), split, config.evaluation.chain_weight_decay))
        values = {name: abs(config.evaluation.chain_weight_decay - 0.5) for name in MAIN_QUANTITIES}
        return EvaluationResult([ChainScore(name, "a", 0, values) for name in coresets], (), {}, {}, {}, [])

    monkeypatch.setattr(calibration, "evaluate", evaluate)
    monkeypatch.setattr(calibration, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(calibration, "PRIORS", (0.5, 3.0))
    dataset: Any = SimpleNamespace(validation=SimpleNamespace(labels=range(100)))
    config = Config().updated(chain_d=0.0, chain_weight_decay=0.25)
    coresets: Any = dict.fromkeys(names)
    calibration.calibrated(coresets, [], dataset, "test", config, cast(Any, None), lambda line: None)
    assert calls == [*((choosing, "validation", decay) for decay in (0.25, 0.5, 3.0)), (names, "test", 0.5)]
