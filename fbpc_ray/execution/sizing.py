"""Choose the sizes of a run once its data is known (core/sizes.py), and log them."""

from collections.abc import Collection
from typing import NamedTuple

from fbpc_ray.core import cores, presets, sizes
from fbpc_ray.core.config import Config
from fbpc_ray.core.durations import describe_seconds
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log
from fbpc_ray.core.ranges import check_ranges
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.sizes import LEVELS, Facts, Level, SizeRequest, Sizes, TrainedNetworks
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.evaluation.last_layer import batch_images, num_networks
from fbpc_ray.execution import validation
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.session import Session, load_data, open_session
from fbpc_ray.execution.timing import Measured, measure


class Chosen(NamedTuple):
    """The choice of a run's sizes."""

    sizes: Sizes
    level: Level
    measured: Measured | None
    """The probe of --time-budget, whose estimate `sizes` has; None: the formula's estimate, for all cores."""
    serial: bool = False
    """Whether the run has one process."""

    @property
    def fits(self) -> bool:
        return self.sizes.seconds.total <= self.level.seconds


class SizedSession(NamedTuple):
    """A session with chosen sizes, and the facts of the choice that a plan prints."""

    session: Session
    limit: float = 0.0
    """Seconds that the sizes fit by the formula, which a probe may find too few; 0: nothing to compare with."""
    measured: Measured | None = None
    """The probe that chose the sizes."""


def open_sized_session(
    config: Config,
    request: SizeRequest | None,
    log: Log,
    shown: Collection[str] | None = None,
    *,
    planned: bool = False,
    experts_alone: bool = False,
) -> SizedSession:
    """Load the data set, choose the sizes that `request` asks for, and open a session. Raises UserError.

    Args:
        shown: settings that the table may have; None: all.
        planned: whether a plan follows, which has the estimate of the time; the table's heading then has none.
        experts_alone: whether the command trains experts and nothing else.
    """
    if request is None:
        return SizedSession(open_session(config, log, experts_alone=experts_alone))
    check_ranges(config.flat())
    dataset = load_data(config, log)
    chosen = _choose(config, dataset, request, log)
    facts = facts_of(config, dataset, request)
    time = _planned_time(facts, chosen) if planned else _time(facts, chosen, "; --dry-run times this machine")
    _log_table(config, dataset, request, chosen, time, log, shown)
    config = config.updated(**chosen.sizes.settings())
    validation.check(config)
    limit = chosen.level.seconds if chosen.measured is None and chosen.fits else 0.0
    session = open_session(config, log, dataset, experts_alone=experts_alone)
    return SizedSession(session, limit, chosen.measured)


def with_sizes(config: Config, dataset: Dataset, request: SizeRequest | None, log: Log) -> Config:
    """Return `config` with the settings that `request` leaves to the choice; log their table. Raises UserError."""
    if request is None:
        return config
    check_ranges(config.flat())
    chosen = _choose(config, dataset, request, log)
    _log_table(config, dataset, request, chosen, _time(facts_of(config, dataset, request), chosen), log)
    return config.updated(**chosen.sizes.settings())


def _choose(config: Config, dataset: Dataset, request: SizeRequest, log: Log) -> Chosen:
    """Choose by the formula, or for --time-budget by probes."""
    facts, level = facts_of(config, dataset, request), LEVELS[_level_name(config, request)]
    if not request.budget:
        return Chosen(sizes.choose(facts, level), level, None, config.workers.backend == "serial")
    level = level._replace(seconds=request.budget, device=local_device(config))
    log(f"timing this machine, to choose the largest sizes that fit {describe_seconds(request.budget)}")
    return _within_budget(config, dataset, facts, level)


def _level_name(config: Config, request: SizeRequest) -> str:
    return request.preset or ("gpu" if local_device(config) == "cuda" else "laptop")


def _log_table(
    config: Config,
    dataset: Dataset,
    request: SizeRequest,
    chosen: Chosen,
    time: str,
    log: Log,
    shown: Collection[str] | None = None,
) -> None:
    """Log the chosen settings beside the paper's, and why, below a line on their `time`; nothing where none is left."""
    choices = chosen.sizes.choices
    if not choices:
        return
    ipc, method = str(config.distillation.ipc), config.distillation.method
    paper = presets.default(config.data.data, ipc, "paper", method).flat()
    source = "--time-budget" if request.budget else f"--preset {_level_name(config, request)}"
    log(_heading(facts_of(config, dataset, request), chosen, source, time))
    choices = {name: choice for name, choice in choices.items() if shown is None or name in shown}
    log(sizes.describe(chosen.sizes._replace(choices=choices), paper) + "\n")


