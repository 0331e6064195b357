"""MLflow runs of distillations and evaluations: their start and end, and what is logged between."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log
from fbpc_ray.core.provenance import Provenance, home
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.loop import Row
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import diagnostics, results
from fbpc_ray.evaluation.diagnostics import Mixing
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.tracking import run_reference
from fbpc_ray.tracking.protocol import NullTracker, Tracker
from fbpc_ray.tracking.run_contents import (
    PENDING,
    description_tag,
    metrics_of_rows,
    provenance_tags,
    run_params,
    run_tags,
    score_metrics,
)
from fbpc_ray.tracking.run_reference import RunReference
from fbpc_ray.tracking.uri import absolute, default_uri


def mlflow_module(fallback: str, log: Log) -> ModuleType | None:
    """Import and return `tracking.tracker`; None where MLflow is missing, and the log says what holds instead."""
    try:
        from fbpc_ray.tracking import tracker
    except ImportError as error:
        log(f"note: no MLflow ({error}); {fallback}")
        return None
    return tracker


def log_steps(tracker: Tracker, rows: Sequence[Row]) -> None:
    """Log all metrics that the rows of metrics.parquet hold: a killed driver may not have delivered them."""
    for step, values in metrics_of_rows(rows).items():
        tracker.log_metrics(values, step)


@contextmanager
def track_distillation(
    config: Config, dataset: Dataset, run: RunDirectory, provenance: Provenance, log: Log
) -> Iterator[Tracker]:
    """Yield the tracker of a distillation; a resumed run continues its MLflow run. The run ends with the block."""
    with _tracking(config, run, dataset.name, provenance, log) as tracker:
        for part in ("train", "validation", "test"):
            split = getattr(dataset, part)
            if len(split.labels):
                tracker.log_dataset(dataset.name, dataset.name, split.images, split.labels, part)
        yield tracker


def deliver_result(config: Config, run: RunDirectory, result: Mapping[str, Any], log: Log) -> None:
    """Log to MLflow what it lacks of an ended run: the driver was killed, or the server was down at the end."""
    reference = run_reference.read(run) if config.output.tracking else None
    if reference is None or reference.delivered:
        return
    provenance = Provenance(
        result.get("versions", {}), result.get("commit", "unknown"), result.get("device", "unknown")
    )
    with _tracking(config, run, result["data"], provenance, log) as tracker:
        log_steps(tracker, run.read_metrics())
        scores, mixing = results.from_json(result["coresets"]), diagnostics.from_json(result.get("mixing", {}))
        log_result(tracker, run, config, result["data"], scores, mixing, result["steps"])


@contextmanager
def _tracking(
    config: Config, run: RunDirectory, data: str, provenance: Provenance, log: Log
) -> Iterator[Tracker]:  # fmt: skip
    """Yield the tracker of the run's own MLflow run, which ends with the block; keep its reference up to date."""
    if not config.output.tracking:
        yield NullTracker()
        return
    tags = {**run_tags(config, data), **provenance_tags(provenance), "folder": str(run.folder)}
    reference = run_reference.of_store(run, default_uri(home()))
    # Before MLflow makes the run, so that a resume finds this one.
    run_reference.write(run, reference._replace(delivered=False))
    tracker = _start_tracker(
        config, run, log, run_name=run.folder.name, run_id=reference.run_id or None, key=reference.key, tags=tags
    )
    if config.distillation.method != "random":  # which logs nothing before its test scores
        tracker.log_metrics(PENDING, 0)
    try:
        with finishing(tracker.finish):
            yield tracker
    finally:
        update_reference(run, tracker, delivered=tracker.delivered and run.result_path.exists())


def update_reference(run: RunDirectory, tracker: Tracker, delivered: bool = False) -> None:
    """Write the id that MLflow gave the run; nothing while it has none."""
    if tracker.run_id:
        key = ""
        with suppress(UserError):  # a file that was damaged meanwhile is replaced
            key = run_reference.of_store(run, tracker.uri).key
        run_reference.write(run, RunReference(tracker.uri, tracker.run_id, key, delivered))


def log_result(
    tracker: Tracker, run: RunDirectory, config: Config, data: str, scores: Sequence[ChainScore],
    mixing: Sequence[Mixing], step: int,
) -> None:  # fmt: skip
    """Log scores, description and files of an ended run; `data` is the name of the data set."""
    tracker.log_metrics(score_metrics(scores, mixing, config.distillation.method), step)
    tracker.set_tags(description_tag(config, data, scores))
    for path in (
        run.config_path, run.coreset_path, run.before_path, run.picture_path, run.over_time_path, run.course_path,
        run.reliability_path, run.result_path, run.metrics_path,
    ):  # fmt: skip
        if path.exists():
            tracker.log_artifact(path)


@contextmanager
def track_evaluation(
    config: Config,
    dataset: Dataset,
    run: RunDirectory,
    name: str,
    tags: Mapping[str, str],
    provenance: Provenance,
    log: Log,
    uri: str = "",
) -> Iterator[Tracker]:
    """Yield the tracker of an evaluation called `name`, in the store `uri`, else the default one.

    Its MLflow run is a child of the distillation's, where the store has that, and ends with the block. Its metrics have
    the names of the distillation's.
    """
    if not config.output.tracking:
        yield NullTracker()
        return
    uri = chosen_uri(uri)
    parent = run_reference.of_store(run, uri).run_id
    tags = {
        **({"mlflow.parentRunId": parent} if parent else {}),
        **run_tags(config, dataset.name), **provenance_tags(provenance), **tags, "folder": str(run.folder),
    }  # fmt: skip
    tracker = _start_tracker(config, run, log, run_name=f"{run.folder.name}/{name}", run_id=None, tags=tags, uri=uri)
    with finishing(tracker.finish):
        yield tracker


def _start_tracker(
    config: Config, run: RunDirectory, log: Log, *, run_name: str, run_id: str | None, tags: Mapping[str, str],
    key: str = "", uri: str = "",
) -> Tracker:  # fmt: skip
    """Return a tracker; one that logs nothing where MLflow is missing."""
    mlflow = mlflow_module(f"everything is in {run.folder}", log)
    if mlflow is None:
        return NullTracker()
    return mlflow.MlflowTracker(
        chosen_uri(uri),
        config.output.experiment,
        run_name=run_name,
        run_id=run_id,
        key=key,
        tags=tags,
        params=run_params(config),
        log=log,
    )


@contextmanager
def finishing(finish: Callable[[str], None]) -> Iterator[None]:
    """Call `finish` with how the block ended: FINISHED, FAILED, or KILLED by an interruption."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        finish(status)


def chosen_uri(uri: str) -> str:
    """Return `uri`, absolute; where it is empty MLFLOW_TRACKING_URI, else the SQLite database of HOME."""
    return absolute(uri) if uri else default_uri(home())


def model_run(run: RunDirectory, uri: str, tracker: Tracker, log: Log) -> str:
    """Return the id of the MLflow run in the store `uri` that gets a model of `run`; empty where there is none.

    That is the distillation's run, else the one of this evaluation. mlflow.json may be a stranger's: it chooses a run,
    never a store, which would get the user's token.
    """
    if not tracker.uri:
        return ""
    reference = run_reference.read(run)
    if reference and reference.is_of(uri) and reference.run_id:
        return reference.run_id
    if reference and not reference.is_of(uri):
        log(
            f"MLflow: the model goes to {redacted(uri)}, as your settings say; {run_reference.path_of(run)} names "
            f"{redacted(reference.uri)}, which only --tracking-uri or MLFLOW_TRACKING_URI can choose"
        )
    return tracker.run_id or ""
