"""`fbpc distill`: experts, distillation, evaluation, files, MLflow."""

import shlex
import statistics
import time
from dataclasses import replace
from typing import Any

from torch import from_numpy

from fbpc_ray.commands import planning, summary
from fbpc_ray.core import config as configuration
from fbpc_ray.core import files
from fbpc_ray.core.config import Config, Sweep, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.phases import Phases
from fbpc_ray.core.progress import log, progress, resume_hint
from fbpc_ray.core.provenance import capture, new_output
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.sizes import SizeRequest
from fbpc_ray.core.storage import place
from fbpc_ray.distillation.loop import Checkpointer, Row, Step, follow
from fbpc_ray.distillation.run_directory import RunDirectory, check_resume
from fbpc_ray.distillation.state import State
from fbpc_ray.evaluation import calibration, protocols, results
from fbpc_ray.execution import advice, validation
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.session import Session, num_steps
from fbpc_ray.execution.sizing import open_sized_session
from fbpc_ray.execution.worker_group import compiles_passes, cpu_threads
from fbpc_ray.reporting import image_grids, run_figures
from fbpc_ray.reporting.run_outputs import LiveRun, evaluate_run, pixels_of
from fbpc_ray.tracking import run_contents, run_logging
from fbpc_ray.tracking.uri import ui_command
from fbpc_ray.tuning import trial


def distill(config: Config, sizes: SizeRequest | None, *, resume: bool, dry_run: bool, json: str) -> None:
    """Train experts, distil, evaluate; write the files and the MLflow run.

    Args:
        sizes: what to choose sizes by once the data is known; None where `config` has them.
        json: where to copy result.json.
    """
    phases = Phases()
    phases.end("start")
    run, config = _open_run(validation.canonical(config), resume)
    if sizes is None:
        validation.check(config)
    if resume and (result := run.read_result()) and result["steps"] >= num_steps(config):
        tables = calibration.tables(protocols.of_result(result), results.from_json(result["coresets"]))
        log(f"this run is complete; raise --steps above {result['steps']} to go on\n{tables}")
        if not dry_run:
            run_logging.deliver_result(config, run, result, log)
            files.write_output(json, result)
        return
    start = config.updated(download=False) if dry_run else config
    sized = open_sized_session(start, sizes, log, planned=dry_run)
    session = sized.session
    if resume:
        consequence = "the run goes on with these images: stop it if it should not"
        if note := advice.changed_images_note(session.dataset, run.read_fingerprint(), "the run", consequence):
            log(note)
        if run.state_path.exists():
            session = replace(session, restored=session.start(run)[0])
    if dry_run:
        planning.describe(session, run=run.folder, limit=sized.limit, measured=sized.measured)
        return
    for note in advice.notes(session):
        log(note)
    phases.end("data")
    with files.exclusive_directory(run.folder):
        if not resume:
            run.refuse_if_taken()  # by a run that began when this one did, and has ended
        run.remove_leftovers()
        result, uri = _distill(session, run, resume, phases)
    files.write_output(json, result)
    scores = results.from_json(result["coresets"])
    log(f"{calibration.tables(protocols.of_result(result), scores)}\n")
    if text := summary.describe(scores, len(session.dataset.classes), len(session.dataset.test.labels)):
        log(f"{text}\n")
    log(f"time:    {phases.describe()}")
    log(f"picture: {run.picture_path}")
    log(f"coreset: {run.coreset_path}")
    log(f"result:  {run.result_path}")
    if uri:
        log(f"MLflow:  {ui_command(uri)}")
    log(summary.next_steps(run.folder))


def print_config(config: Config, sizes: SizeRequest | None) -> None:
    """Print the configuration of a run as JSON. Lines of the log must go to standard error."""
    config = validation.canonical(config)
    if sizes is None:
        validation.check(config)
    else:
        config = open_sized_session(config.updated(download=False), sizes, log).session.config
    print(configuration.to_json(config), end="")


def _open_run(config: Config, resume: bool) -> tuple[RunDirectory, Config]:
    """Return the run's directory and the configuration to run with. Raises UserError if --resume does not fit it."""
    out = config.output.out
    if resume:
        if not out:
            raise UserError("--resume needs the folder of the run: add --out DIR")
        run, stored = RunDirectory(place(out)), read_config(place(out), configuration.NOT_STARTED)
        run.refuse_sweep(f"resume it with `{shlex.join(['fbpc', 'tune', '--out', out, '--resume'])}`")
        if config.workers.threads == 0:
            config = config.updated(threads=stored.workers.threads)
        if config.workers.compiled == "auto":
            config = config.updated(compiled=stored.workers.compiled)
        if config.networks.memory_budget and not config.networks.chunk_images:
            config = config.updated(chunk_images=stored.networks.chunk_images)
        check_resume(stored, config)
        return run, config
    d = config.distillation
    run = RunDirectory(place(out) if out else new_output(d.method, config.data.data, d.ipc))
    run.refuse_if_taken()
    return run, config.updated(threads=cpu_threads(config), out=str(run.folder))


