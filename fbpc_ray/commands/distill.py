"""What each command does, from its settings to its last printed line."""

import json as json_format
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, from_numpy
from tqdm import tqdm

from fbpc_ray.core import config, files
from fbpc_ray.core.config import Config, Sweep, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import Provenance, capture, home
from fbpc_ray.core.signals import Interrupted, Interruption
from fbpc_ray.core.storage import Place, place
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, denormalise
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.expert_store import ExpertStore, slug
from fbpc_ray.distillation.run_directory import RunDirectory, check_resume
from fbpc_ray.distillation.worker import State
from fbpc_ray.evaluation import results
from fbpc_ray.evaluation.chains import ood_split
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Backend
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.reporting import charts, image_grids, run_figures
from fbpc_ray.tracking import model_export, run_logging
from fbpc_ray.tracking.uri import ui_command
from fbpc_ray.tuning import trial


def log(line: str) -> None:
    """One line for the person who watches, above the progress bar where there is one."""
    tqdm.write(line)
    sys.stdout.flush()


class Prepared(NamedTuple):
    """A configuration and what it stands for."""

    settings: Config
    dataset: Dataset
    specs: list[Spec]
    stores: list[ExpertStore]
    """The experts of each network; none for a method that needs none."""


def prepare(settings: Config, dry_run: bool) -> Prepared:
    """Load the data, build the networks and open the stores. Writes nothing, but for --download where it is no dry run.

    Raises UserError for what can't be.
    """
    if dry_run:
        settings = settings.updated(download=False)
    dataset = session.load_data(settings, log)
    specs = session.specs(settings, dataset)
    stores = [session.store(settings, dataset, spec) for spec in specs] if _steps(settings) else []
    return Prepared(settings, dataset, specs, stores)


def experts(settings: Config, *, dry_run: bool, json: str) -> None:
    """Train the expert trajectories that are missing, whichever of their epochs a distillation will take."""
    settings = session.canonical(settings)
    session.check(settings.updated(start_epoch=0, start_rule="from"))
    job = prepare(settings, dry_run)
    if dry_run:
        describe(job)
        return
    with session.backend(settings, Interruption(), log) as workers, says_how_to_resume("the same command goes on"):
        count = settings.experts.expert_count
        loop.train_experts(job.stores, job.specs, count, job.dataset, workers, log)
    folders = {spec.architecture: str(store.folder) for spec, store in zip(job.specs, job.stores, strict=True)}
    for architecture, folder in folders.items():
        log(f"{architecture}: {folder}")
    write_json(json, folders)


def distill(settings: Config, *, resume: bool, dry_run: bool, json: str) -> None:
    """Experts, distillation, evaluation, files, MLflow."""
    run, settings = _open_run(session.canonical(settings), resume)
    session.check(settings)
    if resume and (done := run.read_result()) and done["steps"] >= _steps(settings):
        log(f"this run is complete; raise --steps above {done['steps']} to go on\n\n{results.table(done['coresets'])}")
        write_json(json, done)
        return
    job = prepare(settings, dry_run)
    if dry_run:
        describe(job)
        return
    with files.exclusive_directory(run.folder):
        if not resume:
            run.refuse_if_taken()  # by one that began when this one did, and is through
        result, uri = _distil(job, run, resume)
    write_json(json, result)
    log(f"\n{results.table(result['coresets'])}\n")
    log(f"picture: {run.picture_path}")
    log(f"result:  {run.result_path}")
    if uri:
        log(f"MLflow:  {ui_command(uri)}")


