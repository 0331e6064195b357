"""Run the trials of a sweep with Ray Tune: how many at a time, on which workers, and ASHA's pruning.

Tune only schedules. The results of a sweep are in its own files (`tuning.trial`), so a resumed sweep is a new `Tuner`
over the unfinished trials. `Tuner.restore` would unpickle a file, forget the results that ASHA compared, and miss
everything after its last snapshot.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import place as located
from fbpc_ray.execution.ray.connection import free, nodes
from fbpc_ray.execution.ray.placement import Resources, capacity, infeasible_message, share
from fbpc_ray.execution.ray.ray_backend import RayBackend
from fbpc_ray.execution.ray.waiting import Wait
from fbpc_ray.execution.session import num_steps, shared_folder_note
from fbpc_ray.tuning.trial import MODES, Outcome, Task, ValidationResult, run_trial

ATTEMPTS = 3
"""Attempts per trial before it counts as lost."""
REDUCTION = 2
"""ASHA: half of the trials continue from each rung to the next, which has twice the steps."""
LOG_AFTER = 60.0
"""Seconds without a running trial until the log says so; starting one takes ten."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials write their own files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails reports nothing
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Interruption handles SIGINT
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Listener(Protocol):
    """Receives the events of trials, in the driver."""

    def trial_started(self, number: int) -> None: ...

    def trial_validated(self, number: int, result: ValidationResult) -> None: ...

    def trial_ended(self, number: int, lost: str) -> None:
        """Handle the end of a trial; `lost` is why its machine failed, or "" if it finished or was stopped."""
        ...


