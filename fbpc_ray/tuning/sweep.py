"""Run a sweep (`fbpc tune`): draw trials, run them, evaluate the best one on test, write result.json."""

import io
import json as json_format
import shlex
import uuid
from collections import Counter
from collections.abc import Set
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core import files, inputs
from fbpc_ray.core.config import (
    MAY_CHANGE_ON_RESUME,
    Config,
    Evaluation,
    Experts,
    Networks,
    Sweep,
    never_from_a_file,
)
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.presets import to_preset
from fbpc_ray.core.progress import log, resume_hint
from fbpc_ray.core.provenance import Provenance, capture, new_output
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.sizes import SizeRequest
from fbpc_ray.core.storage import Place, place
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.run_directory import RunDirectory, check_resume
from fbpc_ray.evaluation import calibration, protocols, results
from fbpc_ray.execution import advice, validation
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.session import (
    Session,
    check_memory,
    expert_root,
    load_data,
    network_specs,
    num_steps,
    open_session,
    uses_experts,
)
from fbpc_ray.execution.sizing import with_sizes
from fbpc_ray.execution.worker_group import cpu_threads
from fbpc_ray.reporting.run_outputs import LiveRun, evaluate_run
from fbpc_ray.tracking.protocol import Tracker
from fbpc_ray.tracking.run_contents import run_tags
from fbpc_ray.tuning import trial
from fbpc_ray.tuning.monitor import OpenSweep, SweepMonitor, open_monitor
from fbpc_ray.tuning.plan import (
    Plan,
    draw_flags,
    foreign_source,
    read_base,
    read_plan,
    refuse_untrusted,
    source_flags,
    with_own_settings,
    write_plan,
)
from fbpc_ray.tuning.trial import Task

MAY_CHANGE = MAY_CHANGE_ON_RESUME - {f.name for f in fields(Evaluation)} - {"steps", "checkpoint_every", "val_every"}
"""Flags of a sweep that don't change the results of its trials."""


def tune(
    base: Config, settings: Sweep, sizes: SizeRequest | None, *, given: Set[str], resume: bool, trusted: bool,
    dry_run: bool, json: str,
) -> None:  # fmt: skip
    """Draw, run and compare trials; evaluate the best one on the test images, once.

    Args:
        sizes: what to choose sizes by, around which trials vary; None where `base` has them.
        given: settings of `base` that the command line names.
        trusted: the command line names --space or --grid, so that the trials may import code and open stores.
        json: where to copy result.json.
    """
    folder = _folder(base, resume)
    path = folder / "result.json"
    if resume and path.exists():
        with undamaged(path, "delete it, and the best trial is evaluated again"):
            result = inputs.read_checked_json(path)
        table = folder / "trials.md"
        log(f"this sweep is complete\n\n{table.read_text() if table.exists() else trial.markdown(result['rows'])}")
        if not dry_run:
            files.write_output(json, result)
        return
    sweep = _prepare(base, settings, folder, resume, trusted, dry_run, None if resume else sizes, given)
    if dry_run:
        _describe(sweep)
        return
    with files.exclusive_directory(folder):
        if not resume:
            RunDirectory(folder).refuse_if_taken()  # by a process that started at the same time and has ended
            write_plan(folder, sweep.plan, sweep.base)
        remove_leftovers(sweep)
        result, monitor = _run_sweep(sweep)
    files.write_output(json, result)
    log(f"\n{(folder / 'trials.md').read_text()}")
    log(f"best:    trial {result['best']['trial']}, {trial.describe_flags(result['best']['flags'])}")
    test = result["test"]
    log(f"{calibration.tables(protocols.of_result(test), results.from_json(test['coresets']))}\n")
    log(f"preset:  fbpc distill --preset {shlex.quote(str(folder / 'best.json'))}")
    log(f"run:     {sweep.task.configs[result['best']['trial']].output.out}")
    log(f"result:  {path}")
    monitor.print_addresses()


def remove_leftovers(sweep: OpenSweep) -> None:
    """Remove the temporary files of a killed sweep and its trials. The caller holds the lock of the folder."""
    for path in (sweep.folder, *(place(config.output.out) for config in sweep.task.configs)):
        RunDirectory(path).remove_leftovers()


