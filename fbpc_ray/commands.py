"""What each command does, from its settings to its last printed line."""

import json as json_format
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fbpc_ray import atomic, config, coreset, figures, pipeline, plan, results
from fbpc_ray.config import Config, Evaluation, Execution, read_config
from fbpc_ray.coreset import Coreset
from fbpc_ray.distill import State
from fbpc_ray.errors import UserError
from fbpc_ray.provenance import Provenance, capture, home
from fbpc_ray.run import Run, check_resume
from fbpc_ray.signals import Interrupted, Interruption
from fbpc_ray.vision.datasets import Dataset, denormalise
from fbpc_ray.vision.zoo import Network, Spec


def log(line: str) -> None:
    """One line for the person who watches."""
    print(line, flush=True)


def experts(settings: Config, *, dry_run: bool, json: str) -> None:
    """Train the expert trajectories that are missing."""
    plan.check(settings)
    dataset = plan.load_data(settings, log)
    specs = plan.specs(settings, dataset)
    if dry_run:
        _describe(settings, dataset, specs)
        return
    with plan.backend(settings, Interruption(), log) as workers, _says_how_to_resume("the same command goes on"):
        stores = pipeline.train_experts(settings, dataset, specs, workers, log)
    for spec, store in zip(specs, stores, strict=True):
        log(f"{spec.architecture}: {store.folder}")
    _write_json(json, {s.architecture: str(store.folder) for s, store in zip(specs, stores, strict=True)})


def distill(settings: Config, *, resume: bool, dry_run: bool, json: str) -> None:
    """Experts, distillation, evaluation, files, MLflow."""
    run, settings = _open_run(settings, resume)
    plan.check(settings)
    if resume and (done := run.read_result()) and done["steps"] >= _steps(settings):
        log(f"this run is complete; raise --steps above {done['steps']} to go on\n\n{results.table(done['coresets'])}")
        _write_json(json, done)
        return
    dataset = plan.load_data(settings, log)
    specs = plan.specs(settings, dataset)
    first, labels = pipeline.first_state(dataset, settings.distillation.ipc, settings.distillation.seed)
    if dry_run:
        _describe(settings, dataset, specs)
        return
    state, rows = (resume and run.restore(labels, dataset.image_shape)) or (first, [])
    if state.step > _steps(settings):
        raise UserError(f"--steps {_steps(settings)} is below the {state.step} steps that the checkpoint has: raise it")
    learned = settings.distillation.method != "random"
    interruption = Interruption()
    again = f"resume with: fbpc distill --out {shlex.quote(str(run.folder))} --resume"
    with _says_how_to_resume(again), plan.backend(settings, interruption, log) as workers:
        run.write_config(settings)
        log(f"run: {run.folder}")
        made_by = capture(workers.describe())
        log(f"data: {dataset.name}, {len(dataset.train.labels)} training images; on {made_by.device}")
        with _tracked(settings, run, dataset, made_by) as tracker:
            if learned:
                stores = pipeline.train_experts(settings, dataset, specs, workers, log)
                if state.step:
                    log(f"resumed at step {state.step}")

                def show(current: State) -> None:
                    pixels = denormalise(current.images, dataset.mean, dataset.std).numpy()
                    tracker.image("coreset", figures.coreset_array(pixels, labels.numpy()), current.step)
                    _remember(run, tracker)

                show(state)
                start = time.perf_counter()
                if state.step < _steps(settings):
                    shared = {
                        "dataset": dataset,
                        "labels": labels.numpy(),
                        "settings": settings.distillation,
                        "augment": settings.networks.augment,
                        "expert_count": settings.experts.expert_count,
                    }
                    each = [{"spec": spec, "store": store} for spec, store in zip(specs, stores, strict=True)]
                    workers.start_workers(shared, each, plan.threads(settings))
                    state = pipeline.distill(settings, run, state, rows, workers, interruption, tracker.metrics, show)
                    workers.stop_workers()
                log(f"distilled: step {state.step}, {time.perf_counter() - start:.0f} s; {_endings(rows)}")
            method = settings.distillation.method
            made = {name: _coreset(s, labels, dataset) for name, s in (("random", first), (method, state))}
            facts = {"method": method, "data": dataset.name, "step": str(state.step), "commit": made_by.commit}
            coreset.save(made[method], run.coreset_path, facts)
            coreset.save(made["random"], run.random_path, {**facts, "method": "random"})
            pixels = denormalise(state.images, dataset.mean, dataset.std).numpy()
            title = f"{method}, {dataset.name}, {settings.distillation.ipc} a class, step {state.step}"
            figures.coreset_grid(pixels, labels.numpy(), dataset.classes, run.picture_path, title)
            scored = pipeline.evaluate(
                made, specs, dataset, "test", settings.evaluation, settings.networks.augment, workers, log
            )
            result = results.result_of(settings, dataset, rows, scored, "test", made_by)
            run.write_result(result)
            tracker.metrics(results.metrics(scored), state.step)
            for path in (run.coreset_path, run.picture_path, run.result_path, run.metrics_path):
                if path.exists():
                    tracker.artifact(path)
            _remember(run, tracker)
    _write_json(json, result)
    log(f"\n{results.table(scored)}\n")
    log(f"picture: {run.picture_path}")
    log(f"result:  {run.result_path}")
    if tracker.uri:
        from fbpc_ray.tracking import ui_command

        log(f"MLflow:  {ui_command(tracker.uri)}")