def run(
    task: Task,
    outcomes: Sequence[Outcome],
    backend: RayBackend,
    interruption: Interruption,
    listener: Listener,
    log: Callable[[str], None],
) -> None:
    """Run all open and lost trials. Files of trials stay if the sweep is interrupted.

    Raises:
        Interrupted: after a signal.
        UserError: no worker fits on the cluster.
    """
    unfinished = [outcome.number for outcome in outcomes if outcome.status in ("open", "lost")]
    if not unfinished:
        return
    need, workers = place(task, len(unfinished), backend)
    parallel = min(len(unfinished), capacity(nodes(), need) // workers) or 1
    out = located(task.configs[0].output.out)
    if isinstance(out, Path) and backend.uses_other_machines:
        log(shared_folder_note(out.parent.parent, "--out"))
    size = f"{workers} worker{'s' * (workers != 1)} of {need}"
    log(f"{len(unfinished)} trials to run, {parallel} at a time, each on {size}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    def waiting_for() -> str:
        return f"{workers} x {need} for a trial; the Ray cluster has {free()} free"

    bundles = [{}, *({"CPU": need.cpus, "GPU": need.gpus} for _ in range(workers))]
    callback = ProgressCallback(listener, interruption, log, waiting_for, backend.settings.placement_timeout)
    # ignore_cleanup_errors: a thread of Tune may still write to its folder while a signal ends the sweep.
    with tempfile.TemporaryDirectory(prefix="fbpc-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, task=task), tune.PlacementGroupFactory(bundles)),
            param_space={"number": tune.grid_search(unfinished)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(task, outcomes), trial_name_creator=_name, trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=f"{datetime.now():%Y%m%d-%H%M%S}", storage_path=scratch, verbose=0,
                failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
                callbacks=[callback],
            ),
        )  # fmt: skip
        tuner.fit()


def place(task: Task, trials: int, backend: RayBackend) -> tuple[Resources, int]:
    """Return the resources of a worker and the workers of a trial. Raises UserError if none fits."""
    num_tasks = max(len(c.networks.architectures) * c.distillation.draws_per_step for c in task.configs)
    all_nodes, x = nodes(), backend.settings
    need = backend.need(num_tasks, x.threads)
    fitting = capacity(all_nodes, need)
    if not fitting and not x.autoscale:
        raise UserError(infeasible_message(all_nodes, need))
    requested = task.settings.workers_per_trial
    if requested > fitting and not x.autoscale:
        raise UserError(
            f"--workers-per-trial {requested} of {need} each, but the Ray cluster has room for {fitting}: "
            "lower it, or add nodes"
        )
    return need, requested or share(all_nodes, need, num_tasks, trials)


def _trial(config: dict[str, Any], task: Task) -> None:
    """Run a trial in its placement group. Tune calls this function in a thread of the trial's process."""
    number, metric = config["number"], task.settings.metric
    trial_config = task.configs[number]
    path = located(trial_config.output.out) / "log.txt"
    lines = [path.read_text()] if path.is_file() else []

    def log(line: str) -> None:
        lines.append(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        files.write_text(path, "".join(lines))

    def report(result: ValidationResult) -> None:
        tune.report({"step": result.step, metric: getattr(result, metric), "validation": result})

    backend = RayBackend(trial_config.workers, Interruption(), log)
    try:
        run_trial(task, number, backend, report, log)
    finally:
        backend.close()


class _Asha(ASHAScheduler):
    """ASHA that starts with the results of earlier sessions: its rungs are those of the whole sweep."""

    past: dict[int, list[dict[str, Any]]] = {}  # noqa: RUF012
    """Earlier results of the unfinished trials, by number."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self.add_results(trial, self.past.get(trial.config["number"], []))

    def add_results(self, trial: Any, results: list[dict[str, Any]]) -> None:
        """Put the earlier results of a trial on the rungs."""
        for result in results:
            super().on_trial_result(None, trial, result)  # type: ignore[arg-type]


def _scheduler(task: Task, outcomes: Sequence[Outcome]) -> Any:
    """Return the scheduler of a sweep, which knows the results of earlier sessions."""
    metric = task.settings.metric
    if task.settings.scheduler == "none":
        return FIFOScheduler()
    interval = min(config.distillation.checkpoint_every for config in task.configs)
    asha = _Asha(
        time_attr="step", grace_period=interval, reduction_factor=REDUCTION,
        max_t=max(1 + interval, *(1 + num_steps(config) for config in task.configs)),
    )  # fmt: skip
    asha.set_search_properties(metric, MODES[metric])
    asha.past = past = {}
    for outcome in outcomes:
        results = [{"step": result.step, metric: getattr(result, metric)} for result in outcome.record.validations]
        if outcome.status in ("open", "lost"):
            past[outcome.number] = results  # added once Tune adds the trial
        else:
            trial = SimpleNamespace(trial_id=f"over-{outcome.number}", config={"number": outcome.number})
            asha.on_trial_add(None, trial)
            asha.add_results(trial, results)
    return asha


class ProgressCallback(tune.Callback):
    """Passes Tune's events to a listener; checks for signals and for a sweep without a running trial."""

    def __init__(
        self,
        listener: Listener,
        interruption: Interruption,
        log: Callable[[str], None],
        waiting_for: Callable[[], str],
        patience: float,
        log_after: float = LOG_AFTER,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Start to wait for the first trial.

        Args:
            waiting_for: describes the resources that a trial waits for.
            patience: seconds without a running trial after which the sweep fails.
            log_after: seconds without a running trial until the log says so.
        """
        self._listener, self._interruption, self._log = listener, interruption, log
        self._wait = Wait(
            clock, log, log_after=log_after, patience=max(log_after, patience),
            message=lambda: f"no trial runs yet: waiting for {waiting_for()}",
            error=lambda seconds: (
                f"no trial started within {seconds:.0f} s: waited for {waiting_for()}; end what holds them, add "
                "nodes, or raise --placement-timeout, then --resume"
            ),
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks into a file that we never read

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._interruption.check()
        if any(trial.status == "RUNNING" for trial in trials):
            self._wait.restart()
        else:
            self._wait.check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._listener.trial_validated(trial.config["number"], ValidationResult(*result["validation"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_ended(trial.config["number"], "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.trial_ended(trial.config["number"], _reason(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log(f"trial {trial.config['number']} was lost ({_reason(trial)}); it is started again")


def _reason(trial: Any) -> str:
    """Return the line of a trial's error that names it."""
    lines = [line for line in (trial.get_error() or "").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]  # the last one; Ray's explanation follows it
    return (errors or lines or ["its process or its machine ended"])[-1].strip()[:200]


def _name(trial: Any) -> str:
    return f"{trial.config['number']:05d}"
