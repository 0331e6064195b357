"""`fbpc tune`: a sweep, from its settings to its last printed line."""

import io
import json as json_format
import shlex
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core import files
from fbpc_ray.core.config import (
    MAY_CHANGE_ON_RESUME,
    NOT_STARTED,
    Config,
    Evaluation,
    Experts,
    Networks,
    Sweep,
    current_names,
    read_config,
    to_json,
)
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.presets import to_preset
from fbpc_ray.core.progress import log, progress, resume_hint
from fbpc_ray.core.provenance import Provenance, capture, home
from fbpc_ray.core.signals import Interrupted, Interruption
from fbpc_ray.core.storage import Place, place
from fbpc_ray.data.datasets import Dataset, denormalise
from fbpc_ray.distillation.run_directory import RunDirectory, check_resume
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import results
from fbpc_ray.execution import validation
from fbpc_ray.execution.session import cpu_threads, load_data, network_specs, open_backend, open_session
from fbpc_ray.models import custom
from fbpc_ray.reporting import image_grids
from fbpc_ray.reporting.run_outputs import LiveRun, evaluate_run
from fbpc_ray.tracking.run_logging import NullTracker, mlflow_module, provenance_tags, run_params, run_tags
from fbpc_ray.tracking.uri import compare_url, default_uri, ui_command
from fbpc_ray.tuning import trial
from fbpc_ray.tuning.trial import Outcome, Task, ValidationResult

MAY_CHANGE = MAY_CHANGE_ON_RESUME - {f.name for f in fields(Evaluation)} - {"steps", "checkpoint_every", "val_every"}
"""Flags of a sweep that don't change what its trials find."""
COMPARED = 5
"""Runs that the printed MLflow page compares."""


class Plan(NamedTuple):
    """sweep.json."""

    name: str
    id: str
    settings: Sweep
    trials: list[dict[str, Any]]
    """The flags of each trial that are its own."""


class _Sweep(NamedTuple):
    """A sweep and what it stands for."""

    folder: Place
    base: Config
    plan: Plan
    task: Task
    dataset: Dataset
    """Whole: the trials' is in `task`."""

    def outcomes(self) -> list[Outcome]:
        return [trial.outcome(config, number) for number, config in enumerate(self.task.configs)]


def tune(base: Config, settings: Sweep, *, resume: bool, trusted: bool, dry_run: bool, json: str) -> None:
    """Draw, run and compare trials; judge the best on the test images, once. `trusted`: what --space names, which may
    name networks to import, was given on the command line, not by a file alone."""
    folder = _folder(base, resume)
    path = folder / "result.json"
    if resume and path.exists():
        with undamaged(path, "delete it, and the best trial is judged again"):
            result = json_format.loads(path.read_text())
        log(f"this sweep is complete\n\n{(folder / 'trials.md').read_text()}")
        if json:
            files.write_json(place(json).absolute(), result)
        return
    found = _prepared(base, settings, folder, resume, trusted, dry_run)
    if dry_run:
        _describe(found)
        return
    with files.exclusive_directory(folder):
        if not resume:
            RunDirectory(folder).refuse_if_taken()  # by one that began when this one did, and is through
            _write_plan(found)
        result, board = _swept(found)
    if json:
        files.write_json(place(json).absolute(), result)
    log(f"\n{(folder / 'trials.md').read_text()}")
    log(f"best:    trial {result['best']['trial']}, {trial.told(result['best']['flags'])}")
    log(f"\n{results.table(result['test']['coresets'])}\n")
    log(f"preset:  fbpc distill --preset {shlex.quote(str(folder / 'best.json'))}")
    log(f"run:     {found.task.configs[result['best']['trial']].output.out}")
    log(f"result:  {path}")
    board.say_where()


def _swept(found: _Sweep) -> tuple[dict[str, Any], "_Board"]:
    """The result, and what was shown of it on the way."""
    folder, interruption = found.folder, Interruption()
    again = f"resume with: fbpc tune --out {shlex.quote(str(folder))} --resume"
    with resume_hint(again), open_backend(found.base, interruption, log) as workers:
        log(f"sweep: {folder}")
        provenance = capture(workers.describe())
        d = found.dataset
        log(f"data: {d.name}, {len(d.train.labels)} images to train, {len(d.validation.labels)} to validate")
        with _board(found, provenance) as board:
            _train_shared_experts(found, workers)
            from fbpc_ray.tuning import ray_tune as trials  # plan.backend has said it where there is no Ray

            board.tracked()
            trials.run(found.task, board.outcomes, workers, interruption, board, log)  # type: ignore[arg-type]
            board.ran()
            result = _conclude(found, board, workers, provenance)
    return result, board


