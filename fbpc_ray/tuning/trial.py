"""One trial of a sweep: distil and validate it, write and read its files, rank trials. Needs no Ray.

    config.json      settings that all trials share
    sweep.json       how the trials were drawn, and the flags of each
    trials/00003/    run directory of a trial, with
      trial.json     its validation scores, written by the trial with each checkpoint
      ended.json     why the driver ended it: stopped by the scheduler, or lost

The files are plain JSON with checksums, written atomically: a sweep resumes from them after any kill, on any cluster
that sees them.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fbpc_ray.core import files, inputs
from fbpc_ray.core.config import RENAMED, Config, Data, Evaluation, Output, Sweep, Workers, from_text, from_word
from fbpc_ray.core.errors import UserError, closest, undamaged
from fbpc_ray.core.presets import with_method
from fbpc_ray.core.progress import Log
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import Place, place
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.distillation import network_pool
from fbpc_ray.distillation.loop import Checkpointer, follow
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import State
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.evaluation.chains import flags_to_lower
from fbpc_ray.evaluation.evaluate import evaluate
from fbpc_ray.evaluation.results import ChainScore, mean_scores, select, unique
from fbpc_ray.execution import validation
from fbpc_ray.execution.session import Session, num_steps, open_session

MODES = {"nll": "min", "accuracy": "max"}
SCORES = ("nll", "accuracy", "ece", "brier")
SHARED = {name for group in (Data, Workers, Output) for name in group.__dataclass_fields__} | {"checkpoint_every"}
"""Flags that are the same for all trials: the data they are compared on, and where they run."""


class Task(NamedTuple):
    """Plain data that all trials share, sent once. It holds no test image."""

    configs: list[Config]
    """By number of the trial; `out` is the trial's folder."""
    dataset: Dataset
    settings: Sweep


class ValidationResult(NamedTuple):
    """Scores of one step on the validation split: means over architectures and chains."""

    step: int
    nll: float
    accuracy: float
    ece: float
    brier: float
    losses: list[list[float]]
    """[step, loss] of the steps since the last validation."""


@dataclass
class Record:
    """trial.json."""

    starts: list[int] = field(default_factory=list)
    """Steps from which each process that ran the trial started."""
    validations: list[ValidationResult] = field(default_factory=list)
    """Called `looks` in the file."""
    error: str = ""
    """Why the trial fails on every machine; empty if it doesn't."""


class Outcome(NamedTuple):
    """State of a trial by its files."""

    number: int
    status: str
    """finished | stopped (by the scheduler) | failed (its configuration can't work) | lost (its machine) | open."""
    reason: str
    record: Record

    @property
    def last(self) -> ValidationResult | None:
        """The last validation."""
        return self.record.validations[-1] if self.record.validations else None


def without_test_split(dataset: Dataset) -> Dataset:
    """Remove the test images: trials must not see them."""
    return dataset._replace(test=Split(dataset.test.images[:0].copy(), dataset.test.labels[:0].copy()))


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """Parse words FLAG=VALUE,VALUE into {flag: values}. Raises UserError."""
    grid = {}
    for word in words:
        name, text = from_word(word, "--grid")
        grid[name] = [from_text(name, value, f"--grid {word}") for value in text.split(",")]
    return grid


def check_space(space: Any, source: str) -> dict[str, Any]:
    """Return `space` if it is {flag: values to try} of flags that trials may differ in; else UserError."""
    if not isinstance(space, dict) or not space:
        raise UserError(f"{source} must be a dict of flags and their values to try, got {type(space).__name__}")
    known = [name for name in Config().flat() if name not in SHARED]
    for name in (RENAMED.get(name, name) for name in space):
        if name in SHARED:
            raise UserError(f"{source}: '{name}' must be the same for all trials; give --{name.replace('_', '-')}")
        if name not in known:
            raise UserError(f"{source}: unknown flag '{name}'; {closest(str(name), known)}")
    return space


