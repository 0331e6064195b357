"""`fbpc tune`: a sweep, from its settings to its last printed line."""

import io
import json as json_format
import shlex
import uuid
from collections import Counter
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core import files
from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import (
    MAY_CHANGE_ON_RESUME,
    NOT_STARTED,
    Config,
    Evaluation,
    Experts,
    Networks,
    Sweep,
    current_names,
    never_from_a_file,
    read_config,
    to_json,
)
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.presets import to_preset
from fbpc_ray.core.progress import log, resume_hint
from fbpc_ray.core.provenance import Provenance, capture, home
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import Place, place
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.run_directory import RunDirectory, check_resume
from fbpc_ray.evaluation import results
from fbpc_ray.execution import validation
from fbpc_ray.execution.session import cpu_threads, load_data, network_specs, open_backend, open_session
from fbpc_ray.models import custom
from fbpc_ray.reporting.run_outputs import LiveRun, evaluate_run
from fbpc_ray.tuning import trial
from fbpc_ray.tuning.monitor import OpenSweep, Plan, SweepMonitor, open_monitor
from fbpc_ray.tuning.trial import Task

MAY_CHANGE = MAY_CHANGE_ON_RESUME - {f.name for f in fields(Evaluation)} - {"steps", "checkpoint_every", "val_every"}
"""Flags of a sweep that don't change what its trials find."""


def tune(base: Config, settings: Sweep, *, resume: bool, trusted: bool, dry_run: bool, json: str) -> None:
    """Draw, run and compare trials; judge the best on the test images, once. `trusted`: what --space names, which may
    name networks to import, was given on the command line, not by a file alone."""
    folder = _folder(base, resume)
    path = folder / "result.json"
    if resume and path.exists():
        with undamaged(path, "delete it, and the best trial is judged again"):
            result = json_format.loads(path.read_text())
        log(f"this sweep is complete\n\n{(folder / 'trials.md').read_text()}")
        files.write_output(json, result)
        return
    found = _prepared(base, settings, folder, resume, trusted, dry_run)
    if dry_run:
        _describe(found)
        return
    with files.exclusive_directory(folder):
        if not resume:
            RunDirectory(folder).refuse_if_taken()  # by one that began when this one did, and is through
            _write_plan(found)
        result, monitor = _run_sweep(found)
    files.write_output(json, result)
    log(f"\n{(folder / 'trials.md').read_text()}")
    log(f"best:    trial {result['best']['trial']}, {trial.told(result['best']['flags'])}")
    log(f"\n{results.table(results.from_json(result['test']['coresets']))}\n")
    log(f"preset:  fbpc distill --preset {shlex.quote(str(folder / 'best.json'))}")
    log(f"run:     {found.task.configs[result['best']['trial']].output.out}")
    log(f"result:  {path}")
    monitor.print_addresses()


def _run_sweep(found: OpenSweep) -> tuple[dict[str, Any], SweepMonitor]:
    """The result, and what was shown of it on the way."""
    folder, interruption = found.folder, Interruption()
    flags = never_from_a_file(found.base)
    repeated = [word for name, words in flags.items() if name != "out" for word in words]
    again = f"resume with: {shlex.join(['fbpc', 'tune', '--out', str(folder), '--resume', *repeated])}"
    with resume_hint(again), open_backend(found.base, interruption, log) as workers:
        log(f"sweep: {folder}")
        provenance = capture(workers.describe())
        d = found.dataset
        log(f"data: {d.name}, {len(d.train.labels)} images to train, {len(d.validation.labels)} to validate")
        with open_monitor(found, provenance) as monitor:
            _train_shared_experts(found, workers)
            from fbpc_ray.tuning import ray_tune as trials  # open_backend has raised if Ray is missing

            monitor.start()
            trials.run(found.task, monitor.outcomes, workers, interruption, monitor, log)  # type: ignore[arg-type]
            monitor.close_bar()
            result = _conclude(found, monitor, workers, provenance)
    return result, monitor


def _folder(base: Config, resume: bool) -> Place:
    out = base.output.out
    data = Path(base.data.data.split(":")[-1]).name
    name = f"{datetime.now():%Y%m%d-%H%M%S}-tune-{data}-ipc{base.distillation.ipc}"
    run = RunDirectory(place(out) if out else home() / "outputs" / name)
    if not resume:
        run.refuse_if_taken()
    return run.folder