def _folder(base: Config, resume: bool) -> Place:
    out = base.output.out
    data = Path(base.data.data.split(":")[-1]).name
    name = f"{datetime.now():%Y%m%d-%H%M%S}-tune-{data}-ipc{base.distillation.ipc}"
    run = RunDirectory(place(out) if out else home() / "outputs" / name)
    if not resume:
        run.refuse_if_taken()
    return run.folder


def _prepared(base: Config, settings: Sweep, folder: Place, resume: bool, trusted: bool, dry_run: bool) -> _Sweep:
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
    foreign = [each for flags in kept.trials for each in flags.get("architectures", []) if ":" in each]
    if resume and foreign and not trusted:
        raise UserError(f"{folder} asks for {foreign[0]}, but a file alone imports no code: repeat --space to trust it")
    root = place(base.experts.experts) if base.experts.experts else home() / "experts"
    placed = base.updated(experts=str(root.absolute()))  # a trial has another working directory
    configs = [trial.config_of(placed, each, settings, folder, number) for number, each in enumerate(kept.trials)]
    for config in {each.networks: each for each in configs}.values():
        network_specs(config, dataset)
    return _Sweep(folder, base, kept, task_of(configs, dataset, settings), dataset)


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
        space = trial.checked(custom.named(settings.space, "--space", "NAME"), f"--space {settings.space}")
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


def _write_plan(found: _Sweep) -> None:
    text = {**found.plan._asdict(), "settings": asdict(found.plan.settings)}
    files.write_text(found.folder / "sweep.json", json_format.dumps(text, indent=1) + "\n")
    files.write_text(found.folder / "config.json", to_json(found.base))  # last: now there is a sweep


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


def _describe(found: _Sweep) -> None:
    """--dry-run: what would be done."""
    log(to_json(found.base).rstrip())
    for number, flags in enumerate(found.plan.trials):
        log(f"trial {number}: {trial.told(flags)}")
    counts = {part: len(getattr(found.dataset, part).labels) for part in ("train", "validation", "test")}
    log(f"data: {found.dataset.name}, {counts}; trials get no test image")
    log("dry run: nothing was written")


def _train_shared_experts(found: _Sweep, workers: Any) -> None:
    """The experts of all trials, once, where these don't differ in how experts are made; else each trial makes its."""
    recipe = {name for group in (Networks, Experts) for name in group.__dataclass_fields__}
    if any(recipe & flags.keys() for flags in found.plan.trials) or not any(map(trial.steps_of, found.task.configs)):
        return
    open_session(found.task.configs[0], log, found.task.dataset).train_experts(workers, log)


def _conclude(found: _Sweep, board: "_Board", workers: Any, provenance: Provenance) -> dict[str, Any]:
    """The table, the best preset, its coreset judged on the test images, the result."""
    folder, metric = found.folder, found.plan.settings.metric
    outcomes = board.outcomes
    rows = trial.rows_of(outcomes, found.plan.trials)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    files.write_bytes(folder / "trials.parquet", buffer.getvalue())
    order = [each.number for each in trial.best_first(outcomes, metric)]
    rest = [each.number for each in outcomes if each.number not in order]
    files.write_text(folder / "trials.md", trial.markdown([rows[number] for number in order + rest]))
    if not order:
        raise UserError(f"no trial finished ({board.counted()}): see why in {folder / 'trials.md'}", code=1)
    best = outcomes[order[0]]
    assert best.look is not None
    config = found.task.configs[best.number]
    given, every = found.base.experts.experts, found.base.distillation.checkpoint_every
    files.write_text(folder / "best.json", to_preset(config.updated(experts=given, checkpoint_every=every)))
    log(f"best: trial {best.number}, {metric} {getattr(best.look, metric):.4g} on the validation split; now on test")
    tested = _on_test(config, found.dataset, workers, provenance, board.parent)
    result = {
        "sweep": found.plan.name, "metric": metric, "scheduler": found.plan.settings.scheduler,
        "trials": dict(Counter(each.how for each in outcomes)),
        "best": {
            "trial": best.number, "flags": found.plan.trials[best.number],
            "validation": {name: getattr(best.look, name) for name in trial.SCORES},
        },
        "test": tested, "rows": rows,
    }  # fmt: skip
    files.write_text(folder / "result.json", json_format.dumps(result, indent=2, allow_nan=False) + "\n")
    for name in ("best.json", "trials.md", "trials.parquet", "result.json"):
        board.parent.log_artifact(folder / name)
    return result


