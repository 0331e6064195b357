"""A sweep without Ray: what a trial does, what it leaves, which one is best.

    config.json      what all trials share          sweep.json    how they were drawn, and the flags of each
    trials/00003/    the run's folder of a trial (run.py), with
      trial.json     what it found, written by itself with each checkpoint
      ended.json     why it ended, where others ended it

All of it is plain JSON, written whole: a sweep goes on from these files after any kill, on any cluster that sees them.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from fbpc_ray.core import files
from fbpc_ray.core.config import RENAMED, Config, Data, Evaluation, Output, Sweep, Workers, from_text, from_word
from fbpc_ray.core.errors import UserError, closest, undamaged
from fbpc_ray.core.presets import with_method
from fbpc_ray.core.progress import Log
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import Place, place
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.distillation.loop import Checkpointer, follow
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import State
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.evaluation.evaluate import evaluate
from fbpc_ray.evaluation.results import ChainScore, mean_scores, select, unique
from fbpc_ray.execution import validation
from fbpc_ray.execution.session import Session, num_steps, open_session

MODES = {"nll": "min", "accuracy": "max"}
SCORES = ("nll", "accuracy", "ece", "brier")
SHARED = {name for group in (Data, Workers, Output) for name in group.__dataclass_fields__} | {"checkpoint_every"}
"""Flags that are the same for all trials: what they are compared on, and where they run."""


class Task(NamedTuple):
    """What all trials get: plain data, sent once. It holds no test image."""

    configs: list[Config]
    """Of each trial by number; `out` is its folder."""
    dataset: Dataset
    settings: Sweep


class ValidationResult(NamedTuple):
    """What a trial found at one step on the validation split: means over architectures and chains."""

    step: int
    nll: float
    accuracy: float
    ece: float
    brier: float
    losses: list[list[float]]
    """[step, loss] of the steps since the look before."""


@dataclass
class Record:
    """trial.json."""

    starts: list[int] = field(default_factory=list)
    """The step from which each process that worked on it went on."""
    looks: list[ValidationResult] = field(default_factory=list)
    error: str = ""
    """Why it can't be finished, whoever runs it again."""


class Outcome(NamedTuple):
    """Where a trial stands."""

    number: int
    how: str
    """finished | stopped (by the scheduler) | failed (its configuration can't work) | lost (its machine) | open."""
    why: str
    record: Record

    @property
    def look(self) -> ValidationResult | None:
        return self.record.looks[-1] if self.record.looks else None


def without_test_split(dataset: Dataset) -> Dataset:
    """The data set without its test images: what trials see."""
    return dataset._replace(test=Split(dataset.test.images[:0].copy(), dataset.test.labels[:0].copy()))


def grid_of(words: Sequence[str]) -> dict[str, list[Any]]:
    """FLAG=VALUE,VALUE words as {flag: values}. Raises UserError."""
    found = {}
    for word in words:
        name, text = from_word(word, "--grid")
        found[name] = [from_text(name, each, f"--grid {word}") for each in text.split(",")]
    return found


def checked(space: Any, source: str) -> dict[str, Any]:
    """`space`. Raises UserError for what is no {flag: what to try}, or names a flag that trials can't differ in."""
    if not isinstance(space, dict) or not space:
        raise UserError(f"{source} is {type(space).__name__}: it must be a dict of flags and what to try of each")
    known = [name for name in Config().flat() if name not in SHARED]
    for name in (RENAMED.get(name, name) for name in space):
        if name in SHARED:
            raise UserError(f"{source} has '{name}': it is the same for all trials; give --{name.replace('_', '-')}")
        if name not in known:
            raise UserError(f"{source} has the unknown flag '{name}': {closest(str(name), known)}")
    return space