def _distill(session: Session, run: RunDirectory, resume: bool, phases: Phases) -> tuple[dict[str, Any], str]:
    """Return the result, and the address of the MLflow store that has the run (empty if none has)."""
    config = session.config
    compiled = compiles_passes(config, session.dataset, session.specs, log)
    if config.workers.compiled == "auto" or not resume:
        session = replace(session, config=config.updated(compiled="on" if compiled else "off"))
    state, rows = _start(session, run)
    interruption = Interruption()
    with (
        resume_hint("resume with: " + _resume_command(session.config, run)),
        open_backend(session.config, interruption, log) as workers,
    ):
        run.write_config(session.config)
        log(f"run: {run.folder}")
        provenance = capture(workers.describe())
        images = len(session.dataset.train.labels)
        log(f"data: {session.dataset.name}, {images} training images; on {provenance.device}")
        if compiled:
            log("the first steps compile the passes, tens of seconds each; later runs reuse them (--compiled off)")
        with run_logging.track_distillation(session.config, session.dataset, run, provenance, log) as tracker:
            live = LiveRun(session, run, workers, provenance, tracker)
            phases.end("Ray" if config.workers.backend == "ray" else "workers")
            if session.num_steps:
                state = run_steps(live, state, rows, interruption, phases)
            result = evaluate_run(live, state, rows)
            phases.end("evaluation")
    phases.end("end")
    return result, tracker.uri if tracker.in_store else ""


def _start(session: Session, run: RunDirectory) -> tuple[State, list[Row]]:
    """Return the state to start from and the metrics so far. Raises UserError for one beyond --steps."""
    state, rows = session.start(run)
    if state.step > session.num_steps:
        raise UserError(
            f"--steps {session.num_steps} is below the {state.step} steps of the checkpoint in {run.folder}: raise it"
        )
    return state, rows


def _resume_command(config: Config, run: RunDirectory) -> str:
    flags = configuration.never_from_a_file(config)
    repeated = [word for name, words in flags.items() if name != "out" for word in words]
    return shlex.join(["fbpc", "distill", "--out", str(run.folder), "--resume", *repeated])


def run_steps(live: LiveRun, state: State, rows: list[Row], interruption: Interruption, phases: Phases) -> State:
    """Train the missing experts and take the missing steps; return the last state. `rows` grows."""
    session, tracker, workers = live.session, live.tracker, live.workers
    d = session.config.distillation
    session.train_experts(workers, log)
    phases.end("experts")
    if state.step:
        log(f"resumed at step {state.step}")
        run_logging.log_steps(tracker, rows)
    validator = Validator(live)
    _show_images(live, state)
    if state.step:
        validator.catch_up(state, rows)
    else:
        columns = validator.validate(state)
        rows += [{"step": 0, "architecture": name, "draw": 0, **values} for name, values in columns.items()]
    start = time.perf_counter()
    checkpointer = Checkpointer(
        live.run, state, rows, d, lambda saved: _show_images(live, saved), session.dataset.fingerprint
    )
    with progress("distil", d.steps, "step", state.step) as bar:

        def track(step: Step) -> None:
            tracker.log_metrics(run_contents.step_metrics(step.metrics()), step.state.step)

        def show_progress(step: Step) -> None:
            bar.update(loss=f"{step.metrics()['loss']:.3f}")

        state = follow(session.steps(state, workers), checkpointer, [track, validator, show_progress], interruption)
    phases.end("distillation")
    log(f"distilled: step {state.step}, {time.perf_counter() - start:.0f} s{_solver_summary(rows)}")
    return state


class Validator:
    """Scores the images on the validation split every `--val-every` steps and after the last one."""

    def __init__(self, live: LiveRun):
        self.live, self.every = live, live.session.config.output.val_every

    def __call__(self, step: Step) -> None:
        """Validate if due; add the scores to the step's rows."""
        if self._due(step.state):
            _add_columns(step.rows, self.validate(step.state))

    def catch_up(self, state: State, rows: list[Row]) -> None:
        """Validate a restored state whose validation a signal ended; add the scores to the rows of its step, and save.

        No step may follow that would save them.
        """
        last = [row for row in rows if row["step"] == state.step]
        if self._due(state) and all(row.get("val_nll") is None for row in last):
            _add_columns(last, self.validate(state))
            self.live.run.save(state, rows, self.live.run.read_fingerprint())

    def _due(self, state: State) -> bool:
        return bool(self.every) and (state.step % self.every == 0 or state.step == self.live.session.num_steps)

    def validate(self, state: State) -> dict[str, dict[str, float]]:
        """Log the scores of `state`; return them by architecture, as columns of metrics.parquet."""
        if not self.every:
            return {}
        live = self.live
        scores = trial.validate(live.session, state, Sweep(), live.workers, log)
        columns = {
            architecture: {f"val_{quantity}": value for quantity, value in results.mean_scores(chains).items()}
            for architecture in results.unique(score.architecture for score in scores)
            for chains in [results.select(scores, architecture=architecture)]
        }
        named = [{"architecture": name, **values} for name, values in columns.items()]
        if means := run_contents.validation_metrics(named):
            live.tracker.log_metrics(means, state.step)
            nll, accuracy = means["val/nll"], 100 * means["val/accuracy"]
            log(f"step {state.step}: validation NLL {nll:.4g}, accuracy {accuracy:.1f} %")
        return columns


def _add_columns(rows: list[Row], columns: dict[str, dict[str, float]]) -> None:
    """Add to each row the columns of its architecture."""
    for row in rows:
        row |= columns.get(row["architecture"], {})


def _show_images(live: LiveRun, state: State) -> None:
    """Log the images of `state`, and save some of them for the picture of the course over the steps."""
    session, pixels = live.session, pixels_of(state, live.session.dataset)
    live.tracker.log_image("coreset", image_grids.coreset_array(pixels, session.labels.numpy()), state.step)
    live.run.remember(state.step, from_numpy(run_figures.followed(pixels, session.labels)))
    run_logging.update_reference(live.run, live.tracker)


def _solver_summary(rows: list[Row]) -> str:
    endings = results.map_endings(rows)
    if not endings:
        return ""
    steps = statistics.fmean(row["map_steps"] for row in rows if row.get("map_ending"))
    counts = ", ".join(f"{count} {ending}" for ending, count in endings.items())
    return f"; MAP solves: {counts}, {steps:.0f} steps on average"