def _distil(job: Prepared, run: RunDirectory, resume: bool) -> tuple[dict[str, Any], str]:
    """The result, and the store of MLflow that has the run, if any does."""
    settings, d = job.settings, job.settings.distillation
    first, labels = loop.first_state(job.dataset, d.ipc, d.seed, d.inner_lr)
    compiled = session.compiled(settings, job.dataset, job.specs, log)
    if settings.workers.compiled == "auto" or not resume:
        settings = settings.updated(compiled="on" if compiled else "off")
        job = job._replace(settings=settings)
    state, rows = (resume and run.restore(labels, job.dataset.image_shape)) or (first, [])
    if state.step > _steps(settings):
        raise UserError(f"--steps {_steps(settings)} is below the {state.step} steps that the checkpoint has: raise it")
    interruption = Interruption()
    repeated = [word for words in config.never_from_a_file(settings).values() for word in words]
    again = "resume with: " + shlex.join(["fbpc", "distill", "--out", str(run.folder), "--resume", *repeated])
    with says_how_to_resume(again), session.backend(settings, interruption, log) as workers:
        run.write_config(settings)
        log(f"run: {run.folder}")
        provenance = capture(workers.describe())
        log(f"data: {job.dataset.name}, {len(job.dataset.train.labels)} training images; on {provenance.device}")
        if compiled:
            log(
                "passes are compiled at the first steps, tens of seconds each, and kept for later runs (--compiled off)"
            )
        with run_logging.track_distillation(settings, job.dataset, run, provenance, log) as tracker:
            state = _learn(job, run, state, labels, rows, workers, interruption, tracker)
            result = judge(job, run, first, state, labels, rows, workers, provenance, tracker)
    return result, tracker.uri


def _learn(
    job: Prepared,
    run: RunDirectory,
    state: State,
    labels: Tensor,
    rows: list[dict[str, Any]],
    workers: Backend,
    interruption: Interruption,
    tracker: Any,
) -> State:
    """The missing experts, then the missing steps. Nothing, for a method that learns nothing."""
    settings, steps = job.settings, _steps(job.settings)
    if not steps:
        return state
    count = settings.experts.expert_count
    loop.train_experts(job.stores, job.specs, count, job.dataset, workers, log)
    if state.step:
        log(f"resumed at step {state.step}")

    def show(current: State) -> None:
        pixels = _pixels(current, job.dataset)
        tracker.log_image("coreset", image_grids.coreset_array(pixels, labels.numpy()), current.step)
        run.remember(current.step, from_numpy(run_figures.followed(pixels, labels)))
        run_logging.write_run_reference(run, tracker)

    def look(current: State) -> dict[str, dict[str, float]]:
        every = settings.output.val_every
        if not every or (current.step % every and current.step != steps):
            return {}
        table = trial.judge(current, labels, settings, Sweep(), job.specs, job.dataset, workers, log)
        found = results.means(table["coreset"])
        if found:
            tracker.log_metrics({f"val/{name}": value for name, value in found.items()}, current.step)
            log(f"step {current.step}: validation NLL {found['nll']:.4g}, accuracy {100 * found['accuracy']:.1f} %")
        return {
            name: {f"val_{quantity}": value for quantity, value in results.means({name: its}).items()}
            for name, its in table["coreset"].items()
        }

    show(state)
    if not state.step:
        look(state)
    start = time.perf_counter()
    if state.step < steps:
        workers.start_workers(session.crew(settings, job.dataset, labels, job.specs, job.stores))
        state = loop.distill(settings, run, state, rows, workers, interruption, tracker.log_metrics, show, look)
        workers.stop_workers()
    log(f"distilled: step {state.step}, {time.perf_counter() - start:.0f} s{_endings(rows)}")
    return state


def judge(
    job: Prepared,
    run: RunDirectory,
    first: State,
    state: State,
    labels: Tensor,
    rows: list[dict[str, Any]],
    workers: Backend,
    provenance: Provenance,
    tracker: Any,
) -> dict[str, Any]:
    """Write the coresets and the picture, evaluate both coresets, write the result; all of it to MLflow too."""
    dataset, d = job.dataset, job.settings.distillation
    made = {
        name: Coreset(each.images, labels, dataset.mean, dataset.std, dataset.classes)
        for name, each in (("random", first), (d.method, state))
    }
    facts = {"method": d.method, "data": dataset.name, "step": str(state.step), "commit": provenance.commit}
    coreset.save(made[d.method], run.coreset_path, facts)
    coreset.save(made["random"], run.random_path, {**facts, "method": "random", "step": "0"})
    title = f"{d.method}, {dataset.name}, {d.ipc} a class, step {state.step}"
    image_grids.coreset_grid(_pixels(state, dataset), labels.numpy(), dataset.classes, run.picture_path, title)
    if rows:
        before = f"real images, before step 1 of {d.method}"
        image_grids.coreset_grid(_pixels(first, dataset), labels.numpy(), dataset.classes, run.before_path, before)
        run_figures.over_time(run, labels, dataset.classes, f"{d.method}, {dataset.name}, over the steps")
        run_figures.course(rows, d.method, run.course_path)

    log(loop.judging(made, job.specs, "test", job.settings.evaluation))
    verdict = loop.evaluate(made, job.specs, dataset, "test", job.settings, workers, log)
    scored = verdict.table
    _draw_reliability(verdict, run.reliability_path)
    result = results.result_of(job.settings, dataset, rows, scored, "test", provenance, session.threads(job.settings))
    run.write_result(result)
    means = {f"test/{name}": value for name, value in results.means(scored[d.method]).items()}
    tracker.log_metrics(means | results.metrics(scored), state.step)
    tracker.set_tags(run_logging.description_tag(job.settings, dataset.name, scored))
    for path in (
        run.config_path, run.coreset_path, run.before_path, run.picture_path, run.over_time_path, run.course_path,
        run.reliability_path, run.result_path, run.metrics_path,
    ):  # fmt: skip
        if path.exists():
            tracker.log_artifact(path)
    return result


