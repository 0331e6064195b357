"""Estimate the seconds of the missing work of a reproduction, by the formula of core/sizes.py."""

from collections.abc import Sequence

from fbpc_ray.core import sizes
from fbpc_ray.core.config import Config
from fbpc_ray.core.sizes import Facts, Rung, Seconds, SizeRequest
from fbpc_ray.core.storage import Place
from fbpc_ray.data.corruptions import PAIRS
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.execution.session import expert_store, network_specs, uses_experts
from fbpc_ray.execution.sizing import facts_of
from fbpc_ray.reproduction.plan import Task


def estimate(unmade: Sequence[Task], chains: Sequence[Task], kind: str, extra_images: int, device: str) -> Seconds:
    """Estimate the seconds on one core, or one GPU.

    Args:
        unmade: a task for each missing coreset.
        chains: a task for each missing row.
        kind: of the table.
        extra_images: that a chain scores beside the test split.
        device: cpu | cuda.
    """
    made_here = [task for task in unmade if not task.outside]
    distillation = sum(
        sizes.estimate(*_facts(task.cell.config, task.dataset), device).distillation for task in made_here
    )
    return Seconds(
        _experts(made_here, device), distillation, sum(_chain(task, kind, extra_images, device) for task in chains)
    )


def _facts(config: Config, dataset: Dataset) -> tuple[Facts, Rung]:
    """Return the facts of a configuration that leaves nothing to choose, on one core, and its sizes."""
    facts = facts_of(config, dataset, SizeRequest(flags=frozenset(config.flat())))._replace(cores=1)
    return facts, sizes.rungs(facts)[0]


def _experts(tasks: Sequence[Task], device: str) -> float:
    """Return the seconds of the missing experts, each store once."""
    seconds = dict[Place, float]()
    for task in tasks:
        config, dataset = task.cell.config, task.dataset
        if not uses_experts(config):
            continue
        facts, rung = _facts(config, dataset)
        for spec in network_specs(config, dataset):
            store = expert_store(config, dataset, spec)
            own = facts._replace(architectures=(spec.architecture,))
            each = sizes.estimate(own, rung._replace(expert_count=1), device).experts
            missing = each * len(store.missing(config.experts.expert_count))
            seconds[store.folder] = max(missing, seconds.get(store.folder, 0.0))
    return sum(seconds.values())


def _chain(task: Task, kind: str, extra_images: int, device: str) -> float:
    """Return the seconds of one chain on one coreset, and of its predictions."""
    facts, rung = _facts(task.cell.config, task.dataset)
    images = facts.test_images + extra_images
    if kind == "corruptions":
        images += facts.test_images * len(PAIRS)
    elif kind == "logits":
        images = 1
    facts = facts._replace(method="random", architectures=(task.cell.judged_on,), test_images=images)  # one coreset
    return sizes.estimate(facts, rung._replace(num_chains=1), device).chains
