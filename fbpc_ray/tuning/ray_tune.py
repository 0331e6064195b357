"""The trials of a sweep under Ray Tune: which run at a time, where their workers are, which are stopped early.

Tune schedules; what a sweep has found is in its own files (`tuning.trial`), so a sweep that goes on is a new `Tuner`
over the trials that are left. `Tuner.restore` would unpickle a file, forget what ASHA compared, and stand as far behind
as its last snapshot.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import place as located
from fbpc_ray.distillation.state import gradient_tasks
from fbpc_ray.execution.ray.placement import Resources, capacity, infeasible_message, share
from fbpc_ray.execution.ray.ray_backend import RayBackend, free, nodes
from fbpc_ray.tuning.trial import MODES, Outcome, Task, ValidationResult, run_trial, steps_of

ATTEMPTS = 3
"""Attempts per trial before it counts as lost."""
REDUCTION = 2
"""ASHA: a half goes on from each rung to the next, which has twice the steps."""
LOG_AFTER = 60.0
"""Seconds without any running trial before it is said; to start one takes ten."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # ours are the only files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails reports nothing
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Interruption has it
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Listener(Protocol):
    """Follows the trials, in the driver."""

    def trial_started(self, number: int) -> None: ...

    def trial_validated(self, number: int, look: ValidationResult) -> None: ...

    def trial_ended(self, number: int, lost: str) -> None:
        """`lost`: why the trial can't go on here; empty if it finished or was stopped."""
        ...


def run(
    task: Task,
    outcomes: Sequence[Outcome],
    backend: RayBackend,
    interruption: Interruption,
    listener: Listener,
    log: Callable[[str], None],
) -> None:
    """Run all trials that are open. A signal ends it with Interrupted; what the trials wrote stays.

    Raises UserError where not one worker can be placed.
    """
    todo = [each for each in outcomes if each.how in ("open", "lost")]
    if not todo:
        return
    need, workers = place(task, len(todo), backend)
    at_once = min(len(todo), capacity(nodes(), need) // workers) or 1
    out = located(task.configs[0].output.out)
    if isinstance(out, Path) and len([node for node in ray.nodes() if node["Alive"]]) > 1:
        log(f"note: all nodes must see {out.parent.parent}; where they don't share it (NFS), give --out s3://...")
    log(f"{len(todo)} trials to run, {at_once} at a time, each on {workers} worker{'s' * (workers != 1)} of {need}")
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})

    def waiting() -> str:
        return f"{workers} x {need} for a trial; the Ray cluster has {free()} free"

    bundles = [{}, *({"CPU": need.cpus, "GPU": need.gpus} for _ in range(workers))]
    # For what Tune writes of its own, which a thread of its may still do as a signal ends it.
    with tempfile.TemporaryDirectory(prefix="fbpc-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, task=task), tune.PlacementGroupFactory(bundles)),
            param_space={"number": tune.grid_search([each.number for each in todo])},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(task, outcomes), trial_name_creator=_name, trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=f"{datetime.now():%Y%m%d-%H%M%S}", storage_path=scratch, verbose=0,
                failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
                callbacks=[ProgressCallback(listener, interruption, log, waiting, backend.settings.placement_timeout)],
            ),
        )  # fmt: skip
        tuner.fit()


def place(task: Task, trials: int, backend: RayBackend) -> tuple[Resources, int]:
    """What each worker of a trial takes, and how many a trial has. Raises UserError where not one fits."""
    units = max(len(gradient_tasks(len(c.networks.architectures), c.distillation.draws_per_step)) for c in task.configs)
    here, x = nodes(), backend.settings
    need = backend.need(units, x.threads)
    if not capacity(here, need) and not x.autoscale:
        raise UserError(infeasible_message(here, need))
    wanted = task.settings.workers_per_trial
    if wanted > capacity(here, need) and not x.autoscale:
        raise UserError(
            f"--workers-per-trial {wanted} of {need} each, but the Ray cluster has room for {capacity(here, need)}: "
            "lower it, or add nodes"
        )
    return need, wanted or share(here, need, units, trials)