def _run_sweep(sweep: OpenSweep) -> tuple[dict[str, Any], SweepMonitor]:
    """Run the trials; return the result and the closed monitor."""
    folder, interruption = sweep.folder, Interruption()
    flags = never_from_a_file(sweep.base)
    repeated = [word for name, words in flags.items() if name != "out" for word in words]
    if foreign_source(sweep.plan, sweep.base):
        repeated += source_flags(sweep.plan.settings)
    hint = f"resume with: {shlex.join(['fbpc', 'tune', '--out', str(folder), '--resume', *repeated])}"
    with resume_hint(hint), open_backend(sweep.base, interruption, log) as workers:
        log(f"sweep: {folder}")
        provenance = capture(workers.describe())
        d = sweep.dataset
        log(f"data: {d.name}, {len(d.train.labels)} images to train, {len(d.validation.labels)} to validate")
        with open_monitor(sweep, provenance) as monitor:
            _train_shared_experts(sweep, workers)
            from fbpc_ray.tuning import ray_tune as trials  # open_backend has raised if Ray is missing

            monitor.start()
            trials.run(sweep.task, monitor.outcomes, workers, interruption, monitor, log)  # type: ignore[arg-type]
            monitor.close_bar()
            result = _conclude(sweep, monitor, workers, provenance)
    return result, monitor


def _folder(base: Config, resume: bool) -> Place:
    out = base.output.out
    run = RunDirectory(place(out) if out else new_output("tune", base.data.data, base.distillation.ipc))
    if not resume:
        run.refuse_if_taken()
    return run.folder


def _prepare(
    base: Config, settings: Sweep, folder: Place, resume: bool, trusted: bool, dry_run: bool,
    sizes: SizeRequest | None = None, given: Set[str] = frozenset(),
) -> OpenSweep:  # fmt: skip
    """Load the data, draw or read the trials, and check them all. Writes nothing. Raises UserError."""
    base, plan = validation.canonical(base), None
    if sizes is None:
        validation.check(base)
    _check(base)
    if resume:
        plan = read_plan(folder)
        if replace(settings, workers_per_trial=0) != replace(plan.settings, workers_per_trial=0):
            raise UserError(
                "--resume: the sweep's flags differ from the stored ones; leave them out, or give another --out"
            )
        stored = read_base(folder)
        if base.workers.threads == 0:
            base = base.updated(threads=stored.workers.threads)
        check_resume(stored, base, MAY_CHANGE)
        plan = plan._replace(settings=settings)
    else:
        base = base.updated(threads=cpu_threads(base), out=str(folder))
    dataset = load_data(base.updated(download=base.data.download and not dry_run), log)
    if sizes is not None:
        base = with_sizes(base, dataset, sizes, log)
        validation.check(base)
    if plan is None:
        trials = draw_flags(base, settings, len(dataset.classes))
        trials = with_own_settings(trials, base, given, dataset, sizes)
        plan = Plan(folder.name, uuid.uuid4().hex, settings, trials, dataset.fingerprint)
    else:
        consequence = "the trials go on with these images: do not compare their scores with earlier ones"
        if note := advice.changed_images_note(dataset, plan.fingerprint, "the sweep", consequence):
            log(note)
    if resume and not trusted:
        refuse_untrusted(plan, base, folder)
    placed = base.updated(experts=str(expert_root(base)))  # a trial has another working directory
    configs = [trial.trial_config(placed, flags, settings, folder, number) for number, flags in enumerate(plan.trials)]
    specs = {config.networks: network_specs(config, dataset) for config in {c.networks: c for c in configs}.values()}
    for config in configs:
        check_memory(config, dataset, specs[config.networks])
    _check_starts(configs, dataset)
    return OpenSweep(folder, base, plan, task_of(configs, dataset, settings), dataset)


def _check_starts(configs: list[Config], dataset: Dataset) -> None:
    """Log what is assumed of --initial-coreset. Raises UserError where a trial has no images to begin with."""
    configs = [config for config in configs if not RunDirectory(place(config.output.out)).state_path.exists()]
    starts = {(d.ipc, d.initial_coreset, d.method, d.learn_labels, d.label_confidence): config
              for config in configs for d in [config.distillation]}  # fmt: skip
    sessions = [Session(config, dataset, [], []) for config in starts.values()]
    notes = [note for session in sessions if session.initial for note in advice.initial_coreset_notes(session)]
    for note in results.unique(notes):
        log(f"note: {note}")


