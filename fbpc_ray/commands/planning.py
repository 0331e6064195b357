"""`--dry-run`: print the plan of a run. Writes nothing."""

import math
from collections.abc import Sequence

import numpy as np

from fbpc_ray.core import cores
from fbpc_ray.core.cache import folder as cache_folder
from fbpc_ray.core.durations import describe_seconds
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log
from fbpc_ray.core.sizes import describe_device
from fbpc_ray.core.storage import Place
from fbpc_ray.core.tables import text_table
from fbpc_ray.data.datasets import Split
from fbpc_ray.distillation.trajectory_cache import bytes_of_a_snapshot
from fbpc_ray.evaluation.last_layer import num_networks
from fbpc_ray.execution import advice, memory_estimate, sizing
from fbpc_ray.execution.memory_estimate import count_parameters
from fbpc_ray.execution.session import Session, phases_of
from fbpc_ray.execution.timing import Measured, measure, snapshots_met
from fbpc_ray.execution.worker_group import compiles_passes, trajectory_cache_bytes, trajectory_shapes

PARTS = ("experts", "distillation", "chains")
PARTS_OF_PHASES = {"experts": "experts", "distillation": "distillation", "evaluation": "chains"}
PROCESS_BYTES = 5e8
"""Memory of a process that has torch loaded."""
SPLITS = {"train": "training", "validation": "validation", "test": "test"}
FILES = (
    "config.json, result.json, metrics.parquet, checkpoint/",
    "coreset/coreset.safetensors, coreset/random.safetensors",
    "before.png, coreset.png, over-time.png, course.png, reliability.png",
)


def describe(
    session: Session, parts: Sequence[str] = PARTS, run: Place | None = None, limit: float = 0.0,
    measured: Measured | None = None,
) -> None:  # fmt: skip
    """Print what a command would do: data, networks, seconds, disk, memory, notes, files.

    Args:
        parts: those of `PARTS` that the command has.
        run: the run directory; None for a command that makes none.
        limit: seconds that the sizes fit by the formula; 0: nothing to compare with.
        measured: the probe that chose the sizes; None: time the machine now.

    Raises UserError for an --ipc that a class can't fill, after the plan.
    """
    problem = _problem(session)
    _describe_data(session)
    _describe_networks(session)
    if problem is None:
        device, num_cores = sizing.local_device(session.config), cores.available()
        if measured is None:
            log(f"\ntiming a few passes on {describe_device(device, num_cores)} ...")
            measured = measure(session, device, num_cores)
        _describe_time(session, measured, parts, device, limit)
        log(f"memory   {_memory(session, parts, device, num_cores)}")
    if "experts" in parts and (session.stores or run):
        log(f"disk     {_disk(session, parts)}")
    notes = advice.training_notes(session) + (advice.notes(session) if "distillation" in parts else [])
    log("\n" + "\n".join(notes) if notes else "\nno warnings")
    if run is not None:
        _describe_files(session, run)
    log("\ndry run: nothing was written")
    if problem is not None:
        raise problem


def _problem(session: Session) -> UserError | None:
    if session.coresets or session.experts_alone:
        return None
    try:
        _ = session.current
    except UserError as error:
        return error
    return None


def _describe_data(session: Session) -> None:
    data = session.dataset
    c, height, width = data.image_shape
    kind = {1: "grey", 3: "colour"}.get(c, f"{c}-channel")
    log(
        f"data     {data.name}: {len(data.classes):,} classes of {kind} images, {height}x{width} pixels\n"
        f"         {'; '.join(_count(getattr(data, name), word) for name, word in SPLITS.items())}"
    )
    if session.coresets:
        one = session.coresets[session.scored[-1]]
        method = f", by {one.facts['method']}" if "method" in one.facts else ""
        log(f"coreset  {_per_class(one.labels.numpy(), '')}{method}")
    elif not session.experts_alone:
        d = session.config.distillation
        log(f"coreset  {d.ipc * len(data.classes):,} images, {d.ipc} per class, by {d.method}")


def _count(split: Split, name: str) -> str:
    return _per_class(split.labels, f"{name} ") if len(split.labels) else f"no {name} images"


def _per_class(labels: np.ndarray, kind: str) -> str:
    counts = np.bincount(labels)
    least, most = counts.min(), counts.max()
    spread = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"{len(labels):,} {kind}images, {spread} per class"


def _describe_networks(session: Session) -> None:
    for number, spec in enumerate(session.specs):
        width = f", width {spec.width}" if spec.width else ""
        depth = f", depth {spec.depth}" if spec.depth else ""
        count = count_parameters(spec)
        log(f"{'network' if not number else '':<9}{spec.architecture}: {count:,} parameters{width}{depth}")


