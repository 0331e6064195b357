"""What differs between runs, and which one scores better, where their scores compare."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import ELSEWHERE, Data, Evaluation
from fbpc_ray.evaluation.results import QUANTITIES, mean_scores, select, unique
from fbpc_ray.execution.used_settings import uses
from fbpc_ray.reporting.document import Block, Heading, Table
from fbpc_ray.reporting.run_facts import LAST_BITS, method_name
from fbpc_ray.reporting.run_reader import EndedRun

WORDS = {
    "data": "data set", "validation": "validation share", "data_seed": "seed of the drawn splits",
    "seed": "seed", "expert_seed": "seed of the experts", "augment": "augmentation",
    "chain_epochs": "epochs of a chain", "chain_every": "epochs between samples",
}  # fmt: skip
"""Settings whose flag is not their name in words."""
SCORED_ALIKE = [
    *(f.name for f in fields(Data) if f.name not in ELSEWHERE), "seed", "expert_seed", "width", "depth", "augment",
    *(f.name for f in fields(Evaluation) if f.name != "num_chains"),
]  # fmt: skip
"""Settings that must agree among the runs that use them, so that a difference of scores is one of the coresets."""
SCORING = ["width", *(f.name for f in fields(Evaluation) if f.name != "num_chains")]
"""Settings of the networks that score the coresets."""
RESULT_WORDS = {"data": "data set", "split": "split", "images_scored": "images scored"}


def comparison(runs: Sequence[EndedRun]) -> list[Block]:
    """Tabulate the runs, and the settings in which those differ that use them."""
    lines = [["run", "method", "data", "images per class", "networks", "steps"]]
    for run in runs:
        c = run.config
        networks = ", ".join(c.networks.architectures)
        steps = str(run.result["steps"]) if run.method != "random" else "-"
        lines.append([run.name, run.method, run.result["data"], str(c.distillation.ipc), networks, steps])
    blocks: list[Block] = [Heading("Where they differ"), Table(lines)]
    same, rows = ELSEWHERE - LAST_BITS, []
    for name in runs[0].config.flat():
        values = [run.config.flat()[name] if uses(run.config, name) else None for run in runs]
        if name not in same and _differs([value for value in values if value is not None]):
            rows.append([f"--{name.replace('_', '-')}", *("-" if value is None else _word(value) for value in values)])
    if rows:
        blocks.append(Table([["setting", *(run.label for run in runs)], *rows]))
    return blocks


def conclusion(runs: Sequence[EndedRun]) -> str:
    """State which run scores better, or why no conclusion holds."""
    if unlike := _unlike(runs):
        return f"No conclusion: the runs differ in {_listed(unlike)}, so that their scores don't compare."
    networks = [
        name for name in unique(score.architecture for score in runs[0].scores)
        if all(select(run.scores, run.method, name) for run in runs)
    ]  # fmt: skip
    if not networks:
        return "No conclusion: no network was scored on all coresets."
    values = {quantity: [_values(run, quantity, networks) for run in runs] for quantity in ("accuracy", "nll")}
    if not all(map(all, values.values())):
        return "No conclusion: a chain diverged."
    if any(len(chains) < 2 for chains in values["nll"]):
        return "No conclusion: of one chain each, no spread is known."
    sentences = [_compare(runs, quantity, chains) for quantity, chains in values.items()]
    return (
        f"On {_listed(networks)}: {'; '.join(sentences)}. {_beside_random(runs, values, networks)}"
        "One distillation each: another seed may say otherwise."
    )


def _unlike(runs: Sequence[EndedRun]) -> list[str]:
    """Name the settings that keep the scores from comparing, with their values."""
    flat = [run.config.flat() for run in runs]
    unlike = {
        WORDS.get(name, name.replace("_", " ")): [_word(one[name]) for one in flat]
        for name in differing(runs, SCORED_ALIKE)
    }
    for name, word in RESULT_WORDS.items():
        if _differs(texts := [str(run.result[name]) for run in runs]):
            unlike[word] = texts
    prints = [run.coreset.facts.get("fingerprint", "") for run in runs]
    if all(prints) and _differs(prints) and not unlike:
        unlike["training images"] = prints
    return [f"{word} ({', '.join(unique(texts))})" for word, texts in unlike.items()]


def differing(runs: Sequence[EndedRun], names: Sequence[str]) -> list[str]:
    """Return those of the settings `names` that differ where the scores of the coresets depend on them."""
    return [name for name in names if _differs([run.config.flat()[name] for run in runs if _depends_on(run, name)])]


def _depends_on(run: EndedRun, name: str) -> bool:
    """Return whether the scores of the coreset of `run` depend on the setting `name` of `SCORED_ALIKE`."""
    return uses(run.config, name) and (name != "net_label_scale" or run.coreset.soft_labels is None)


def _values(run: EndedRun, quantity: str, networks: Sequence[str]) -> list[float]:
    """Return a mean over networks for each seed, in the printed unit; empty where a chain diverged."""
    by_network = [[score.value(quantity) for score in select(run.scores, run.method, name)] for name in networks]
    if any(value is None for values in by_network for value in values):
        return []
    scale = QUANTITIES[quantity].scale
    return [scale * statistics.fmean(values) for values in zip(*by_network, strict=True)]  # type: ignore[arg-type]


def _beside_random(
    runs: Sequence[EndedRun], values: Mapping[str, Sequence[Sequence[float]]], networks: Sequence[str]
) -> str:
    """State the scores of as many random real images as the run of the lowest NLL has."""
    best = min(range(len(runs)), key=lambda at: statistics.fmean(values["nll"][at]))
    scores = [score for name in networks for score in select(runs[best].scores, "random", name)]
    means = mean_scores(scores) if scores and runs[best].method != "random" else {}
    if not means:
        return ""
    return (
        f"As many random real images as those of {runs[best].label}: {100 * means['accuracy']:.1f} % accuracy, "
        f"NLL {means['nll']:.3f}. "
    )


def _compare(runs: Sequence[EndedRun], quantity: str, values: Sequence[Sequence[float]]) -> str:
    """Name the best run and the next one, if the gap between them is above both standard deviations together."""
    label, _, digits = QUANTITIES[quantity]
    order = sorted(range(len(runs)), key=lambda at: statistics.fmean(values[at]), reverse=quantity == "accuracy")
    first, second = order[:2]
    texts = [
        f"{runs[at].label} ({method_name(runs[at])}) {statistics.fmean(values[at]):.{digits}f} ± "
        f"{statistics.stdev(values[at]):.{digits}f}"
        for at in (first, second)
    ]
    gap = abs(statistics.fmean(values[first]) - statistics.fmean(values[second]))
    if gap <= statistics.stdev(values[first]) + statistics.stdev(values[second]):
        return f"{label} of {texts[0]} and {texts[1]} don't differ by more than chains do"
    return f"best {label} {texts[0]}, before {texts[1]}"


def _differs(values: Sequence[Any]) -> bool:
    return len({repr(value) for value in values}) > 1


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return redacted(" ".join(value) if isinstance(value, tuple) else str(value)) or "''"