def _trial(config: dict[str, Any], task: Task) -> None:
    """In a process of its own, in a thread of Tune's: the driver of a distillation in the trial's placement group."""
    number = config["number"]
    own = task.configs[number]
    path = located(own.output.out) / "log.txt"
    said = [path.read_text()] if path.is_file() else []

    def log(line: str) -> None:
        said.append(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        files.write_text(path, "".join(said))

    def report(look: ValidationResult) -> None:
        tune.report({"step": look.step, task.settings.metric: getattr(look, task.settings.metric), "look": look})

    backend = RayBackend(own.workers, Interruption(), log)
    try:
        run_trial(task, number, backend, report, log)
    finally:
        backend.close()


class _Asha(ASHAScheduler):
    """ASHA that knows what was found before it was made: its rungs are those of the whole sweep."""

    past: dict[int, list[dict[str, Any]]] = {}  # noqa: RUF012  by number of a trial that is not over

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self.remember(trial, self.past.get(trial.config["number"], []))

    def remember(self, trial: Any, results: list[dict[str, Any]]) -> None:
        for result in results:
            super().on_trial_result(None, trial, result)  # type: ignore[arg-type]


def _scheduler(task: Task, outcomes: Sequence[Outcome]) -> Any:
    metric = task.settings.metric
    if task.settings.scheduler == "none":
        return FIFOScheduler()
    every = min(config.distillation.checkpoint_every for config in task.configs)
    asha = _Asha(
        time_attr="step", grace_period=every, reduction_factor=REDUCTION,
        max_t=max(1 + every, *(1 + steps_of(config) for config in task.configs)),
    )  # fmt: skip
    asha.set_search_properties(metric, MODES[metric])
    past = {
        each.number: [{"step": look.step, metric: getattr(look, metric)} for look in each.record.looks]
        for each in outcomes
    }
    asha.past = {each.number: past[each.number] for each in outcomes if each.how in ("open", "lost")}
    for each in outcomes:
        if each.number not in asha.past:
            over = SimpleNamespace(trial_id=f"over-{each.number}", config={"number": each.number})
            asha.on_trial_add(None, over)
            asha.remember(over, past[each.number])
    return asha


class ProgressCallback(tune.Callback):
    """What Tune says, in the listener's words; and where it asks whether a signal came."""

    def __init__(
        self,
        listener: Listener,
        interruption: Interruption,
        log: Callable[[str], None],
        waiting: Callable[[], str],
        patience: float,
        log_after: float = LOG_AFTER,
    ):
        """`waiting` puts into words what each trial waits for; after `patience` seconds without any it is an error."""
        self._listener, self._interruption, self._log, self._waiting = listener, interruption, log, waiting
        self._patience, self._log_after = patience, log_after
        self._idle_since, self._said = time.monotonic(), False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes a pickle of all that it is given; nobody reads it

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._interruption.check()
        if any(trial.status == "RUNNING" for trial in trials):
            self._idle_since, self._said = time.monotonic(), False
            return
        waited = time.monotonic() - self._idle_since
        if waited > self._log_after and not self._said:
            self._said = True
            self._log(f"no trial runs yet: waiting for {self._waiting()}")
        if waited > max(self._log_after, self._patience):
            raise UserError(
                f"no trial started within {waited:.0f} s: waited for {self._waiting()}; end what holds them, add "
                "nodes, or raise --placement-timeout, then --resume",
                code=1,
            )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._listener.trial_validated(trial.config["number"], ValidationResult(*result["look"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_ended(trial.config["number"], "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_ended(trial.config["number"], _reason(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log(f"trial {trial.config['number']} was lost ({_reason(trial)}); it is started again")


def _reason(trial: Any) -> str:
    """Why a trial was lost, in a line."""
    lines = [line for line in (trial.get_error() or "").splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]  # a traceback names it last, Ray explains it below
    return (named or lines or ["its process or its machine ended"])[-1].strip()[:200]


def _name(trial: Any) -> str:
    return f"{trial.config['number']:05d}"