def evaluate(
    folder: Place,
    settings: Config,
    split: str,
    *,
    ood: str,
    ood_resize: bool,
    save_model: str,
    dry_run: bool,
    json: str,
) -> None:
    """SGHMC on the coreset of the run in `folder` and on its Random coreset, on the networks of `settings`; with `ood`,
    a data set, also how well their uncertainty tells its test images from those of the run; with `save_model`, a
    folder, what its first chain sampled as an MLflow model."""
    run, method = RunDirectory(folder), settings.distillation.method
    if split not in ("test", "validation"):
        raise UserError(f"--split {split}: choose test or validation")
    settings = session.canonical(settings)
    session.check(settings)
    found = {"random": coreset.load(run.random_path), method: coreset.load(run.coreset_path)}
    dataset = session.load_data(settings, log)
    specs = session.specs(settings, dataset)
    for name, each in found.items():
        if tuple(each.images.shape[1:]) != dataset.image_shape or each.classes != dataset.classes:
            raise UserError(
                f"the {name} coreset of {folder} is not of data set {dataset.name}: give the run of this data"
            )
    target, strange = model_export.asked(save_model, specs), None
    if ood:
        strange = ood_split(
            dataset, session.load_data(settings.updated(data=ood, normalisation="auto"), log), ood_resize
        )
    if dry_run:
        describe(Prepared(settings, dataset, specs, []))
        return
    with session.backend(settings, Interruption(), log) as workers, says_how_to_resume("nothing was written"):
        provenance = capture(workers.describe())
        path = _next_evaluation(run, split, specs)
        tags = {"evaluation": path.name, "split": split, **({"ood": ood} if ood else {})}
        keep = method if target else ""
        with run_logging.track_evaluation(
            settings, dataset, run, path.name.removesuffix(".json"), tags, provenance, log
        ) as tracker:
            log(loop.judging(found, specs, split, settings.evaluation))
            verdict = loop.evaluate(found, specs, dataset, split, settings, workers, log, strange, keep)
            result = results.result_of(
                settings, dataset, [], verdict.table, split, provenance, session.threads(settings)
            )
            result |= {"ood": ood} if ood else {}
            if path.exists():  # of one that began when this one did
                path = _next_evaluation(run, split, specs)
                tracker.set_tags({"evaluation": path.name})
            written = _write_evaluation(path, result, verdict, dataset, ood)
            step = coreset.metadata(run.coreset_path).get("step", "")
            tracker.log_metrics(results.metrics(verdict.table, split), int(step) if step.isdecimal() else 0)
            tracker.set_tags(run_logging.description_tag(settings, dataset.name, verdict.table))
            for each in written:
                tracker.log_artifact(each)
    scored = verdict.table
    write_json(json, result)
    log(f"\n{results.table(scored)}\n\nresult: {path} (pictures beside it)")
    if target:
        samples = model_export.kept(verdict, found[method], method, specs[0])
        facts = model_export.facts(settings, split, scored[method][specs[0].architecture], provenance)
        log(
            f"model:  {target}, which this serves: {model_export.save(samples, target, facts, dataset.test.images[:2])}"
        )
        if settings.output.tracking and (at := run_logging.read_run_reference(run)):
            address = model_export.log_to_run(samples, at["uri"], at["run_id"], facts, dataset.test.images[:2], log)
            log(f"MLflow: {address}" if address else "note: the model is in its folder alone")


