"""Scores of runs as tables and charts."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from fbpc_ray.evaluation import protocols
from fbpc_ray.evaluation.diagnostics import MIXED, Mixing
from fbpc_ray.evaluation.results import (
    MAIN_QUANTITIES,
    QUANTITIES,
    ChainScore,
    finite,
    mean_scores,
    select,
    unique,
    values_of,
)
from fbpc_ray.reporting.charts import comparison
from fbpc_ray.reporting.document import Block, Picture, Table, Text
from fbpc_ray.reporting.run_comparison import SCORING, differing
from fbpc_ray.reporting.run_pictures import png_of
from fbpc_ray.reporting.run_reader import EndedRun

PRINTED = {
    name: quantity._replace(label=f"AUROC {quantity.label}") if "auroc" in name else quantity
    for name, quantity in QUANTITIES.items()
}
"""Label, unit and digits of each quantity in a report."""


class Series(NamedTuple):
    """Scores of one coreset: of one run, or of several that share the coreset."""

    name: str
    scores: list[ChainScore]

    @property
    def architectures(self) -> list[str]:
        return unique(score.architecture for score in self.scores)

    def of(self, architecture: str) -> list[ChainScore]:
        return select(self.scores, architecture=architecture)


def series_of(scores: Sequence[ChainScore]) -> list[Series]:
    """Group scores by coreset."""
    return [Series(name, select(scores, name)) for name in unique(score.coreset for score in scores)]


def all_series(runs: Sequence[EndedRun]) -> list[Series]:
    """Return all coresets, random ones first; a random coreset that several runs share appears once."""
    named: dict[str, tuple[Series, list[str]]] = {}
    for run in runs:
        for one in series_of(run.scores):
            key = f"random {run.result['data']} {one.scores}" if one.name == "random" else f"{run.label} {one.name}"
            named.setdefault(key, (one, []))[1].append(run.label)
    return [
        Series(f"{one.name} ({', '.join(labels)})" if labels[0] else one.name, one.scores)
        for one, labels in sorted(named.values(), key=lambda pair: pair[0].name != "random")
    ]


def describe_scoring(runs: Sequence[EndedRun]) -> str:
    """Describe how the chains were sampled and scored, and whether all runs were scored alike."""
    first = runs[0]
    e, counts = first.config.evaluation, sorted({1 + max(score.seed for score in run.scores) for run in runs})
    protocol = protocols.of_result(first.result, e)
    length = f"{e.chain_epochs:,} epochs per chain"
    how = f"Bayesian networks sampled by SGHMC on each coreset, {length} (protocol {protocol})"
    noun = "chain"
    if e.inference != "sghmc":
        how = f"Networks trained on each coreset by squared loss, {e.net_steps:,} steps, with --inference {e.inference}"
        noun = "seed"
    text = (
        f"{how}, scored on "
        f"{first.result['images_scored']:,} {first.result['split']} images: mean ± standard deviation over "
        f"{' or '.join(map(str, counts))} {noun}{'s' if counts != [1] else ''}. Higher is better for accuracy, lower "
        "for the rest."
    )
    images = {(run.result["data"], run.result["split"], run.result["images_scored"]) for run in runs}
    if len(images) == 1 and not differing(runs, SCORING):
        return text
    return f"{text} The runs were not scored alike (this is {first.label}'s): see where they differ."


def headline(run: EndedRun) -> str:
    """Compare the coreset's scores with those of as many random real images, in one sentence."""
    names = [name for name in unique(score.coreset for score in run.scores) if name != "random"]
    headlines = [_headline_of(run.scores, name, "The coreset") for name in names]
    headlines += [
        _headline_of(run.scores, "random", "as many random real images" if headlines else "Random real images")
    ]
    words = "; ".join(text for text in headlines if text)
    return f"{words} ({run.result['images_scored']:,} {run.result['split']} images)."


def _headline_of(scores: Sequence[ChainScore], name: str, subject: str) -> str:
    means = mean_scores(select(scores, name))
    if not means:
        return f"{subject}: a chain diverged" if select(scores, name) else ""
    return f"{subject}: {100 * means['accuracy']:.1f} % accuracy, NLL {means['nll']:.3f}"


def _quantities(series: Sequence[Series]) -> list[str]:
    names = {name for one in series for score in one.scores for name in score.values or ()}
    return [name for name in PRINTED if name in names or name in MAIN_QUANTITIES]


def mean_table(series: Sequence[Series]) -> Table:
    """Tabulate mean ± standard deviation over chains, a row for each network and coreset."""
    quantities = _quantities(series)
    lines = [["network", "coreset", *(PRINTED[name].label for name in quantities)]]
    for architecture in unique(name for one in series for name in one.architectures):
        for one in series:
            if chains := one.of(architecture):
                lines.append([architecture, one.name, *(_mean(chains, name) for name in quantities)])
    return Table(lines)


