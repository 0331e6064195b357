"""The trials of a sweep: drawn, kept in sweep.json, and checked when they are read again."""

import shlex
import sys
from collections.abc import Set
from contextlib import nullcontext
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from fbpc_ray.core import files, inputs
from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import NOT_STARTED, Config, Distillation, Sweep, current_names, read_config
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.presets import with_method
from fbpc_ray.core.progress import log
from fbpc_ray.core.sizes import SizeRequest
from fbpc_ray.core.storage import Place
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.execution.sizing import with_sizes
from fbpc_ray.models import custom
from fbpc_ray.tuning import trial


class Plan(NamedTuple):
    """Content of sweep.json."""

    name: str
    id: str
    settings: Sweep
    trials: list[dict[str, Any]]
    """Flags of each trial that differ from the base configuration."""
    fingerprint: str = ""
    """Of the data set; sweeps of earlier code have none."""


def draw_flags(base: Config, settings: Sweep, classes: int) -> list[dict[str, Any]]:
    """Draw the flags of each trial. Raises UserError."""
    if "ray" not in sys.modules:
        log("loading Ray Tune ...")
    try:
        from fbpc_ray.tuning import search_space
    except ImportError as error:
        raise UserError(f"ray is not installed ({error}): pip install 'ray[default,tune]'") from None
    grid = trial.parse_grid(settings.grid)
    if settings.space:
        space = trial.check_space(custom.import_object(settings.space, "--space", "NAME"), f"--space {settings.space}")
    else:
        space = {} if grid else search_space.default_space(base, classes)
    if grid:
        trial.check_space(grid, "--grid")
    count = settings.num_trials or (8 if space else 1)
    space = search_space.with_grid(space, grid)
    users = custom.user_code(settings.space, "--space", "NAME") if settings.space else nullcontext()
    with users:  # a space may hold functions
        drawn = [current_names(flags) for flags in search_space.draw_trials(space, count, base.distillation.seed)]
    if not drawn:
        raise UserError("--space: no trial to draw; give each flag at least one value")
    return drawn


def with_own_settings(
    trials: list[dict[str, Any]], base: Config, given: Set[str], dataset: Dataset, sizes: SizeRequest | None
) -> list[dict[str, Any]]:
    """Return the flags of trials such that one of another method runs as `fbpc distill` with that method.

    `trial_config` gives it the settings that the method brings: those that the command line names, and the steps and
    rates that are chosen for the data, must be among its flags. All trials have the same flags, for the tables.
    """
    d, values = base.distillation, base.flat()
    fixed = values.keys() - {f.name for f in fields(Distillation)}  # all trials have the same networks and chains
    settings, names = list[dict[str, Any]](), dict[str, None]()
    for flags in trials:
        method, ipc, own = flags.get("method", d.method), flags.get("ipc", d.ipc), base
        if method != d.method:
            own = with_method(base, method, ipc).updated(**{name: values[name] for name in given - {"method", "ipc"}})
            if sizes is not None:
                request = sizes._replace(flags=sizes.flags | fixed)
                own = with_sizes(own.updated(ipc=ipc), dataset, request, lambda line: None).updated(ipc=d.ipc)
            without = with_method(base, method, d.ipc).flat()
            names |= {name: None for name, value in own.flat().items() if value != without[name]}
        settings.append(own.flat())
    return [
        flags | {name: own[name] for name in names if name not in flags}
        for flags, own in zip(trials, settings, strict=True)
    ]


def write_plan(folder: Place, plan: Plan, base: Config) -> None:
    """Write sweep.json and config.json; the last makes the folder a sweep."""
    files.write_checked_json(folder / "sweep.json", {**plan._asdict(), "settings": asdict(plan.settings)})
    files.write_checked_json(folder / "config.json", base.flat())


def read_plan(folder: Place) -> Plan:
    """Read sweep.json: settings and trials of the sweep in `folder`. Raises UserError if there is none."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise UserError(f"{folder}: no sweep (sweep.json not found); check the path, or start one without --resume")
    with undamaged(path, "start the sweep again in another --out"):
        plan = inputs.read_checked_json(path)
        settings = {**current_names(plan["settings"]), "grid": tuple(plan["settings"]["grid"])}
        settings.pop("val_every", None)  # of earlier code, see `read_base`
        trials = [current_names(flags) for flags in plan["trials"]]
        return Plan(plan["name"], plan["id"], Sweep(**settings), trials, plan.get("fingerprint", ""))


def read_base(folder: Place) -> Config:
    """Read config.json: the settings that all trials of the sweep in `folder` share. Raises UserError.

    Earlier code stored --val-every in sweep.json, as evaluate_every.
    """
    path = folder / "sweep.json"
    base = read_config(folder, NOT_STARTED)
    with undamaged(path, "start the sweep again in another --out"):
        interval = inputs.read_checked_json(path)["settings"].get("evaluate_every", 0)
    return base.updated(val_every=interval) if interval else base


def refuse_untrusted(stored: Plan, base: Config, folder: Place) -> None:
    """Raise UserError if a stored sweep names code or destinations that the command line doesn't."""
    for number, flags in enumerate(stored.trials):
        if shared := sorted(trial.SHARED & flags.keys()):
            flag = f"--{shared[0].replace('_', '-')}"
            raise UserError(f"{folder}/sweep.json: trial {number} sets {flag}, which must be the same for all trials")
    if needed := foreign_source(stored, base):
        flags = redacted(shlex.join(source_flags(stored.settings)))
        fix = f"repeat {flags} on the command line if you trust it" if flags else "start a sweep in another --out"
        raise UserError(f"{folder} needs {needed}: {fix}")


def foreign_source(plan: Plan, base: Config) -> str:
    """Describe code or a store that a trial names and `base` does not; empty without one."""
    for flags in plan.trials:
        for name in flags.get("architectures", []):
            if ":" in name:
                return f"{name}, but a file alone imports no code"
        for name in ("experts", "initial_coreset"):
            if "://" in (path := flags.get(name, "")) and path != base.flat()[name]:
                return f"--{name.replace('_', '-')} {redacted(path)}, but a file alone opens no object store"
    return ""


def source_flags(settings: Sweep) -> list[str]:
    """Return the words of the command line that the trials are drawn from; none where they are the default space's."""
    return [
        *(["--space", settings.space] if settings.space else []), *(["--grid", *settings.grid] if settings.grid else [])
    ]  # fmt: skip