def _on_test(config: Config, dataset: Dataset, workers: Any, provenance: Provenance, tracker: Any) -> dict[str, Any]:
    """The coreset of a finished trial, as it is, beside random images: files in its folder as of any run."""
    run, session = RunDirectory(place(config.output.out)), open_session(config, log, dataset)
    first, labels = session.initial
    state, rows = run.restore(labels, dataset.image_shape) or (first, [])
    return evaluate_run(LiveRun(session, run, workers, provenance, tracker), state, rows)


class _Board:
    """Hears of the trials: a line on the terminal, their files, and MLflow."""

    def __init__(self, found: _Sweep, parent: Any, tracking: Any):
        self.parent = parent
        self.outcomes = found.outcomes()
        self._found, self._tracking = found, tracking
        self._children: dict[int, Any] = {}
        self._page = ""
        self._steps = {each.number: each.look.step if each.look else 0 for each in self.outcomes}
        self._bar: Any = None

    def tracked(self) -> None:
        """Before the first trial: wait for the parent's id, which the runs of the trials carry."""
        if self._tracking and not self.parent.wait(60):
            log("note: MLflow has not answered yet; the trials' runs are not tied to a parent")
        self._summary()
        self._bar = progress("sweep", sum(map(self._all_of, self._steps)), "step", self._done())

    def started(self, number: int) -> None:
        if number not in self._children:
            self._children[number] = self._child(number)
            record = self.outcomes[number].record
            before = f", goes on after step {record.looks[-1].step}" if record.looks else ""
            log(f"trial {number} runs{before}: {trial.told(self._found.plan.trials[number])}")

    def looked(self, number: int, look: ValidationResult) -> None:
        log(f"trial {number}, step {look.step}: nll {look.nll:.4g}, accuracy {100 * look.accuracy:.1f} %")
        self._steps[number] = look.step
        self._advance()
        if number in self._children:
            _send(self._children[number], look, self._found.plan.settings.metric)

    def ended(self, number: int, lost: str) -> None:
        config = self._found.task.configs[number]
        now = trial.outcome(config, number)
        if lost:
            trial.end(place(config.output.out), "lost", lost)
        elif now.how not in ("finished", "failed"):
            step = now.look.step if now.look else 0
            trial.end(place(config.output.out), "stopped", f"at step {step} of {trial.steps_of(config)}")
        now = self.outcomes[number] = trial.outcome(config, number)
        log(f"trial {number} {now.how}{f': {now.why}' if now.why else ''} ({self.counted()})")
        self._advance()
        if child := self._children.pop(number, None):
            self._finish(child, now)
        self._summary()

    def ran(self) -> None:
        """After the last trial."""
        if self._bar is not None:
            self._bar.close()

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update(self._done() - self._bar.n)

    def _all_of(self, number: int) -> int:
        return trial.steps_of(self._found.task.configs[number])

    def _done(self) -> int:
        """Steps done, and those that nobody will do: what an ended trial left out."""
        ended = {each.number for each in self.outcomes if each.how in ("finished", "stopped", "failed")}
        return sum(self._all_of(number) if number in ended else step for number, step in self._steps.items())

    def counted(self) -> str:
        counts = Counter(each.how for each in self.outcomes)
        return ", ".join(f"{counts[how]} {how}" for how in sorted(counts))

    def close(self, status: str) -> None:
        """End what MLflow would show as running: the trials' runs of this process and of those before, the sweep's."""
        self.ran()
        for child in self._children.values():
            child.finish(status)
        self._children.clear()
        if not self._tracking:
            return
        runs = self._runs()
        for each in self.outcomes:
            run = runs.get(self._key(each.number))
            if run and run.running:  # its end, or that of its process, came after the last word to MLflow
                if each.how == "open":
                    self._child(each.number).finish(status)
                else:
                    self._finish(self._child(each.number), each)
        best = trial.best_first(self.outcomes, self._found.plan.settings.metric)[:COMPARED]
        keys = [self._key(each.number) for each in best if self._key(each.number) in runs]
        if keys:
            ids = [runs[key].run_id for key in keys]
            self._page = compare_url(self.parent.uri, runs[keys[0]].experiment_id, ids)
            self.parent.set_tags({"compare": self._page})
        self.parent.finish(status)

    def say_where(self) -> None:
        if self._tracking:
            log(f"MLflow:  {ui_command(self.parent.uri)}")
            if self._page:
                log(f"compare: {self._page}")

    def _key(self, number: int) -> str:
        return f"{self._found.plan.id}/{number}"

    def _runs(self) -> dict[str, Any]:
        found = self._found
        return self._tracking.find_runs(self.parent.uri, found.base.output.experiment, "sweep_id", found.plan.id)

    def _child(self, number: int) -> Any:
        """The MLflow run of a trial, the same one after any resume, with all that the trial found so far."""
        if not self._tracking:
            return NullTracker()
        found, config = self._found, self._found.task.configs[number]
        parent = {"mlflow.parentRunId": self.parent.run_id} if self.parent.run_id else {}
        child = self._tracking.Tracker(
            self.parent.uri,
            found.base.output.experiment,
            run_name=f"{found.plan.name}/{number}",
            key=self._key(number),
            tags={
                **parent, **run_tags(config, found.dataset.name),
                "sweep": found.plan.name, "sweep_id": found.plan.id, "trial": str(number), "folder": config.output.out,
            },
            params=found.plan.trials[number],
            log=log,
            finish_seconds=15.0,
        )  # fmt: skip
        for look in self.outcomes[number].record.looks:
            _send(child, look, found.plan.settings.metric)
        return child

    def _finish(self, child: Any, outcome: Outcome) -> None:
        """End the run of a trial that is over, with a picture of its images."""
        if isinstance(child, NullTracker):
            return
        child.set_tags({"ended": f"{outcome.how} {outcome.why}".strip()})
        if outcome.look:
            child.log_artifact(self._picture(outcome))
        child.finish("FAILED" if outcome.how in ("failed", "lost") else "FINISHED")

    def _picture(self, outcome: Outcome) -> Place:
        config, dataset = self._found.task.configs[outcome.number], self._found.task.dataset
        run, d = RunDirectory(place(config.output.out)), config.distillation
        first, labels = initial_state(dataset, d.ipc, d.seed)
        state, _ = run.restore(labels, dataset.image_shape) or (first, [])
        title = f"trial {outcome.number}, {dataset.name}, {d.ipc} a class, step {state.step}"
        images = denormalise(state.images, dataset.mean, dataset.std).numpy()
        image_grids.coreset_grid(images, labels.numpy(), dataset.classes, run.picture_path, title)
        return run.picture_path

    def _summary(self) -> None:
        """The sweep after so many ended trials, which is the step."""
        counts = Counter(each.how for each in self.outcomes)
        values = {f"trials/{how}": float(counts[how]) for how in ("finished", "stopped", "failed", "lost")}
        if best := trial.best_first(self.outcomes, self._found.plan.settings.metric):
            assert best[0].look is not None
            values |= {f"best/val/{name}": getattr(best[0].look, name) for name in trial.SCORES}
            values["best/trial"] = float(best[0].number)
        self.parent.log_metrics(values, len(self.outcomes) - counts["open"])