def mixing_blocks(mixing: Sequence[Mixing]) -> list[Block]:
    """Tabulate split R-hat and effective sample size of what the chains predict; nothing where none is known."""
    if not mixing:
        return []
    lines = [["network", "coreset", "R-hat, NLL", "R-hat, image", "ESS, NLL", "ESS, image"]]
    lines += [
        [one.architecture, one.coreset, f"{one.rhat_nll:.2f}", f"{one.rhat_images:.2f}", f"{one.ess_nll:.0f}",
         f"{one.ess_images:.0f}"]
        for one in mixing
    ]  # fmt: skip
    counts = sorted({one.samples for one in mixing})
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = (
        f"Split R-hat and effective sample size (ESS) of what the {samples} samples predict. Chains whose R-hat is "
        f"above {MIXED:g} have not mixed: longer or other chains would score otherwise."
    )
    return [Text(text), Table(lines)]


def _mean(chains: Sequence[ChainScore], quantity: str) -> str:
    """Format mean ± standard deviation, and how many chains diverged."""
    _, scale, digits = PRINTED[quantity]
    values = [scale * value for value in values_of(chains, quantity)]
    diverged = sum(score.values is None for score in chains)
    if not values:
        return "diverged" if diverged else "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    lost = f" ({diverged} of {len(chains)} diverged)" if diverged else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}{lost}"


def value_table(series: Sequence[Series]) -> Table:
    """Tabulate every value, a row for each chain."""
    quantities = _quantities(series)
    lines = [["network", "coreset", "seed", *(PRINTED[name].label for name in quantities)]]
    for architecture in unique(name for one in series for name in one.architectures):
        for one in series:
            for score in one.of(architecture):
                lines.append([architecture, one.name, str(score.seed), *(_value(score, name) for name in quantities)])
    return Table(lines)


def _value(score: ChainScore, quantity: str) -> str:
    _, scale, digits = PRINTED[quantity]
    value = score.value(quantity)
    if value is None:
        return "diverged" if score.values is None else "-"
    return f"{scale * value:.{digits + 1}f}"


def bar_charts(series: Sequence[Series]) -> list[Block]:
    """Draw accuracy and NLL by network and coreset; nothing for a single bar."""
    architectures = unique(name for one in series for name in one.architectures)
    if len(series) * len(architectures) < 2:
        return []
    return [block for quantity in ("accuracy", "nll") for block in _bars(series, architectures, quantity)]


def _bars(series: Sequence[Series], architectures: Sequence[str], quantity: str) -> list[Block]:
    label = PRINTED[quantity].label
    values = {
        (one.name, architecture): spread
        for one in series
        for architecture in one.architectures
        if (spread := _mean_and_deviation(one.of(architecture), quantity))
    }
    if not values:
        return []
    names, title = [one.name for one in series], f"{label} by network"
    png = png_of(lambda path: comparison.bars(names, architectures, values, {}, label, title, path))
    better = "higher" if quantity == "accuracy" else "lower"
    return [Picture(png, f"00-{quantity}", f"{label}, {better} is better; lines are one standard deviation.")]


def _mean_and_deviation(chains: Sequence[ChainScore], quantity: str) -> tuple[float, float] | None:
    """Return mean and standard deviation over chains, in the printed unit; None where all diverged."""
    values = [PRINTED[quantity].scale * value for value in values_of(chains, quantity)]
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


Point = tuple[str, int, tuple[float, float] | None]
"""(label, x, (mean, standard deviation) where there is one)."""


def curve_charts(runs: Sequence[EndedRun]) -> list[Block]:
    """Draw scores and cost against images per class, and cost against networks, if the runs differ."""
    several_data = len({run.result["data"] for run in runs}) > 1
    scored: dict[str, list[Point]] = {"accuracy": [], "nll": []}
    by_ipc, by_networks = list[Point](), list[Point]()
    for run in runs:
        ipc, data = run.config.distillation.ipc, f", {run.result['data']}" if several_data else ""
        for quantity, points in scored.items():
            points += [
                (f"{one.name}{data}", ipc, _mean_and_deviation(one.scores, quantity)) for one in series_of(run.scores)
            ]
        seconds = finite(run.result.get("seconds_per_step"))
        cost = None if seconds is None else (seconds, 0.0)
        by_ipc.append((f"{run.method}{data}", ipc, cost))
        by_networks.append((f"{run.method}{data}", len(run.config.networks.architectures), cost))
    blocks: list[Block] = []
    panels = [(PRINTED[quantity].label, _lines(points)) for quantity, points in scored.items()]
    panels = [(name, lines) for name, lines in (*panels, ("seconds per step", _lines(by_ipc))) if lines]
    if panels:
        png = png_of(lambda path: comparison.curves(panels, "images per class", path))
        caption = "Against the number of images per class: means, and standard deviations over networks and chains."
        blocks.append(Picture(png, "00-by-ipc", caption))
    if lines := _lines(by_networks):
        png = png_of(lambda path: comparison.curves([("seconds per step", lines)], "networks distilled on", path))
        blocks.append(Picture(png, "00-by-networks", "What a step costs (median), against the number of networks."))
    return blocks


def _lines(points: Sequence[Point]) -> list[comparison.Curve]:
    """Make a curve for each label that has more than one x, with the mean of points of the same x."""
    by_label: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for label, x, value in points:
        if value is not None:
            by_label.setdefault(label, {}).setdefault(x, []).append(value)
    return [
        comparison.Curve(label, [(x, *_mean_of(by_x[x])) for x in sorted(by_x)])
        for label, by_x in by_label.items()
        if len(by_x) > 1
    ]


def _mean_of(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(mean for mean, _ in values), statistics.fmean(spread for _, spread in values)