def _prepared(base: Config, settings: Sweep, folder: Place, resume: bool, trusted: bool, dry_run: bool) -> OpenSweep:
    """The trials, all of them checked. Writes nothing. Raises UserError."""
    base, kept = validation.canonical(base), None
    validation.check(base)
    _check(base, settings)
    if resume:
        kept = read_plan(folder)
        if replace(settings, workers_per_trial=0) != replace(kept.settings, workers_per_trial=0):
            raise UserError("--resume of another sweep than the stored one: leave its flags out, or take another --out")
        stored = read_base(folder)
        if base.workers.threads == 0:
            base = base.updated(threads=stored.workers.threads)
        check_resume(stored, base, MAY_CHANGE)
        kept = kept._replace(settings=settings)
    else:
        base = base.updated(threads=cpu_threads(base), out=str(folder))
    dataset = load_data(base.updated(download=base.data.download and not dry_run), log)
    if kept is None:
        kept = Plan(folder.name, uuid.uuid4().hex, settings, _draw(base, settings, len(dataset.classes)))
    if resume and not trusted:
        _refuse_untrusted(kept, base, folder)
    root = place(base.experts.experts) if base.experts.experts else home() / "experts"
    placed = base.updated(experts=str(root.absolute()))  # a trial has another working directory
    configs = [trial.config_of(placed, each, settings, folder, number) for number, each in enumerate(kept.trials)]
    for config in {each.networks: each for each in configs}.values():
        network_specs(config, dataset)
    return OpenSweep(folder, base, kept, task_of(configs, dataset, settings), dataset)


def _refuse_untrusted(stored: Plan, base: Config, folder: Place) -> None:
    """Raise UserError if the trials of a stored sweep have code or destinations that the command line doesn't name."""
    for number, flags in enumerate(stored.trials):
        if shared := sorted(trial.SHARED & flags.keys()):
            flag = f"--{shared[0].replace('_', '-')}"
            raise UserError(f"{folder}/sweep.json: trial {number} sets {flag}, which is the same for all trials")
        names, experts = flags.get("architectures", []), flags.get("experts", "")
        foreign = [f"{name}, but a file alone imports no code" for name in names if ":" in name]
        if "://" in experts and experts != base.experts.experts:
            foreign.append(f"--experts {redacted(experts)}, but a file alone opens no object store")
        if foreign:
            raise UserError(f"{folder} asks for {foreign[0]}: repeat --space to trust it")


def task_of(configs: list[Config], dataset: Dataset, settings: Sweep) -> Task:
    """What trials get: all but the test images."""
    return Task(configs, trial.without_test_split(dataset), settings)


def _check(base: Config, settings: Sweep) -> None:
    if base.workers.backend != "ray":
        raise UserError("--backend serial runs no sweep: leave it out, Ray runs on one machine too")
    if not base.data.validation:
        raise UserError("--validation is 0: a sweep chooses on the validation split, never on test data; give 0.1")
    for name in ("num_trials", "val_chain_epochs", "workers_per_trial"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)}: it must be 0 or more")
    if settings.val_chains < 1:
        raise UserError(f"--val-chains is {settings.val_chains}: it must be 1 or more")


def _draw(base: Config, settings: Sweep, classes: int) -> list[dict[str, Any]]:
    """The flags of each trial. Raises UserError."""
    try:
        from fbpc_ray.tuning import search_space as spaces
    except ImportError as error:
        raise UserError(f"ray is not installed ({error}): pip install 'ray[default,tune]'") from None
    grid = trial.grid_of(settings.grid)
    if settings.space:
        space = trial.checked(custom.import_object(settings.space, "--space", "NAME"), f"--space {settings.space}")
    else:
        space = {} if grid else spaces.default_space(base, classes)
    if grid:
        trial.checked(grid, "--grid")
    number = settings.num_trials or (8 if space else 1)
    drawn = [
        current_names(each) for each in spaces.variants(spaces.gridded(space, grid), number, base.distillation.seed)
    ]
    if not drawn:
        raise UserError("the space has no trial: give each flag a value to try")
    return drawn


def _write_plan(found: OpenSweep) -> None:
    text = {**found.plan._asdict(), "settings": asdict(found.plan.settings)}
    files.write_text(found.folder / "sweep.json", json_format.dumps(text, indent=1) + "\n")
    files.write_checked_json(found.folder / "config.json", found.base.flat())  # last: now there is a sweep


