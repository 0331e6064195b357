"""MLflow runs of distillations and evaluations: their names, tags and params, their start and end."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import ELSEWHERE, Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import start_of
from fbpc_ray.core.progress import Log
from fbpc_ray.core.provenance import Provenance, home
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.loop import Row
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import diagnostics, protocols, results
from fbpc_ray.evaluation.calibration import Calibrated
from fbpc_ray.evaluation.diagnostics import Mixing
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.tracking import run_reference
from fbpc_ray.tracking.protocol import NullTracker, Tracker
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


def run_tags(config: Config, data: str) -> dict[str, str]:
    """Return the tags that tell runs apart and group them; `data` is the name of the data set."""
    d = config.distillation
    architectures = " ".join(config.networks.architectures)
    return {"method": d.method, "data": data, "ipc": str(d.ipc), "architectures": architectures}


ALWAYS_LOGGED = (
    "method", "data", "ipc", "architectures", "width", "steps", "alpha", "start_epoch", "start_rule", "seed",
)  # fmt: skip


def run_params(config: Config) -> dict[str, Any]:
    """Return MLflow's params: the preset, and the settings that differ from it, a method's own among them.

    Not all settings: MLflow writes the params above every image of its slider, and sixty would leave no room for it.
    The artifact `config.json` has the others.
    """
    preset, start = start_of(config)
    defaults = start.flat()
    return {"preset": preset or "none"} | {
        name: " ".join(value) if isinstance(value, tuple) else value
        for name, value in config.flat().items()
        if name in ALWAYS_LOGGED or (value != defaults[name] and name not in ELSEWHERE)
    }


def provenance_tags(provenance: Provenance) -> dict[str, str]:
    """Return the tags for code, device and versions."""
    versions = {f"version.{name}": version for name, version in provenance.versions.items()}
    return {"commit": provenance.commit, "device": provenance.device, **versions}


def description_tag(
    config: Config, data: str, scores: Sequence[ChainScore], calibrated: Calibrated | None = None
) -> dict[str, str]:
    """Return the tag that MLflow shows as a run's description: method and data, and the tables of scores; and the tag
    of the protocol."""
    d, protocol = config.distillation, protocols.name_of(config.evaluation)
    spread = "mean +- standard deviation over chains" + (f", protocol {protocol}" if protocol else "")
    text = f"{d.method} on {data}, {d.ipc} per class; {spread}:\n\n{results.table(scores, markdown_table)}"
    if calibrated:
        text += f"\n\nprotocol calibrated ({calibrated.flags}, chosen on the validation split):\n\n"
        text += results.table(calibrated.result.scores, markdown_table)
    names = [name for name in (protocol, protocols.CALIBRATED if calibrated else "") if name]
    return {"mlflow.note.content": text, **({"protocol": "; ".join(names)} if names else {})}


LEADING = ("accuracy", "nll", "ece")
"""Scores that a run shows first."""
PENDING = {f"test/{name}": math.nan for name in LEADING}
"""Test scores of step 0. MLflow's page that compares runs opens with the metric that was logged first."""


def step_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a step's metrics under MLflow's names: `loss`, and the internals under `debug/`."""
    return {name if name == "loss" else f"debug/{name}": value for name, value in metrics.items()}


def validation_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Return the means over architectures of the validation columns in a step's rows, as val/nll and so on.

    Empty where an architecture has none: the step was not validated, or all chains of one diverged.
    """
    columns = {
        row["architecture"]: {
            name: value for name, value in row.items() if name.startswith("val_") and value is not None
        }
        for row in rows
    }
    return {
        name.replace("_", "/", 1): statistics.fmean(values[name] for values in columns.values())
        for name in next(iter(columns.values()), {})
        if all(name in values for values in columns.values())
    }


def metrics_of_rows(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Return all metrics that the rows of metrics.parquet hold, by step, under MLflow's names."""
    metrics = {}
    for step, group in itertools.groupby(rows, lambda row: row["step"]):
        same = list(group)
        quantities = step_metrics(loop.metrics_of_rows(same)) if step else {}
        metrics[step] = quantities | validation_metrics(same)
    return metrics


def log_steps(tracker: Tracker, rows: Sequence[Row]) -> None:
    """Log all metrics that the rows of metrics.parquet hold: a killed driver may not have delivered them."""
    for step, values in metrics_of_rows(rows).items():
        tracker.log_metrics(values, step)


def score_metrics(
    scores: Sequence[ChainScore], mixing: Sequence[Mixing], method: str, split: str = "test"
) -> dict[str, float]:
    """Return scores under MLflow's names: the coreset's means over networks and chains as test/accuracy, test/nll and
    test/ece (val/... of the validation split), and all means over chains under `debug/`.
    """
    means = results.mean_scores(results.select(scores, method))
    prefix = "test" if split == "test" else "val"
    leading = {f"{prefix}/{name}": means[name] for name in LEADING if name in means}
    others = results.metrics(scores, split) | diagnostics.metrics(mixing, prefix)
    return {**leading, **{f"debug/{name}": value for name, value in others.items()}}


def calibrated_metrics(scores: Sequence[ChainScore], method: str, split: str) -> dict[str, float]:
    """Return the coreset's means under the protocol `calibrated`, as test/calibrated_accuracy and so on."""
    means, prefix = results.mean_scores(results.select(scores, method)), "test" if split == "test" else "val"
    return {f"{prefix}/{protocols.CALIBRATED}_{name}": means[name] for name in LEADING if name in means}


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
    reference = run_reference.read(run)
    if reference is None or reference.delivered or not config.output.tracking:
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
    tags = {**run_tags(config, data), **provenance_tags(provenance), "folder": str(run.folder)}
    reference = run_reference.of_store(run, default_uri(home()))
    if config.output.tracking:  # before MLflow makes the run, so that a resume finds this one
        run_reference.write(run, reference._replace(delivered=False))
    tracker = _start_tracker(
        config, run, log, run_name=run.folder.name, run_id=reference.run_id or None, key=reference.key, tags=tags
    )
    if config.distillation.method != "random":  # which logs nothing before its test scores
        tracker.log_metrics(PENDING, 0)
    try:
        with _finishing(tracker):
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
    uri = chosen_uri(uri)
    parent = run_reference.of_store(run, uri).run_id
    tags = {
        **({"mlflow.parentRunId": parent} if parent else {}),
        **run_tags(config, dataset.name), **provenance_tags(provenance), **tags, "folder": str(run.folder),
    }  # fmt: skip
    tracker = _start_tracker(config, run, log, run_name=f"{run.folder.name}/{name}", run_id=None, tags=tags, uri=uri)
    with _finishing(tracker):
        yield tracker


def _start_tracker(
    config: Config, run: RunDirectory, log: Log, *, run_name: str, run_id: str | None, tags: Mapping[str, str],
    key: str = "", uri: str = "",
) -> Tracker:  # fmt: skip
    """Return a tracker; one that logs nothing with --no-tracking and where MLflow is missing."""
    mlflow = mlflow_module(f"everything is in {run.folder}", log) if config.output.tracking else None
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
def _finishing(tracker: Tracker) -> Iterator[None]:
    """Finish the tracker as the block ends: FINISHED, FAILED, or KILLED by an interruption."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


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
