"""MLflow runs of distillations and evaluations: their names, tags and params, their start and end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from fbpc_ray.core import files, inputs
from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import ELSEWHERE, Config
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.presets import start_of
from fbpc_ray.core.provenance import Provenance, home
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.core.storage import Place
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import results
from fbpc_ray.evaluation.evaluate import EvaluationResult
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.execution.session import Log
from fbpc_ray.tracking.protocol import NullTracker, Tracker
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


def description_tag(config: Config, data: str, scores: Sequence[ChainScore]) -> dict[str, str]:
    """Return the tag that MLflow shows as a run's description: method and data, and the table of scores."""
    d = config.distillation
    text = f"{d.method} on {data}, {d.ipc} a class; mean +- standard deviation over chains"
    return {"mlflow.note.content": f"{text}:\n\n{results.table(scores, markdown_table)}"}


LEADING = ("accuracy", "nll", "ece")
"""Scores that a run shows first."""


def step_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a step's metrics under MLflow's names: `loss`, and the internals under `debug/`."""
    return {name if name == "loss" else f"debug/{name}": value for name, value in metrics.items()}


def score_metrics(scored: EvaluationResult, method: str, split: str = "test") -> dict[str, float]:
    """Return scores under MLflow's names: the coreset's means over networks and chains as test/accuracy, test/nll and
    test/ece (val/... of the validation split), and all means over chains under `debug/`.
    """
    means = results.mean_scores(results.select(scored.scores, method))
    prefix = "test" if split == "test" else "val"
    leading = {f"{prefix}/{name}": means[name] for name in LEADING if name in means}
    return {**leading, **{f"debug/{name}": value for name, value in scored.metrics(split).items()}}


@contextmanager
def track_distillation(
    config: Config, dataset: Dataset, run: RunDirectory, provenance: Provenance, log: Log
) -> Iterator[Tracker]:
    """Yield the tracker of a distillation; a resumed run continues its MLflow run. The run ends with the block."""
    tags = {**run_tags(config, dataset.name), **provenance_tags(provenance), "folder": str(run.folder)}
    run_id = _run_id(run, default_uri(home()))
    tracker = _start_tracker(config, run, log, run_name=run.folder.name, run_id=run_id, tags=tags)
    for part in ("train", "validation", "test"):
        split = getattr(dataset, part)
        if len(split.labels):
            tracker.log_dataset(dataset.name, dataset.name, split.images, split.labels, part)
    try:
        with _finishing(tracker):
            yield tracker
    finally:
        write_run_reference(run, tracker)


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
    parent = _run_id(run, uri)
    tags = {
        **({"mlflow.parentRunId": parent} if parent else {}),
        **run_tags(config, dataset.name), **provenance_tags(provenance), **tags, "folder": str(run.folder),
    }  # fmt: skip
    tracker = _start_tracker(config, run, log, run_name=f"{run.folder.name}/{name}", run_id=None, tags=tags, uri=uri)
    with _finishing(tracker):
        yield tracker


def _start_tracker(
    config: Config, run: RunDirectory, log: Log, *, run_name: str, run_id: str | None, tags: Mapping[str, str],
    uri: str = "",
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
    if run_id := _run_id(run, uri):
        return run_id
    if other := read_run_reference(run).get("uri"):
        log(
            f"MLflow: the model goes to {redacted(uri)}, as your settings say; {_reference_path(run)} names "
            f"{redacted(other)}, which only --tracking-uri or MLFLOW_TRACKING_URI can choose"
        )
    return tracker.run_id or ""


def _reference_path(run: RunDirectory) -> Place:
    return run.folder / "mlflow.json"


def read_run_reference(run: RunDirectory) -> dict[str, str]:
    """Return {"uri", "run_id"}: the store and the MLflow run of a distillation; empty where none was tracked."""
    path = _reference_path(run)
    if not path.exists():
        return {}
    with undamaged(path, "delete it, and the run is logged as a new one"):
        reference = inputs.read_checked_json(path)
        texts = {name: str(reference[name]) for name in ("uri", "run_id")}
        return {name: "".join(c if c.isprintable() else "?" for c in text) for name, text in texts.items()}


def write_run_reference(run: RunDirectory, tracker: Tracker) -> None:
    """Write the id of the MLflow run, so that --resume continues it; nothing while the run has no id."""
    if not tracker.run_id:
        return
    reference = {"uri": redacted(tracker.uri), "run_id": tracker.run_id}
    with suppress(UserError):  # a damaged file is replaced
        if read_run_reference(run) == reference:
            return
    files.write_checked_json(_reference_path(run), reference, private=True)


def _run_id(run: RunDirectory, uri: str) -> str | None:
    """Return the id of the run in the store `uri`; None where that store has no such run."""
    reference = read_run_reference(run)
    return reference.get("run_id") if redacted(reference.get("uri", "")) == redacted(uri) else None
