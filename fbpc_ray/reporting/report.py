"""`fbpc report`: what one run did and found, or several beside each other, as one HTML page and as Markdown.

Everything comes out of the runs' files, which may be somebody else's: it is checked for its form, and shown as text.
"""

import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fbpc_ray import __version__
from fbpc_ray.core import files
from fbpc_ray.core.config import ELSEWHERE, Config, Evaluation, Output, Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import start_of, with_method
from fbpc_ray.core.storage import Place, Remote, place
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import denormalise
from fbpc_ray.evaluation.results import finite
from fbpc_ray.reporting import charts, html, image_grids, markdown, run_figures
from fbpc_ray.reporting.document import GENERATOR, Block, Code, Facts, Heading, Picture, Table, Text, pictures
from fbpc_ray.reporting.run_reader import SHOWN, EndedRun, Values, image, read

METHODS = {
    "fbpc": "FBPC: divergence of function-space posteriors (Algorithm 1)",
    "fbpc-isotropic": "FBPC with an isotropic posterior (Psi = I)",
    "bpc-fkl": "BPC-fKL: forward KL of weight-space posteriors",
    "bpc-rkl": "BPC-rKL: reverse KL of weight-space posteriors",
    "bpc-w": "BPC-W: Wasserstein distance of weight-space posteriors",
    "random": "random real images, nothing is learned",
}


class Series(NamedTuple):
    """A coreset of one run, or one that several have."""

    name: str
    scores: dict[str, dict[str, Values]]


def report(runs: Sequence[str], out: str, log: Callable[[str], None]) -> None:
    """Write `out`, an HTML file, and the same beside it as Markdown with its pictures.

    Raises UserError for a folder that holds no ended run, a damaged file, and an `out` that isn't a report's.
    """
    target = place(out).absolute()
    if not out.endswith(".html"):
        raise UserError(f"--out {out}: give a file that ends in .html; the Markdown lies beside it")
    texts = target, target.with_suffix(".md")
    for path in texts:
        _refuse_others(path)
    folders = list(dict.fromkeys(place(each).absolute() for each in runs))
    found = [read(each, _letter(index) if len(folders) > 1 else "") for index, each in enumerate(folders)]
    title, blocks = document(found)
    foot = f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by fbpc-ray {__version__}."
    folder = f"{target.name.removesuffix('.html')}-files"
    for picture in pictures(blocks):
        files.write_bytes(_beside(target, folder) / f"{picture.name}.png", picture.png)
    files.write_text(texts[1], markdown.to_markdown(title, blocks, foot, folder))
    files.write_text(texts[0], html.to_html(title, blocks, foot))
    log(f"report:   {texts[0]}\nMarkdown: {texts[1]}, its pictures in {folder}")


def document(found: Sequence[EndedRun]) -> tuple[str, list[Block]]:
    """(title, the rest) of a report."""
    several = len(found) > 1
    first = found[0]
    title = f"{len(found)} runs compared" if several else f"{_named(first)} on {first.result['data']}"
    series = _series(found)
    blocks: list[Block] = [*(_compared(found) if several else [Facts(_facts(first))])]
    blocks += [Heading("Scores"), Text(_how_scored(found)), _scores(series), *_bars(series), *_curves(found)]
    for number, each in enumerate(found, 1):
        if several:
            blocks += [Heading(each.name), Facts(_facts(each))]
        else:
            blocks.append(Heading("Pictures"))
        blocks += [*_pictures(each, f"{number:02d}"), *_later(each, f"{number:02d}"), *_repeat(each)]
    blocks += [Heading("Every value"), Text("One line for each chain, by its seed."), _every_value(series)]
    return title, [*blocks, *_taking_away(found), *_provenance(found)]


# Reading


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"A{index}"


def _beside(path: Place, name: str) -> Place:
    if isinstance(path, Remote):
        return Remote(path.scheme, f"{path.key.rpartition('/')[0]}/{name}")
    return path.with_name(name)


