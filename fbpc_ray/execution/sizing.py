"""Choose the sizes of a run once its data is known (core/sizes.py), and log them."""

import os
from collections.abc import Collection

from fbpc_ray.core import presets, sizes
from fbpc_ray.core.config import Config
from fbpc_ray.core.durations import describe_seconds
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.sizes import LEVELS, Facts, Level, SizeRequest, Sizes
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.execution import validation
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.session import Session, load_data, open_session
from fbpc_ray.execution.timing import measure


def open_sized_session(
    config: Config, request: SizeRequest | None, log: Log, shown: Collection[str] | None = None
) -> Session:
    """Load the data set, choose the sizes that `request` asks for, and open a session. Raises UserError.

    Args:
        shown: settings that the table may have; None: all.
    """
    if request is None:
        return open_session(config, log)
    dataset = load_data(config, log)
    config = with_sizes(config, dataset, request, log, shown)
    validation.check(config)
    return open_session(config, log, dataset)


def with_sizes(
    config: Config, dataset: Dataset, request: SizeRequest | None, log: Log, shown: Collection[str] | None = None
) -> Config:
    """Return `config` with the settings that `request` leaves to the choice; log their table."""
    if request is None:
        return config
    name = request.preset or ("gpu" if local_device(config) == "cuda" else "laptop")
    facts, level = facts_of(config, dataset, request), LEVELS[name]
    if request.budget:
        level = level._replace(seconds=request.budget, device=local_device(config))
        log(f"timing this machine, to choose what takes {describe_seconds(request.budget)}")
        chosen = _within_budget(config, dataset, facts, level)
    else:
        chosen = sizes.choose(facts, level)
    if chosen.choices:
        ipc, method = str(config.distillation.ipc), config.distillation.method
        paper = presets.default(config.data.data, ipc, "paper", method).flat()
        log(_heading(facts, level, "" if request.budget else name, chosen))
        choices = {name: choice for name, choice in chosen.choices.items() if shown is None or name in shown}
        log(sizes.describe(chosen._replace(choices=choices), paper) + "\n")
    return config.updated(**chosen.settings())


def facts_of(config: Config, dataset: Dataset, request: SizeRequest) -> Facts:
    """Collect the facts that the sizes depend on."""
    d, flat = config.distillation, config.flat()
    return Facts(
        len(dataset.train.labels), len(dataset.classes), dataset.image_shape, len(dataset.test.labels), d.ipc, d.method,
        config.networks.architectures, local_cores(), {name: flat[name] for name in request.flags if name in flat},
    )  # fmt: skip


def local_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_device(config: Config) -> str:
    """Return cpu or cuda: what a worker on this machine uses. Raises UserError for --device cuda without one."""
    return Serial(config.workers.device, Interruption(())).device


def _within_budget(config: Config, dataset: Dataset, facts: Facts, level: Level) -> Sizes:
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
        measured = measure(session, level.device, facts.cores)[1]
        chosen = chosen._replace(seconds=measured)
        if measured.total <= level.seconds or rung == ladder[0]:
            return chosen
        slowness = max(slowness, measured.total / max(estimated.total, 1e-3))
    raise AssertionError("the smallest rung is always taken")


def _heading(facts: Facts, level: Level, preset: str, chosen: Sizes) -> str:
    """Describe in three lines what the sizes were chosen from, their time, and how to choose others."""
    height, width = facts.image_shape[1:]
    device = sizes.describe_device(level.device, facts.cores)
    source = f"--preset {preset}" if preset else "--time-budget"
    limit, seconds = (describe_seconds(value) for value in (level.seconds, chosen.seconds.total))
    time = f"the run takes about {seconds}; the limit is {limit}"
    if chosen.seconds.total > level.seconds:
        smaller = "--image-size 32, " if height > 64 else ""
        time = (
            f"the run takes about {seconds}, above the limit of {limit}, with the smallest sizes; for less time give "
            f"{smaller}fewer images or a smaller --ipc"
        )
    return (
        f"sizes for {facts.images:,} training images of {facts.classes:,} classes, {height}x{width}, on {device} "
        f"({source}):\n{time}\n"
        "a flag overrides its row; other sizes: --preset quick | laptop | gpu | paper, or --time-budget 20m"
    )