def _describe_time(session: Session, measured: Measured, parts: Sequence[str], device: str, limit: float) -> None:
    c, (timings, seconds) = session.config, measured
    work = {
        "experts": _experts(session),
        "distillation": f"{session.num_steps:,} steps",
        "chains": _chains(session),
    }
    if c.distillation.method.startswith("fbpc"):
        map_steps = sum(timing.map_steps for timing in timings) / len(timings)
        solves = f"{len(timings)} MAP solve{'s' if len(timings) > 1 else ''}"
        work["distillation"] += f", each with {solves} of about {map_steps:.0f} Adam steps at first"
    rows = [(part, describe_seconds(getattr(seconds, part)), work[part]) for part in PARTS if part in parts]
    total = sum(getattr(seconds, part) for part in parts)
    ray = "; Ray starts in 10 to 20 s more" if c.workers.backend == "ray" else ""
    rows.append(("total", describe_seconds(total), f"estimated from passes timed here, right to a factor of two{ray}"))
    log(text_table(("part", "time", "what"), rows))
    if 0 < limit < total:
        log(
            f"above the {describe_seconds(limit)} that a formula chose the sizes for; `--time-budget {limit:.0f}s` "
            "chooses them by the timing of this machine"
        )
    if "distillation" in parts and device == "cpu" and compiles_passes(c, session.dataset, session.specs):
        log("the run is long enough to compile its passes: a minute or two once, then up to twice as fast")
    if c.workers.address:
        log("the times are those of this machine, not of the cluster")


def _experts(session: Session) -> str:
    if not session.stores:
        return "none: the method needs no experts"
    count = session.config.experts.expert_count
    missing = sum(len(store.missing(count)) for store in session.stores)
    return f"{missing} experts to train, {count * len(session.stores) - missing} are in {_folder(session)}"


def _chains(session: Session) -> str:
    e, names = session.config.evaluation, session.scored
    count = len(names) * len(session.specs) * e.num_chains
    if e.inference != "sghmc":
        return f"{count * num_networks(e)} trained networks ({e.inference})"
    random = {("random",): ", on random images", ("random", names[-1]): ", half on random images"}.get(tuple(names), "")
    return f"{count} chains of {e.chain_epochs:,} epochs{random}, and their predictions"


def _folder(session: Session) -> str:
    folders = {str(store.folder) for store in session.stores}
    return folders.pop() if len(folders) == 1 else f"{len(folders)} folders"


def describe_bytes(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= 0.95 * unit:
            return f"{count / unit:.1f} {name}" if count < 9.5 * unit else f"{count / unit:,.0f} {name}"
    return f"{max(1.0, count / 1e3):.0f} kB"


def _memory(session: Session, parts: Sequence[str], device: str, num_cores: int) -> str:
    """Describe the memory of a run: processes, images, networks and their passes."""
    c, data = session.config, session.dataset
    images = sum(split.images.nbytes for split in (data.train, data.validation, data.test))
    workers = num_cores if c.workers.backend == "ray" else 0
    networks = memory_estimate.estimate(
        c, session.specs, [phase for phase in phases_of(c) if PARTS_OF_PHASES[phase] in parts],
        images=len(data.train.labels), coreset=c.distillation.ipc * len(data.classes), at_once=max(1, workers),
    )  # fmt: skip
    total = (1 + workers) * PROCESS_BYTES + images + networks
    count = f"{1 + workers} processes" if workers else "one process"
    rest = f"networks and their passes {describe_bytes(networks)}"
    on_gpu = "; the passes on the GPU need more, there" if device != "cpu" else ""
    return f"about {describe_bytes(total)}: {count}, images {describe_bytes(images)}, {rest}{on_gpu}"


def _disk(session: Session, parts: Sequence[str]) -> str:
    """Describe the disk space of experts, trajectory cache and run."""
    c = session.config
    size = 2 if c.experts.expert_dtype == "float16" else 4
    counts = [count_parameters(spec) for spec in session.specs]
    experts = sum(
        len(store.missing(c.experts.expert_count)) * (c.experts.expert_epochs + 1) * size * count
        for store, count in zip(session.stores, counts, strict=False)
    )
    words = [f"{describe_bytes(experts)} for experts"] if experts else []
    if "distillation" in parts:
        most = trajectory_cache_bytes(c, session.specs)
        if cache_bytes := snapshots_met(c) * bytes_of_a_snapshot(trajectory_shapes(c, session.specs), most):
            words.append(f"up to {describe_bytes(min(most, cache_bytes))} for the cache of K steps in {cache_folder()}")
        m = c.distillation.ipc * len(session.dataset.classes)
        pixels = math.prod(session.dataset.image_shape)
        words.append(f"{describe_bytes(24 * 4 * m * pixels + 1e6)} for the run")
    return "; ".join(words) or "nothing: the experts are there"


def _describe_files(session: Session, run: Place) -> None:
    out = session.config.output
    log(f"\nfiles    {run}/")
    for line in FILES:
        log(f"         {line}")
    if session.stores:
        log(f"         experts: {_folder(session)}")
    if out.tracking:
        log(f"         and a run of the MLflow experiment {out.experiment} (--no-tracking: none)")