def evaluate(
    folder: Path,
    architectures: Sequence[str],
    width: int,
    split: str,
    evaluation: Evaluation,
    execution: Execution,
    *,
    dry_run: bool,
    json: str,
) -> None:
    """SGHMC on the coreset of a run and on its Random coreset, on any architecture."""
    stored = read_config(folder)
    run = Run(folder)
    if split not in ("test", "validation"):
        raise UserError(f"--split {split}: choose test or validation")
    settings = stored.updated(
        architectures=tuple(architectures) or stored.networks.architectures, width=width or stored.networks.width
    )
    settings = Config(settings.data, settings.networks, settings.experts, settings.distillation, evaluation, execution)
    plan.check(settings)
    found = {"random": coreset.load(run.random_path), stored.distillation.method: coreset.load(run.coreset_path)}
    dataset = plan.load_data(settings, log)
    specs = plan.specs(settings, dataset)
    for name, each in found.items():
        if tuple(each.images.shape[1:]) != dataset.image_shape or each.classes != dataset.classes:
            raise UserError(
                f"the {name} coreset of {folder} is not of data set {dataset.name}: give the run of this data"
            )
    if dry_run:
        _describe(settings, dataset, specs)
        return
    with plan.backend(settings, Interruption(), log) as workers, _says_how_to_resume("nothing was written"):
        made_by = capture(workers.describe())
        scored = pipeline.evaluate(found, specs, dataset, split, evaluation, settings.networks.augment, workers, log)
    result = results.result_of(settings, dataset, [], scored, split, made_by)
    number = 1 + len(list((run.folder / "evaluations").glob("*.json")))
    path = run.folder / "evaluations" / f"{number:03d}-{split}-{'-'.join(s.architecture for s in specs)[:80]}.json"
    atomic.write_text(path, json_format.dumps(result, indent=2, allow_nan=False) + "\n")
    _write_json(json, result)
    log(f"\n{results.table(scored)}\n\nresult: {path}")


def _open_run(settings: Config, resume: bool) -> tuple[Run, Config]:
    """The run's folder and the configuration to run with; Raises UserError where --resume does not fit it."""
    out = settings.execution.out
    if resume:
        if not out:
            raise UserError("--resume needs the folder of the run: add --out DIR")
        run, stored = Run(Path(out)), read_config(Path(out))
        if settings.execution.threads == 0:
            settings = settings.updated(threads=stored.execution.threads)
        check_resume(stored, settings)
        return run, settings
    d = settings.distillation
    data = Path(settings.data.data.split(":")[-1]).name
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{d.method}-{data}-ipc{d.ipc}"
    run = Run(Path(out).expanduser() if out else home() / "outputs" / name)
    run.refuse_if_taken()
    return run, settings.updated(threads=plan.threads(settings), out=str(run.folder))