def read_plan(folder: Place) -> Plan:
    """How the sweep in `folder` was drawn. Raises UserError where there is none."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no sweep (no sweep.json): check the path, or start one without --resume")
    with undamaged(path, "start the sweep again in another --out"):
        plan = json_format.loads(path.read_text())
        settings = {**current_names(plan["settings"]), "grid": tuple(plan["settings"]["grid"])}
        settings.pop("val_every", None)  # of earlier code, see `read_base`
        return Plan(plan["name"], plan["id"], Sweep(**settings), [current_names(each) for each in plan["trials"]])


def read_base(folder: Place) -> Config:
    """Read what all trials of the sweep in `folder` share. Raises UserError.

    Earlier code kept --val-every in sweep.json, as evaluate_every.
    """
    path = folder / "sweep.json"
    base = read_config(folder, NOT_STARTED)
    with undamaged(path, "start the sweep again in another --out"):
        every = json_format.loads(path.read_text())["settings"].get("evaluate_every", 0)
    return base.updated(val_every=every) if every else base


def _describe(found: OpenSweep) -> None:
    """--dry-run: what would be done."""
    log(to_json(found.base).rstrip())
    for number, flags in enumerate(found.plan.trials):
        log(f"trial {number}: {trial.told(flags)}")
    counts = {part: len(getattr(found.dataset, part).labels) for part in ("train", "validation", "test")}
    log(f"data: {found.dataset.name}, {counts}; trials get no test image")
    log("dry run: nothing was written")


def _train_shared_experts(found: OpenSweep, workers: Any) -> None:
    """The experts of all trials, once, where these don't differ in how experts are made; else each trial makes its."""
    recipe = {name for group in (Networks, Experts) for name in group.__dataclass_fields__}
    if any(recipe & flags.keys() for flags in found.plan.trials) or not any(map(trial.steps_of, found.task.configs)):
        return
    open_session(found.task.configs[0], log, found.task.dataset).train_experts(workers, log)


def _conclude(found: OpenSweep, monitor: SweepMonitor, workers: Any, provenance: Provenance) -> dict[str, Any]:
    """The table, the best preset, its coreset judged on the test images, the result."""
    folder, metric = found.folder, found.plan.settings.metric
    outcomes = monitor.outcomes
    rows = trial.rows_of(outcomes, found.plan.trials)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    files.write_bytes(folder / "trials.parquet", buffer.getvalue())
    order = [each.number for each in trial.best_first(outcomes, metric)]
    rest = [each.number for each in outcomes if each.number not in order]
    files.write_text(folder / "trials.md", trial.markdown([rows[number] for number in order + rest]))
    if not order:
        raise UserError(f"no trial finished ({monitor.count_statuses()}): see why in {folder / 'trials.md'}", code=1)
    best = outcomes[order[0]]
    assert best.look is not None
    config = found.task.configs[best.number]
    given, every = found.base.experts.experts, found.base.distillation.checkpoint_every
    files.write_text(folder / "best.json", to_preset(config.updated(experts=given, checkpoint_every=every)))
    log(f"best: trial {best.number}, {metric} {getattr(best.look, metric):.4g} on the validation split; now on test")
    tested = _on_test(config, found.dataset, workers, provenance, monitor.parent)
    result = {
        "sweep": found.plan.name, "metric": metric, "scheduler": found.plan.settings.scheduler,
        "trials": dict(Counter(each.how for each in outcomes)),
        "best": {
            "trial": best.number, "flags": found.plan.trials[best.number],
            "validation": {name: getattr(best.look, name) for name in trial.SCORES},
        },
        "test": tested, "rows": rows,
    }  # fmt: skip
    files.write_json(folder / "result.json", result)
    for name in ("best.json", "trials.md", "trials.parquet", "result.json"):
        monitor.parent.log_artifact(folder / name)
    return result


def _on_test(config: Config, dataset: Dataset, workers: Any, provenance: Provenance, tracker: Any) -> dict[str, Any]:
    """The coreset of a finished trial, as it is, beside random images: files in its folder as of any run."""
    run, session = RunDirectory(place(config.output.out)), open_session(config, log, dataset)
    first, labels = session.initial
    state, rows = run.restore(labels, dataset.image_shape) or (first, [])
    return evaluate_run(LiveRun(session, run, workers, provenance, tracker), state, rows)