def config_of(base: Config, flags: dict[str, Any], settings: Sweep, folder: Place, number: int) -> Config:
    """The configuration of a trial. Raises UserError for what no run can use."""
    try:
        method = flags.get("method", base.distillation.method)
        config = base if method == base.distillation.method else with_method(base, method, base.distillation.ipc)
        found = validation.canonical(config.updated(**flags))
        every = base.output.val_every or max(1, base.distillation.steps // 4)
        found = found.updated(checkpoint_every=every, out=str(trial_folder(folder, number)), tracking=False)
        validation.check(found)
    except UserError as error:
        raise UserError(f"trial {number}: {error}") from None
    return found


def steps_of(config: Config) -> int:
    return num_steps(config)


def trial_folder(folder: Place, number: int) -> Place:
    return folder / f"trials/{number:05d}"


def shorter(evaluation: Evaluation, settings: Sweep) -> Evaluation:
    """How trials are judged on the way: shorter chains with as many samples, where they have room for them."""
    steps = min(settings.val_chain_epochs or max(1, evaluation.chain_epochs // 5), evaluation.chain_epochs)
    every = max(1, steps * evaluation.chain_every // evaluation.chain_epochs)
    return replace(evaluation, num_chains=settings.val_chains, chain_epochs=steps, chain_every=every)


def validate(session: Session, state: State, settings: Sweep, workers: TaskRunner, log: Log) -> list[ChainScore]:
    """Score the pseudocoreset of `state` on the validation split, by `shorter` chains."""
    short = replace(session.config, evaluation=shorter(session.config.evaluation, settings))
    coresets = {"coreset": session.coreset(state)}
    return evaluate(coresets, session.specs, session.dataset, "validation", short, workers, log).scores


def run_trial(task: Task, number: int, workers: Backend, report: Callable[[ValidationResult], None], log: Log) -> None:
    """Distil from where the trial stands to its last step, with a look at the validation split at each checkpoint.

    A configuration that can't work ends it with the reason in its record. Raises UserError for a machine that can't.
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
    first, labels = session.initial
    state, rows = run.restore(labels, session.dataset.image_shape) or (first, [])
    record.starts.append(state.step)
    write_record(run.folder, record)

    def validate_and_report(current: State) -> None:
        scores = validate(session, current, task.settings, workers, log)
        before = record.looks[-1].step if record.looks else 0
        result = look_of(scores, current.step, losses(rows, before))
        record.looks.append(result)
        write_record(run.folder, record)
        report(result)

    if not session.num_steps:
        if not record.looks:
            validate_and_report(state)
        return
    session.train_experts(workers, log)
    every, last = config.distillation.checkpoint_every, record.looks[-1].step if record.looks else 0
    if state.step > last and (state.step % every == 0 or state.step == session.num_steps):
        validate_and_report(state)  # a kill came between its checkpoint and its validation
    checkpointer = Checkpointer(run, state, rows, config.distillation, on_checkpoint=validate_and_report)
    follow(session.steps(state, workers), checkpointer, [], Interruption())


def look_of(scores: Sequence[ChainScore], step: int, since: list[list[float]]) -> ValidationResult:
    """Return the means over architectures and chains. Raises UserError where a chain diverged."""
    for architecture in unique(score.architecture for score in scores):
        if not mean_scores(select(scores, architecture=architecture)):
            raise UserError(
                f"a chain of {architecture} on the coreset of step {step} diverged: lower chain_eta or alpha"
            )
    return ValidationResult(step, **mean_scores(scores), losses=since)


def losses(rows: Sequence[dict[str, Any]], after: int) -> list[list[float]]:
    """[step, loss] of the steps after `after`: the sum over architectures of the mean over draws."""
    found: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        if row["step"] > after:
            found.setdefault(row["step"], {}).setdefault(row["architecture"], []).append(row["loss"])
    return [[step, sum(map(statistics.fmean, by.values()))] for step, by in sorted(found.items())]


def read_record(folder: Place) -> Record:
    """What a trial found so far. Raises UserError for a damaged file."""
    path = folder / "trial.json"
    if not path.exists():
        return Record()
    with undamaged(path, f"delete {folder}, its trial then starts again"):
        found = json.loads(path.read_text())
        return Record(found["starts"], [ValidationResult(**each) for each in found["looks"]], found["error"])


def write_record(folder: Place, record: Record) -> None:
    text = {**asdict(record), "looks": [look._asdict() for look in record.looks]}
    files.write_text(folder / "trial.json", json.dumps(text, indent=1) + "\n")


def end(folder: Place, how: str, why: str) -> None:
    """Say why a trial ended that didn't by itself."""
    files.write_text(folder / "ended.json", json.dumps({"how": how, "why": why}) + "\n")


def outcome(config: Config, number: int) -> Outcome:
    """Where a trial stands, by its files."""
    folder = place(config.output.out)
    record = read_record(folder)
    if record.error:
        return Outcome(number, "failed", record.error, record)
    if record.looks and record.looks[-1].step >= steps_of(config):
        return Outcome(number, "finished", "", record)
    path = folder / "ended.json"
    if path.exists():
        with undamaged(path, "delete it, and the trial goes on"):
            told = json.loads(path.read_text())
            return Outcome(number, told["how"], told["why"], record)
    return Outcome(number, "open", "", record)


def best_first(outcomes: Sequence[Outcome], metric: str) -> list[Outcome]:
    """The finished trials, best first, by their last look; equal ones by number."""
    sign = 1 if MODES[metric] == "min" else -1
    there = [each for each in outcomes if each.how == "finished" and each.look]
    return sorted(there, key=lambda each: (sign * getattr(each.look, metric), each.number))


def rows_of(outcomes: Sequence[Outcome], flags: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a trial: its number, end, own flags and last scores."""
    return [
        {
            "trial": each.number, "ended": each.how, "step": each.look.step if each.look else 0,
            **{name: " ".join(value) if isinstance(value, list | tuple) else value for name, value in own.items()},
            **{name: getattr(each.look, name) if each.look else None for name in SCORES},
            "sessions": len(each.record.starts), "why": each.why,
        }
        for each, own in zip(outcomes, flags, strict=True)
    ]  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; without the columns that say nothing."""
    names = [name for name in rows[0] if name != "sessions" and (name != "why" or any(row["why"] for row in rows))]

    def show(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = [names, ["---"] * len(names), *([show(row[name]) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def told(flags: dict[str, Any]) -> str:
    """A trial's own flags in words."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {' '.join(value)}"
        if isinstance(value, list | tuple) else f"{name} {value}"
        for name, value in flags.items()
    )  # fmt: skip