def _steps(settings: Config) -> int:
    return 0 if settings.distillation.method == "random" else settings.distillation.steps


def _coreset(state: State, labels: Any, dataset: Dataset) -> Coreset:
    return Coreset(state.images, labels, dataset.mean, dataset.std, dataset.classes)


def _endings(rows: list[dict[str, Any]]) -> str:
    endings = [row["map_ending"] for row in rows]
    steps = sum(row["map_steps"] for row in rows) / max(len(rows), 1)
    counted = ", ".join(f"{endings.count(ending)} {ending}" for ending in sorted(set(endings)))
    return f"MAP solves: {counted}, {steps:.0f} steps on average"


def _describe(settings: Config, dataset: Dataset, specs: Sequence[Spec]) -> None:
    """--dry-run: what would be done."""
    log(config.to_json(settings).rstrip())
    counts = {part: len(getattr(dataset, part).labels) for part in ("train", "validation", "test")}
    log(f"data: {dataset.name}, {len(dataset.classes)} classes, images {dataset.image_shape}, {counts}")
    for spec in specs:
        store = plan.store(settings, dataset, spec)
        missing = len(store.missing(settings.experts.expert_count))
        size = f"{Network(spec).parameter_count:,} parameters"
        log(f"{spec.architecture}: {size}; {missing} experts to train in {store.folder}")
    log("dry run: nothing was written")


@contextmanager
def _says_how_to_resume(how: str) -> Iterator[None]:
    try:
        yield
    except Interrupted:
        print(f"stopped; {how}", file=sys.stderr, flush=True)
        raise


def _write_json(path: str, value: Any) -> None:
    if path:
        atomic.write_text(Path(path).absolute(), json_format.dumps(value, indent=2, allow_nan=False) + "\n")


class _Untracked:
    """In the place of a Tracker where there is none."""

    run_id = None
    uri = ""

    def metrics(self, values: dict[str, float], step: int) -> None: ...

    def image(self, key: str, image: Any, step: int) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...


@contextmanager
def _tracked(settings: Config, run: Run, dataset: Dataset, made_by: Provenance) -> Iterator[Any]:
    """The MLflow run of this distillation, ended as the block ends."""
    if not settings.execution.tracking:
        yield _Untracked()
        return
    try:
        from fbpc_ray import tracking
    except ImportError as error:
        log(f"note: no MLflow ({error}); everything is in {run.folder}")
        yield _Untracked()
        return
    uri = tracking.default_uri(home())
    remembered = run.folder / "mlflow.json"
    before = json_format.loads(remembered.read_text()) if remembered.exists() else {}
    d = settings.distillation
    tracker = tracking.Tracker(
        uri,
        settings.execution.experiment,
        run_name=run.folder.name,
        run_id=before.get("run_id") if before.get("uri") == uri else None,
        tags={
            "method": d.method, "data": dataset.name, "ipc": str(d.ipc),
            "commit": made_by.commit, "device": made_by.device,
            "architectures": " ".join(settings.networks.architectures), "folder": str(run.folder),
            **{f"version.{name}": version for name, version in made_by.versions.items()},
        },
        params=settings.flat(),
        log=log,
    )  # fmt: skip
    for part in ("train", "test"):
        split = getattr(dataset, part)
        tracker.dataset(dataset.name, dataset.name, split.images, split.labels, part)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
        _remember(run, tracker)


def _remember(run: Run, tracker: Any) -> None:
    """Keep the id of the MLflow run, so that --resume goes on with it."""
    path = run.folder / "mlflow.json"
    if tracker.run_id:
        text = json_format.dumps({"uri": tracker.uri, "run_id": tracker.run_id}) + "\n"
        if not path.exists() or path.read_text() != text:
            atomic.write_text(path, text)