def _refuse_others(path: Place) -> None:
    if path.exists() and (not path.is_file() or GENERATOR.encode() not in path.read_bytes()[:300]):
        raise UserError(f"{path} is there and is no report: give another --out")


# What was done


def _named(found: EndedRun) -> str:
    return METHODS[found.method].split(":")[0]


def _facts(found: EndedRun) -> list[tuple[str, str]]:
    c, result = found.config, found.result
    d, images = c.distillation, found.coreset.images
    facts = [
        ("Method", METHODS[found.method]),
        ("Data", f"{result['data']}, {len(found.coreset.classes)} classes, images of {_shape(found.coreset)}"),
        ("Coreset", f"{len(images):,} images, {d.ipc} a class"),
        ("Networks", f"{', '.join(c.networks.architectures)}; width {c.networks.width}"),
        ("Augmentation", c.networks.augment),
    ]  # fmt: skip
    if found.method != "random":
        seconds = finite(result.get("seconds_per_step"))
        pace = f", {seconds:.3g} s each (median)" if seconds is not None else ""
        facts.append(("Steps", f"{result['steps']:,}{pace}; seed {d.seed}"))
        count, epochs = c.experts.expert_count, c.experts.expert_epochs
        facts.append(("Experts", f"{count} for each network, of {epochs} epochs"))
    if endings := result.get("map_endings"):
        facts.append(("MAP solves", ", ".join(f"{count} {ending}" for ending, count in endings.items())))
    return [*facts, ("Folder", str(found.run.folder))]


def _shape(its: Coreset) -> str:
    channels, height, width = its.images.shape[1:]
    return f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}"


def _compared(found: Sequence[EndedRun]) -> list[Block]:
    """The runs, and where they differ."""
    heads = ["run", "method", "data", "images a class", "networks", "steps"]
    lines = [heads]
    for each in found:
        c = each.config
        networks = ", ".join(c.networks.architectures)
        steps = str(each.result["steps"]) if each.method != "random" else "-"
        lines.append([each.name, each.method, each.result["data"], str(c.distillation.ipc), networks, steps])
    blocks: list[Block] = [Table(lines)]
    flat = [each.config.flat() for each in found]
    same = ELSEWHERE - LAST_BITS
    differing = [name for name in flat[0] if name not in same and len({repr(one[name]) for one in flat}) > 1]
    if differing:
        rows = [[f"--{name.replace('_', '-')}", *(_word(one[name]) for one in flat)] for name in differing]
        blocks += [Heading("Where they differ", 3), Table([["setting", *(each.label for each in found)], *rows])]
    return blocks


LAST_BITS = {"threads", "device", "compiled", "compiled_chains"}
"""Settings that change the last bits of a result."""
PLACES = {f.name for group in (Workers, Output) for f in fields(group)} - LAST_BITS
"""Settings that change no result."""


def _word(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value) or "''"


