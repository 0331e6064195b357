"""What a report says of how a run was made."""

import pytest
from support.ended_runs import ended_run

from fbpc_ray.reporting.run_facts import facts_of


@pytest.mark.parametrize(
    ("method", "steps", "experts"),
    [("fbpc", True, True), ("bpc-w", True, True), ("vbpc", True, False), ("frepo", True, False),
     ("random", False, False)],
)  # fmt: skip
def test_steps_and_experts_are_those_of_methods_that_have_some(method, steps, experts):
    facts = dict(facts_of(ended_run("A", [0.5], method=method, expert_count=7, expert_epochs=3)))
    assert facts.get("Steps") == ("9; seed 0" if steps else None)
    assert facts.get("Experts") == ("7 for each network, of 3 epochs" if experts else None)
