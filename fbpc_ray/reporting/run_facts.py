"""Facts of runs: their settings and their provenance."""

from collections.abc import Sequence

from fbpc_ray.core.addresses import redacted
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.evaluation.results import finite, unique
from fbpc_ray.execution.session import uses_experts
from fbpc_ray.reporting.document import Block, Heading, Table
from fbpc_ray.reporting.run_reader import EndedRun

METHODS = {
    "fbpc": "FBPC: divergence of function-space posteriors (Algorithm 1)",
    "fbpc-isotropic": "FBPC with an isotropic posterior (Psi = I)",
    "bpc-fkl": "BPC-fKL: forward KL of weight-space posteriors",
    "bpc-rkl": "BPC-rKL: reverse KL of weight-space posteriors",
    "bpc-w": "BPC-W: Wasserstein distance of weight-space posteriors",
    "vbpc": "VBPC: a Bayesian last layer in closed form, on a pool of networks; learned labels, no experts",
    "frepo": "FRePo: ridge regression on the features of a pool of networks; learned labels, no experts",
    "random": "Random real images: nothing is learned",
}

LAST_BITS = {"threads", "device", "compiled", "compiled_chains"}
"""Settings that change the last bits of a result."""


def method_name(run: EndedRun) -> str:
    return METHODS[run.method].split(":")[0]


def heading_of(run: EndedRun) -> str:
    """Name a run in words: its letter, method, data set and size."""
    ipc = run.config.distillation.ipc
    size = f"{ipc} image{'' if ipc == 1 else 's'} per class"
    return f"{f'Run {run.label}: ' if run.label else ''}{method_name(run)} on {run.result['data']}, {size}"


def facts_of(run: EndedRun) -> list[tuple[str, str]]:
    c, result = run.config, run.result
    d, images = c.distillation, run.coreset.images
    facts = [
        ("Method", METHODS[run.method]),
        ("Data", f"{result['data']}, {len(run.coreset.classes)} classes, images of {_shape(run.coreset)}"),
        ("Coreset", f"{len(images):,} images, {d.ipc} per class"),
        ("Networks", f"{', '.join(c.networks.architectures)}; width {c.networks.width}"),
        ("Augmentation", c.networks.augment),
    ]  # fmt: skip
    if run.method != "random":
        seconds = finite(result.get("seconds_per_step"))
        pace = f", {seconds:.3g} s each (median)" if seconds is not None else ""
        facts.append(("Steps", f"{result['steps']:,}{pace}; seed {d.seed}"))
    if d.initial_coreset:
        facts.append(("Begun as", redacted(d.initial_coreset)))
    if uses_experts(c):
        count, epochs = c.experts.expert_count, c.experts.expert_epochs
        facts.append(("Experts", f"{count} for each network, of {epochs} epochs"))
    if endings := result.get("map_endings"):
        facts.append(("MAP solves", ", ".join(f"{count} {ending}" for ending, count in endings.items())))
    return [*facts, ("Folder", str(run.run.folder))]


def _shape(coreset: Coreset) -> str:
    channels, height, width = coreset.images.shape[1:]
    return f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}"


def provenance(runs: Sequence[EndedRun]) -> list[Block]:
    versions = [one.result["versions"] for one in runs]
    names = unique(name for one in versions for name in one)
    lines = [["", *(one.label or "this run" for one in runs)]]
    lines += [[name, *(str(one.result[name]) for one in runs)] for name in ("commit", "device")]
    lines += [["CPU threads", *(str(one.result.get("threads", "-")) for one in runs)]]
    lines += [[f"{name} version", *(str(one.get(name, "-")) for one in versions)] for name in names]
    return [Heading("Made by"), Table(lines)]