def command(config: Config) -> list[str]:
    """The words that do it again, in a new folder: a preset, and what differs from it."""
    (row, start), d = start_of(config), config.distillation
    before = with_method(start, d.method, d.ipc).flat() | {"method": start.distillation.method}
    words = ["fbpc", "distill", *(["--preset", row] if row else [])]
    for name, value in config.flat().items():
        if name in PLACES or value == before[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    return words


def _repeat(found: EndedRun) -> list[Block]:
    commit = found.result["commit"]
    note = f"It makes a new folder, at commit {commit}; what isn't named is the default there."
    return [Heading("To repeat it", 3), Code(_wrapped(command(found.config)), "sh"), Text(note)]


def _wrapped(words: Sequence[str], width: int = 88) -> str:
    """A shell command on lines of about `width` characters, each flag with its values."""
    lines = [""]
    for word in words:
        if (word.startswith("--") or len(lines[-1]) > width) and len(lines[-1]) + len(word) > width - 20:
            lines.append(" ")
        lines[-1] += f" {shlex.quote(word)}" if lines[-1] else shlex.quote(word)
    return " \\\n".join(lines)


# Scores


def _series(found: Sequence[EndedRun]) -> list[Series]:
    """Every coreset of every run; random ones that several runs share, once."""
    named: dict[str, tuple[str, list[str], dict[str, dict[str, Values]]]] = {}
    for each in found:
        for name, scores in each.scores.items():
            key = f"random {each.result['data']} {scores}" if name == "random" else f"{each.label} {name}"
            named.setdefault(key, (name, [], scores))[1].append(each.label)
    return [
        Series(f"{name} ({', '.join(labels)})" if labels[0] else name, scores)
        for name, labels, scores in sorted(named.values(), key=lambda one: one[0] != "random")
    ]


def _how_scored(found: Sequence[EndedRun]) -> str:
    first = found[0]
    e, seeds = first.config.evaluation, len(next(iter(next(iter(first.scores.values())).values()))["accuracy"])
    said = (
        f"Bayesian networks sampled by SGHMC on each coreset, {e.chain_epochs:,} epochs a chain, scored on "
        f"{first.result['images_scored']:,} {first.result['split']} images: mean ± standard deviation over "
        f"{seeds} chain{'s' if seeds > 1 else ''}. Higher is better for accuracy, lower for the rest."
    )
    alike = {
        (one.result["data"], one.result["split"], one.result["images_scored"], one.config.networks.width,
         tuple(getattr(one.config.evaluation, f.name) for f in fields(Evaluation)))
        for one in found
    }  # fmt: skip
    if len(alike) == 1:
        return said
    return f"{said} The runs were not scored alike (this is {first.label}'s): see where they differ."


def _order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _quantities(series: Sequence[Series]) -> list[str]:
    there = {name for one in series for scores in one.scores.values() for name in scores}
    return [name for name in SHOWN if name in there]


def _scores(series: Sequence[Series]) -> Table:
    quantities = _quantities(series)
    lines = [["network", "coreset", *(SHOWN[name][0] for name in quantities)]]
    for architecture in _order(name for one in series for name in one.scores):
        for one in series:
            if architecture in one.scores:
                cells = (_mean(one.scores[architecture].get(name, []), name) for name in quantities)
                lines.append([architecture, one.name, *cells])
    return Table(lines)


def _mean(values: Values, quantity: str) -> str:
    """Mean ± standard deviation, and how many diverged."""
    _, scale, digits = SHOWN[quantity]
    finite = [scale * value for value in values if value is not None]
    if not finite:
        return "diverged" if values else "-"
    spread = f" ± {statistics.stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    lost = f" ({len(values) - len(finite)} of {len(values)} diverged)" if len(finite) < len(values) else ""
    return f"{statistics.mean(finite):.{digits}f}{spread}{lost}"


def _every_value(series: Sequence[Series]) -> Table:
    quantities = _quantities(series)
    lines = [["network", "coreset", "seed", *(SHOWN[name][0] for name in quantities)]]
    for architecture in _order(name for one in series for name in one.scores):
        for one in series:
            scores = one.scores.get(architecture, {})
            for seed in range(len(scores.get("accuracy", []))):
                cells = (_value(scores[name][seed], name) if name in scores else "-" for name in quantities)
                lines.append([architecture, one.name, str(seed), *cells])
    return Table(lines)


def _value(value: float | None, quantity: str) -> str:
    _, scale, digits = SHOWN[quantity]
    return "diverged" if value is None else f"{scale * value:.{digits + 1}f}"


# Pictures


def _drawn(draw: Callable[[Path], object]) -> bytes:
    """The PNG that `draw` writes to the path it is given; nothing where it writes none."""
    with tempfile.TemporaryDirectory(prefix="fbpc-") as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return path.read_bytes() if path.exists() else b""


def _bars(series: Sequence[Series]) -> list[Block]:
    architectures, names = _order(name for one in series for name in one.scores), [one.name for one in series]
    if len(names) * len(architectures) < 2:
        return []
    blocks: list[Block] = []
    for quantity in ("accuracy", "nll"):
        label, scale, _ = SHOWN[quantity]
        values: dict[tuple[str, str], tuple[float, float]] = {}
        for one in series:
            for architecture, scores in one.scores.items():
                finite = [scale * value for value in scores[quantity] if value is not None]
                if finite:
                    spread = statistics.stdev(finite) if len(finite) > 1 else 0.0
                    values[one.name, architecture] = statistics.mean(finite), spread
        if values:
            title = f"{label} by network"
            png = _drawn(
                lambda path, v=values, of=label, t=title: charts.bars(names, architectures, v, {}, of, t, path)
            )
            better = "higher" if quantity == "accuracy" else "lower"
            said = f"{label}, {better} is better; lines are one standard deviation."
            blocks.append(Picture(png, f"00-{quantity}", said))
    return blocks


def _curves(found: Sequence[EndedRun]) -> list[Block]:
    """Scores and cost against images a class, cost against the number of networks, where the runs differ in them."""
    several = len({one.result["data"] for one in found}) > 1
    scored: dict[str, list[Point]] = {"accuracy": [], "nll": []}
    by_ipc, by_networks = list[Point](), list[Point]()
    for one in found:
        ipc, data = one.config.distillation.ipc, f", {one.result['data']}" if several else ""
        for quantity, points in scored.items():
            points += [(f"{name}{data}", ipc, _spread(one.scores[name], quantity)) for name in one.scores]
        seconds = finite(one.result.get("seconds_per_step"))
        cost = None if seconds is None else (seconds, 0.0)
        by_ipc.append((f"{one.method}{data}", ipc, cost))
        by_networks.append((f"{one.method}{data}", len(one.config.networks.architectures), cost))
    blocks: list[Block] = []
    panels = [(SHOWN[quantity][0], _lines(points)) for quantity, points in scored.items()]
    panels = [(name, lines) for name, lines in (*panels, ("seconds a step", _lines(by_ipc))) if lines]
    if panels:
        png = _drawn(lambda path: charts.curves(panels, "images a class", path))
        said = "Against the number of images a class: means, and standard deviations over networks and chains."
        blocks.append(Picture(png, "00-by-ipc", said))
    if lines := _lines(by_networks):
        png = _drawn(lambda path: charts.curves([("seconds a step", lines)], "networks distilled on", path))
        blocks.append(Picture(png, "00-by-networks", "What a step costs (median), against the number of networks."))
    return blocks


Point = tuple[str, int, tuple[float, float] | None]
"""(label, x, (mean, standard deviation) where there is one)."""


def _lines(points: Sequence[Point]) -> list[charts.Curve]:
    """A curve for each label that has more than one x; of points with the same x the mean."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for label, x, value in points:
        if value is not None:
            found.setdefault(label, {}).setdefault(x, []).append(value)
    return [
        charts.Curve(label, [(x, *_mean_of(by_x[x])) for x in sorted(by_x)])
        for label, by_x in found.items()
        if len(by_x) > 1
    ]


def _mean_of(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(mean for mean, _ in values), statistics.fmean(spread for _, spread in values)


def _spread(by_architecture: dict[str, dict[str, Values]], quantity: str) -> tuple[float, float] | None:
    """Mean and standard deviation of a coreset over networks and chains."""
    scale = SHOWN[quantity][1]
    values = [scale * value for its in by_architecture.values() for value in its[quantity] if value is not None]
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def _pictures(found: EndedRun, number: str) -> list[Block]:
    run, blocks = found.run, list[Block]()
    if found.method != "random" and run.random_path.exists():
        before = coreset.load(run.random_path)
        if before.images.shape[1] in (1, 3):
            pixels = denormalise(before.images, before.mean, before.std).numpy()
            title = "random real images, before step 1"
            png = _drawn(
                lambda path: image_grids.coreset_grid(pixels, before.labels.numpy(), before.classes, path, title)
            )
            blocks.append(Picture(png, f"{number}-before", "Before: the real images that distillation starts from."))
    if run.picture_path.exists():
        what = "The real images." if found.method == "random" else "After: the coreset."
        blocks.append(Picture(image(run.picture_path), f"{number}-coreset", what))
    if run.over_time_path.exists():
        said = f"Over the steps: the first image of each class, of at most {run_figures.FOLLOWED}."
        blocks.append(Picture(image(run.over_time_path), f"{number}-over-time", said))
    if found.rows:
        blocks += _course(found, number)
    if run.reliability_path.exists():
        said = (
            "Reliability, of the predictions of all chains put together (the table has the mean ECE of single chains): "
            "a calibrated model is right as often as it is confident (dashed)."
        )
        blocks.append(Picture(image(run.reliability_path), f"{number}-reliability", said))
    return blocks


def _course(found: EndedRun, number: str) -> list[Block]:
    """Loss, its terms, the MAP solves and the looks at the validation split over the steps."""
    windows: list[int] = []
    png = _drawn(lambda path: windows.append(run_figures.course(found.rows, found.method, path)))
    if not png:
        return []
    smooth = f" Bold: the mean over {windows[0]} steps; faint: every step." if windows[0] > 1 else ""
    return [Picture(png, f"{number}-steps", f"The course of the distillation, a line for each network.{smooth}")]


def _later(found: EndedRun, number: str) -> list[Block]:
    """What `fbpc evaluate` found afterwards."""
    blocks: list[Block] = []
    for index, each in enumerate(found.later, 1):
        series = [Series(name, scores) for name, scores in each.scores.items()]
        strange = f"; AUROC (higher is better): how well its uncertainty tells {each.ood}" if each.ood else ""
        blocks += [Heading(f"Evaluated later: {each.name}", 3), Text(f"On the {each.split} split{strange}.")]
        blocks += [_scores(series), _every_value(series)]
        for place_of, (kind, png) in enumerate(each.pictures, 1):
            blocks.append(Picture(png, f"{number}-later-{index:02d}-{place_of:02d}", kind.replace(".", ", ")))
    return blocks


# The end of the page

LOAD = """import json
from safetensors import safe_open

with safe_open({path!r}, "pt") as file:
    images, labels = file.get_tensor("images"), file.get_tensor("labels")
    facts = file.metadata()
mean, std, classes = (json.loads(facts[name]) for name in ("mean", "std", "classes"))
# images: {shape} float32, normalised by channel: pixels in 0..1 are images * std + mean
# labels: ({count},) int64, indices into classes"""
REMOTE = """from fbpc_ray.core.storage import place
from fbpc_ray.data import coreset

images, labels, mean, std, classes = coreset.load(place({path!r}))
# images: {shape} float32, normalised by channel: pixels in 0..1 are images * std + mean
# labels: ({count},) int64, indices into classes"""


def _taking_away(found: Sequence[EndedRun]) -> list[Block]:
    blocks: list[Block] = [Heading("To use the coreset" if len(found) == 1 else "To use the coresets")]
    for each in found:
        images, path = each.coreset.images, each.run.coreset_path
        form = REMOTE if isinstance(path, Remote) else LOAD
        if each.label:
            blocks.append(Heading(each.name, 3))
        code = form.format(path=str(path), shape=tuple(images.shape), count=len(images))
        blocks.append(Code(code, "python"))
    run = shlex.quote(str(found[0].run.folder))
    lines = f"fbpc export {run} --format hf --out my-coreset\nfbpc evaluate {run} --architectures convnet-ln"
    return [*blocks, Text("As a data set that `datasets` loads, and judged on another network:"), Code(lines, "sh")]


def _provenance(found: Sequence[EndedRun]) -> list[Block]:
    versions = [one.result["versions"] for one in found]
    names = _order(name for one in versions for name in one)
    lines = [["", *(one.label or "this run" for one in found)]]
    lines += [[name, *(str(one.result[name]) for one in found)] for name in ("commit", "device")]
    lines += [["CPU threads", *(str(one.result.get("threads", "-")) for one in found)]]
    lines += [[f"{name} version", *(str(one.get(name, "-")) for one in versions)] for name in names]
    return [Heading("Made by"), Table(lines)]