def trial_config(base: Config, flags: dict[str, Any], settings: Sweep, folder: Place, number: int) -> Config:
    """Return the configuration of a trial. Raises UserError if no run can use it."""
    try:
        method = flags.get("method", base.distillation.method)
        config = base if method == base.distillation.method else with_method(base, method, base.distillation.ipc)
        config = validation.canonical(config.updated(**flags))
        interval = base.output.val_every or max(1, base.distillation.steps // 4)
        config = config.updated(checkpoint_every=interval, out=str(trial_folder(folder, number)), tracking=False)
        validation.check(config)
    except UserError as error:
        raise UserError(f"trial {number}: {error}") from None
    return config


def trial_folder(folder: Place, number: int) -> Place:
    return folder / f"trials/{number:05d}"


def val_evaluation(evaluation: Evaluation, settings: Sweep) -> Evaluation:
    """Return the evaluation of a validation: shorter chains, with as many samples if they fit."""
    steps = min(settings.val_chain_epochs or max(1, evaluation.chain_epochs // 5), evaluation.chain_epochs)
    interval = max(1, steps * evaluation.chain_every // evaluation.chain_epochs)
    return replace(evaluation, num_chains=settings.val_chains, chain_epochs=steps, chain_every=interval)


def validate(session: Session, state: State, settings: Sweep, workers: TaskRunner, log: Log) -> list[ChainScore]:
    """Score the pseudocoreset of `state` on the validation split, with the chains of `val_evaluation`."""
    short = replace(session.config, evaluation=val_evaluation(session.config.evaluation, settings))
    coresets = {"coreset": session.coreset(state)}
    return evaluate(coresets, session.specs, session.dataset, "validation", short, workers, log).scores


def run_trial(task: Task, number: int, workers: Backend, report: Callable[[ValidationResult], None], log: Log) -> None:
    """Distil a trial from its last checkpoint to its last step; validate at each checkpoint.

    A configuration that can't work ends the trial, with the reason in its record.

    Raises:
        UserError: the machine, not the configuration, is at fault.
    """
    settings = task.configs[number]
    run = RunDirectory(place(settings.output.out))
    record = read_record(run.folder)
    run.write_config(settings)
    try:
        _distill(task, settings, run, record, workers, report, log)
    except UserError as error:
        if error.code != 2:
            raise
        record.error = str(error)
        write_record(run.folder, record)


def _distill(
    task: Task, config: Config, run: RunDirectory, record: Record, workers: Backend,
    report: Callable[[ValidationResult], None], log: Log,
) -> None:  # fmt: skip
    session = open_session(config, log, task.dataset)
    state, rows = session.start(run)
    record.starts.append(state.step)
    write_record(run.folder, record)

    def validate_and_report(current: State) -> None:
        scores = validate(session, current, task.settings, workers, log)
        before = record.validations[-1].step if record.validations else 0
        result = mean_result(scores, current.step, losses_after(rows, before), config, len(session.labels))
        record.validations.append(result)
        write_record(run.folder, record)
        report(result)

    if not session.num_steps:
        if not record.validations:
            validate_and_report(state)
        return
    session.train_experts(workers, log)
    interval, last = config.distillation.checkpoint_every, record.validations[-1].step if record.validations else 0
    if state.step > last and (state.step % interval == 0 or state.step == session.num_steps):
        validate_and_report(state)  # the trial was killed between its checkpoint and its validation
    checkpointer = Checkpointer(run, state, rows, config.distillation, validate_and_report, session.dataset.fingerprint)
    follow(session.steps(state, workers), checkpointer, [], Interruption())


def mean_result(
    scores: Sequence[ChainScore], step: int, since: list[list[float]], config: Config, m: int
) -> ValidationResult:
    """Average scores over architectures and chains, of m images. Raises UserError if a chain diverged."""
    for architecture in unique(score.architecture for score in scores):
        if not mean_scores(select(scores, architecture=architecture)):
            method, flags = config.distillation.method, flags_to_lower(config.evaluation, m)
            rate = "" if method == "random" else "--image-lr or " if method in network_pool.METHODS else "--alpha or "
            raise UserError(f"a chain of {architecture} on the coreset of step {step} diverged: lower {rate}{flags}")
    return ValidationResult(step, **mean_scores(scores), losses=since)


def losses_after(rows: Sequence[dict[str, Any]], after: int) -> list[list[float]]:
    """Return [step, loss] of the steps after `after`: the sum over architectures of the mean over draws."""
    by_step: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        if row["step"] > after:
            by_step.setdefault(row["step"], {}).setdefault(row["architecture"], []).append(row["loss"])
    return [[step, sum(map(statistics.fmean, losses.values()))] for step, losses in sorted(by_step.items())]


def read_record(folder: Place) -> Record:
    """Read trial.json; an empty record if there is none. Raises UserError for a damaged file."""
    path = folder / "trial.json"
    if not path.exists():
        return Record()
    with undamaged(path, f"delete {folder}, its trial then starts again"):
        stored = inputs.read_checked_json(path)
        return Record(stored["starts"], [ValidationResult(**result) for result in stored["looks"]], stored["error"])


def write_record(folder: Place, record: Record) -> None:
    """Write trial.json."""
    values = {
        "starts": record.starts, "looks": [result._asdict() for result in record.validations], "error": record.error,
    }  # fmt: skip
    files.write_checked_json(folder / "trial.json", values)


def write_end(folder: Place, status: str, reason: str) -> None:
    """Write ended.json: the driver, not the trial, ended the trial."""
    files.write_checked_json(folder / "ended.json", {"how": status, "why": reason})


def read_outcome(config: Config, number: int) -> Outcome:
    """Read the state of a trial from its files."""
    folder = place(config.output.out)
    record = read_record(folder)
    if record.error:
        return Outcome(number, "failed", record.error, record)
    if record.validations and record.validations[-1].step >= num_steps(config):
        return Outcome(number, "finished", "", record)
    path = folder / "ended.json"
    if path.exists():
        with undamaged(path, "delete it, and the trial goes on"):
            stored = inputs.read_checked_json(path)
            return Outcome(number, stored["how"], stored["why"], record)
    return Outcome(number, "open", "", record)


def rank(outcomes: Sequence[Outcome], metric: str) -> list[Outcome]:
    """Return the finished trials by their last validation, best first; equal ones by number."""
    sign = 1 if MODES[metric] == "min" else -1
    finished = [outcome for outcome in outcomes if outcome.status == "finished" and outcome.last]
    return sorted(finished, key=lambda outcome: (sign * getattr(outcome.last, metric), outcome.number))


def table_rows(outcomes: Sequence[Outcome], flags: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per trial: number, status, own flags and last scores."""
    return [
        {
            "trial": outcome.number, "ended": outcome.status, "step": outcome.last.step if outcome.last else 0,
            **{name: " ".join(value) if isinstance(value, list | tuple) else value for name, value in values.items()},
            **{name: getattr(outcome.last, name) if outcome.last else None for name in SCORES},
            "sessions": len(outcome.record.starts), "why": outcome.reason,
        }
        for outcome, values in zip(outcomes, flags, strict=True)
    ]  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table, without empty columns and the number of sessions."""
    names = [name for name in rows[0] if name != "sessions" and (name != "why" or any(row["why"] for row in rows))]

    def show(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return markdown_table(names, ([show(row[name]) for name in names] for row in rows)) + "\n"


def describe_flags(flags: dict[str, Any]) -> str:
    """Format a trial's own flags in one line."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {' '.join(value)}"
        if isinstance(value, list | tuple) else f"{name} {value}"
        for name, value in flags.items()
    )  # fmt: skip