@contextmanager
def _board(found: _Sweep, provenance: Provenance) -> Iterator[_Board]:
    """The board of a sweep, with its MLflow run, ended as the block ends."""
    output, settings = found.base.output, found.plan.settings
    tracking = mlflow_module(f"everything is in {found.folder}", log) if output.tracking else None
    parent: Any = NullTracker()
    if tracking:
        parent = tracking.MlflowTracker(
            default_uri(home()),
            output.experiment,
            run_name=found.plan.name,
            key=found.plan.id,
            tags={
                "sweep": found.plan.name, "sweep_id": found.plan.id, **run_tags(found.base, found.dataset.name),
                **provenance_tags(provenance), "folder": str(found.folder), "flags": " ".join(found.plan.trials[0]),
            },
            params={**run_params(found.base), **{f"sweep/{name}": value for name, value in asdict(settings).items()}},
            log=log,
        )  # fmt: skip
    board = _Board(found, parent, tracking)
    status = "FAILED"
    try:
        yield board
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        board.close(status)


def _send(child: Any, look: ValidationResult, metric: str) -> None:
    """What is compared goes first: MLflow's plot of several runs begins with the first metric that they have."""
    scores = {f"val/{name}": getattr(look, name) for name in trial.SCORES}
    child.log_metrics({f"objective/{metric}": getattr(look, metric), **scores}, look.step)
    for step, loss in look.losses:
        child.log_metrics({"training/loss": loss}, int(step))