def _next_evaluation(run: RunDirectory, split: str, specs: list[Spec]) -> Place:
    """A file for the result, its number above all that are there."""
    folder, about = run.folder / "evaluations", f"{split}-{'-'.join(spec.architecture for spec in specs)[:80]}"
    begins = [each.name.partition("-")[0] for each in folder.glob("*.json")]
    return folder / f"{1 + max((int(each) for each in begins if each.isdecimal()), default=0):03d}-{about}.json"


def _write_evaluation(
    path: Place, result: dict[str, Any], verdict: loop.EvaluationResult, dataset: Dataset, ood: str
) -> list[Place]:
    """The result and its pictures beside it; where they are."""
    files.write_text(path, json_format.dumps(result, indent=2, allow_nan=False) + "\n")
    _draw_reliability(verdict, path.with_suffix(".reliability.png"))
    written = [path, path.with_suffix(".reliability.png")]
    for (name, architecture), (familiar, unfamiliar) in verdict.uncertainty.items():
        written.append(path.with_suffix(f".{slug(f'{name}-{architecture}')}.entropy.png"))
        charts.entropy_histogram(
            familiar.entropy.numpy(), unfamiliar.entropy.numpy(), written[-1],
            f"{name} on {architecture}", len(dataset.classes), names=(dataset.name, ood),
        )  # fmt: skip
    return [each for each in written if each.exists()]


def _draw_reliability(verdict: loop.EvaluationResult, path: Place) -> None:
    """Confidence against accuracy of every coreset and architecture, the chains taken together."""
    if verdict.stats:
        charts.reliability({f"{coreset} on {name}": stats for (coreset, name), stats in verdict.stats.items()}, path)


def _open_run(settings: Config, resume: bool) -> tuple[RunDirectory, Config]:
    """The run's folder and the configuration to run with; Raises UserError where --resume does not fit it."""
    out = settings.output.out
    if resume:
        if not out:
            raise UserError("--resume needs the folder of the run: add --out DIR")
        run, stored = RunDirectory(place(out)), read_config(place(out), config.NOT_STARTED)
        if settings.workers.threads == 0:
            settings = settings.updated(threads=stored.workers.threads)
        if settings.workers.compiled == "auto":
            settings = settings.updated(compiled=stored.workers.compiled)
        check_resume(stored, settings)
        return run, settings
    d = settings.distillation
    data = Path(settings.data.data.split(":")[-1]).name
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{d.method}-{data}-ipc{d.ipc}"
    run = RunDirectory(place(out) if out else home() / "outputs" / name)
    run.refuse_if_taken()
    return run, settings.updated(threads=session.threads(settings), out=str(run.folder))


def _steps(settings: Config) -> int:
    return 0 if settings.distillation.method == "random" else settings.distillation.steps


def _pixels(state: State, dataset: Dataset) -> np.ndarray:
    """The pseudocoreset as (m, c, h, w) uint8."""
    return denormalise(state.images, dataset.mean, dataset.std).numpy()


def _endings(rows: list[dict[str, Any]]) -> str:
    endings = results.map_endings(rows)
    if not endings:
        return ""
    steps = sum(row["map_steps"] for row in rows) / len(rows)
    counted = ", ".join(f"{count} {ending}" for ending, count in endings.items())
    return f"; MAP solves: {counted}, {steps:.0f} steps on average"


def describe(job: Prepared) -> None:
    """--dry-run: what would be done."""
    log(config.to_json(job.settings).rstrip())
    counts = {part: len(getattr(job.dataset, part).labels) for part in ("train", "validation", "test")}
    log(f"data: {job.dataset.name}, {len(job.dataset.classes)} classes, images {job.dataset.image_shape}, {counts}")
    for spec in job.specs:
        log(f"{spec.architecture}: {Network(spec).parameter_count:,} parameters")
    for store in job.stores:
        missing = len(store.missing(job.settings.experts.expert_count))
        log(f"{missing} experts to train in {store.folder}")
    log("dry run: nothing was written")


@contextmanager
def says_how_to_resume(how: str) -> Iterator[None]:
    try:
        yield
    except Interrupted:
        print(f"stopped; {how}", file=sys.stderr, flush=True)
        raise


def write_json(path: str, value: Any) -> None:
    if path:
        files.write_text(place(path).absolute(), json_format.dumps(value, indent=2, allow_nan=False) + "\n")