def facts_of(config: Config, dataset: Dataset, request: SizeRequest) -> Facts:
    """Collect the facts that the sizes depend on: the backend is none of them, since it changes no result."""
    d, e, flat = config.distillation, config.evaluation, config.flat()
    m = d.ipc * len(dataset.classes)
    trained = TrainedNetworks(num_networks(e), e.net_steps, batch_images(e, m))
    return Facts(
        len(dataset.train.labels), len(dataset.classes), dataset.image_shape, len(dataset.test.labels), d.ipc, d.method,
        config.networks.architectures, cores.available(), {name: flat[name] for name in request.flags if name in flat},
        d.views or 1, d.draws_per_step, None if e.inference == "sghmc" else trained,
    )  # fmt: skip


def local_device(config: Config) -> str:
    """Return cpu or cuda: what a worker on this machine uses. Raises UserError for --device cuda without one."""
    return Serial(config.workers.device, Interruption(())).device


def _within_budget(config: Config, dataset: Dataset, facts: Facts, level: Level) -> Chosen:
    """Choose the largest rung that fits by a probe: go down the ladder from the one that the formula names."""
    ladder, slowness = sizes.rungs(facts), 1.0
    for rung in reversed(ladder):
        estimated = sizes.estimate(facts, rung, level.device)
        chosen = sizes.choose(facts, level, rung)
        if slowness * estimated.total > level.seconds and rung != ladder[0]:
            continue
        try:
            session = open_session(config.updated(**chosen.settings()), lambda line: None, dataset)
        except UserError:  # of memory: a smaller rung may fit
            if rung == ladder[0]:
                raise
            continue
        validation.check(session.config)
        measured = measure(session, level.device, facts.cores)
        seconds = measured.seconds
        if seconds.total <= level.seconds or rung == ladder[0]:
            return Chosen(chosen._replace(seconds=seconds), level, measured)
        slowness = max(slowness, seconds.total / max(estimated.total, 1e-3))
    raise AssertionError("the smallest rung is always taken")


def _heading(facts: Facts, chosen: Chosen, source: str, time: str) -> str:
    """Describe in three lines what the sizes were chosen from, their time, and how to choose others."""
    height, width = facts.image_shape[1:]
    device = sizes.describe_device(chosen.level.device, facts.cores)
    return (
        f"sizes for {facts.images:,} training images of {facts.classes:,} classes, {height}x{width}, on {device} "
        f"({source}):\n{time}\n"
        "a value that you give replaces the one chosen here; other sizes: --preset quick | laptop | gpu | paper, or "
        "--time-budget 20m"
    )


def _time(facts: Facts, chosen: Chosen, hint: str = "") -> str:
    """Compare the estimate of the time with the limit; `hint` follows an estimate by the formula."""
    limit, seconds = (describe_seconds(value) for value in (chosen.level.seconds, chosen.sizes.seconds.total))
    origin = "timed on this machine" if chosen.measured else f"by a formula{hint}"
    serial = describe_seconds(chosen.sizes.serial)
    alone = f" with Ray, {serial} in this process" if chosen.serial and serial != seconds else ""
    estimate = f"experts, distillation and evaluation take about {seconds}{alone} ({origin})"
    if chosen.fits:
        return f"{estimate}; the limit is {limit}"
    return f"{estimate}, above the limit of {limit}, with the smallest sizes; {_advice(facts)}"


def _planned_time(facts: Facts, chosen: Chosen) -> str:
    """Name the limit: a plan has the estimate itself."""
    limit = describe_seconds(chosen.level.seconds)
    if chosen.fits:
        return f"chosen for at most {limit}; the plan below has the time on this machine"
    return f"the smallest sizes, which are above the limit of {limit}; {_advice(facts)}"


def _advice(facts: Facts) -> str:
    smaller = "--image-size 32, " if facts.image_shape[1] > 64 else ""
    return f"for less time give {smaller}fewer images or a smaller --ipc"
