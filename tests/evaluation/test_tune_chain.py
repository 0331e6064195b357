"""Temperature and prior are chosen by the validation split alone."""

from dataclasses import replace

import pytest

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Split
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import tune_chain
from fbpc_ray.evaluation.tune_chain import Candidate
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial


def test_the_lowest_validation_nll_wins_and_no_test_image_is_seen(small, digits, monkeypatch):
    monkeypatch.setattr(tune_chain, "TEMPERATURES", (0.0, 1e-2))
    monkeypatch.setattr(tune_chain, "PRIORS", (0.05, 1e4))  # the second shrinks all weights: NLL log 10
    config = small.updated(architectures=("convnet-in",), chain_epochs=20, chain_every=10)
    state, labels = initial_state(digits, 2, 0)
    coresets = {"fbpc": Coreset(state.images, labels, digits.mean, digits.std, digits.classes)}
    blind = digits._replace(
        validation=Split(digits.train.images[:100], digits.train.labels[:100]),
        test=Split(digits.test.images[:0], digits.test.labels[:0]),
    )
    workers, specs, lines = Serial("cpu", Interruption()), session.network_specs(config, digits), list[str]()
    chosen, tried = tune_chain.tune_chain(coresets, specs, blind, config, workers, lines.append)
    assert len(tried) == 4
    best = tune_chain.best_of(tried)
    assert (chosen.evaluation.chain_d, chosen.evaluation.chain_weight_decay) == (best.chain_d, best.chain_weight_decay)
    assert best.chain_weight_decay == 0.05
    assert replace(chosen.evaluation, chain_d=0, chain_weight_decay=0) == replace(
        config.evaluation, chain_d=0, chain_weight_decay=0
    )
    assert "lowest validation NLL of 4 settings" in lines[0]
    with pytest.raises(UserError, match="distil with --validation"):
        without = digits._replace(validation=blind.test)
        tune_chain.tune_chain(coresets, specs, without, config, workers, lines.append)


def test_a_setting_that_diverged_is_not_chosen():
    tried = [Candidate(0.0, 0.05, {}), Candidate(1e-3, 0.5, {"nll": 2.0}), Candidate(0.0, 3.0, {"nll": 1.5})]
    assert tune_chain.best_of(tried) is tried[2]
    with pytest.raises(UserError, match="all chains diverged"):
        tune_chain.best_of(tried[:1])