def task_of(configs: list[Config], dataset: Dataset, settings: Sweep) -> Task:
    """Return the data that trials share, without test images."""
    return Task(configs, trial.without_test_split(dataset), settings)


def _check(base: Config) -> None:
    if base.workers.backend != "ray":
        raise UserError("--backend: must be ray for a sweep, got serial; Ray runs on one machine, too")
    if not base.data.validation:
        raise UserError("--validation: must be above 0, since a sweep selects on the validation split; give 0.1")


def _describe(sweep: OpenSweep) -> None:
    """Log the trials and the data (--dry-run)."""
    for number, flags in enumerate(sweep.plan.trials):
        log(f"trial {number}: {trial.describe_flags(flags)}")
    data = sweep.dataset
    log(
        f"data: {data.name}, {len(data.train.labels):,} training and {len(data.validation.labels):,} validation "
        f"images; no trial uses the {len(data.test.labels):,} test images"
    )
    log("dry run: nothing was written")


def _train_shared_experts(sweep: OpenSweep, workers: Any) -> None:
    """Train experts once for all trials; if trials differ in their experts, each trains its own."""
    recipe = {name for group in (Networks, Experts) for name in group.__dataclass_fields__}
    config = next((config for config in sweep.task.configs if uses_experts(config) and num_steps(config)), None)
    if config is None or any(recipe & flags.keys() for flags in sweep.plan.trials):
        return
    open_session(config, log, sweep.task.dataset).train_experts(workers, log)


def _conclude(sweep: OpenSweep, monitor: SweepMonitor, workers: Any, provenance: Provenance) -> dict[str, Any]:
    """Write the tables and the best preset, evaluate the best trial on the test images, write result.json."""
    folder, metric = sweep.folder, sweep.plan.settings.metric
    outcomes = monitor.outcomes
    rows = trial.table_rows(outcomes, sweep.plan.trials)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, write_page_checksum=True)
    files.write_bytes(folder / "trials.parquet", buffer.getvalue())
    order = [outcome.number for outcome in trial.rank(outcomes, metric)]
    rest = [outcome.number for outcome in outcomes if outcome.number not in order]
    files.write_text(folder / "trials.md", trial.markdown([rows[number] for number in order + rest]))
    if not order:
        raise UserError(f"no trial finished ({monitor.count_statuses()}): see {folder / 'trials.md'}", code=1)
    best = outcomes[order[0]]
    assert best.last is not None
    config = sweep.task.configs[best.number]
    experts, interval = sweep.base.experts.experts, sweep.base.distillation.checkpoint_every
    preset = to_preset(config.updated(experts=experts, checkpoint_every=interval))
    flags = trial.describe_flags(sweep.plan.trials[best.number])
    monitor.parent.set_tags(run_tags(config, sweep.dataset.name) | {"best": f"trial {best.number}: {flags}"})
    files.write_checked_json(folder / "best.json", json_format.loads(preset))
    log(f"best: trial {best.number}, {metric} {getattr(best.last, metric):.4g} on the validation split; now on test")
    tested = _on_test(config, sweep.dataset, workers, provenance, monitor.parent)
    result = {
        "sweep": sweep.plan.name, "metric": metric, "scheduler": sweep.plan.settings.scheduler,
        "trials": dict(Counter(outcome.status for outcome in outcomes)),
        "best": {
            "trial": best.number, "flags": sweep.plan.trials[best.number],
            "validation": {name: getattr(best.last, name) for name in trial.SCORES},
        },
        "test": tested, "rows": rows,
    }  # fmt: skip
    files.write_checked_json(folder / "result.json", result)
    for name in ("best.json", "trials.md", "trials.parquet", "result.json"):
        monitor.parent.log_artifact(folder / name)
    return result


def _on_test(
    config: Config, dataset: Dataset, workers: Any, provenance: Provenance, tracker: Tracker
) -> dict[str, Any]:
    """Evaluate a finished trial's coreset beside random images; write the files of a run."""
    run, session = RunDirectory(place(config.output.out)), open_session(config, log, dataset)
    if session.num_steps and not run.state_path.exists():
        raise UserError(f"the checkpoint of the trial is missing: delete {run.folder}, and --resume runs it again")
    state, rows = session.start(run)
    return evaluate_run(LiveRun(session, run, workers, provenance, tracker), state, rows)
