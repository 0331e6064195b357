"""What runs in MLflow are called and carry, so that any two compare at once, and how they begin and end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fbpc_ray.core import files
from fbpc_ray.core.config import ELSEWHERE, Config
from fbpc_ray.core.errors import undamaged
from fbpc_ray.core.presets import start_of
from fbpc_ray.core.provenance import Provenance, home
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.core.storage import Place
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import results
from fbpc_ray.execution.session import Log
from fbpc_ray.tracking.uri import default_uri


class NullTracker:
    """In the place of a Tracker where there is none."""

    run_id = None
    uri = ""

    def log_metrics(self, values: dict[str, float], step: int) -> None: ...

    def log_image(self, key: str, image: Any, step: int) -> None: ...

    def log_artifact(self, path: Place, folder: str | None = None) -> None: ...

    def set_tags(self, values: dict[str, str]) -> None: ...

    def finish(self, status: str) -> None: ...


def mlflow_module(otherwise: str, log: Log) -> Any:
    """The module `tracking`, or None, said, where there is no MLflow."""
    try:
        from fbpc_ray.tracking import tracker as tracking
    except ImportError as error:
        log(f"note: no MLflow ({error}); {otherwise}")
        return None
    return tracking


def run_tags(config: Config, data: str) -> dict[str, str]:
    """The tags by which runs are told apart and grouped; `data` is the name of the data set."""
    d = config.distillation
    architectures = " ".join(config.networks.architectures)
    return {"method": d.method, "data": data, "ipc": str(d.ipc), "architectures": architectures}


ALWAYS = (
    "method", "data", "ipc", "architectures", "width", "steps", "alpha", "start_epoch", "start_rule", "seed",
)  # fmt: skip


def run_params(config: Config) -> dict[str, Any]:
    """What MLflow shows as parameters: the preset, and the settings that are not its own, those that a method brings
    among them. Not all: it writes them above every picture of its slider, and sixty would leave no room for it.
    `config.json`, an artifact, has the others."""
    row, start = start_of(config)
    before = start.flat()
    return {"preset": row or "none"} | {
        name: " ".join(value) if isinstance(value, tuple) else value
        for name, value in config.flat().items()
        if name in ALWAYS or (value != before[name] and name not in ELSEWHERE)
    }


def provenance_tags(provenance: Provenance) -> dict[str, str]:
    """The tags that say what made a run."""
    versions = {f"version.{name}": version for name, version in provenance.versions.items()}
    return {"commit": provenance.commit, "device": provenance.device, **versions}


def description_tag(config: Config, data: str, scored: results.Evaluated) -> dict[str, str]:
    """The tag that MLflow shows as the description of a run: what it is, and its scores."""
    d = config.distillation
    told = f"{d.method} on {data}, {d.ipc} a class; accuracy and the rest as mean +- standard deviation over chains"
    return {"mlflow.note.content": f"{told}:\n\n```\n{results.table(scored)}\n```"}


@contextmanager
def track_distillation(
    config: Config, dataset: Dataset, run: RunDirectory, provenance: Provenance, log: Log
) -> Iterator[Any]:
    """The Tracker of a distillation's run, which a resume goes on with; ended as the block ends."""
    tracking = mlflow_module(f"everything is in {run.folder}", log) if config.output.tracking else None
    if not tracking:
        yield NullTracker()
        return
    uri = default_uri(home())
    tracker = tracking.MlflowTracker(
        uri,
        config.output.experiment,
        run_name=run.folder.name,
        run_id=_id_in(run, uri),
        tags={**run_tags(config, dataset.name), **provenance_tags(provenance), "folder": str(run.folder)},
        params=run_params(config),
        log=log,
    )
    for part in ("train", "validation", "test"):
        split = getattr(dataset, part)
        if len(split.labels):
            tracker.log_dataset(dataset.name, dataset.name, split.images, split.labels, part)
    try:
        with _ended(tracker):
            yield tracker
    finally:
        write_run_reference(run, tracker)


@contextmanager
def track_evaluation(
    config: Config,
    dataset: Dataset,
    run: RunDirectory,
    name: str,
    tags: dict[str, str],
    provenance: Provenance,
    log: Log,
) -> Iterator[Any]:
    """The Tracker of an evaluation called `name`, whose run stands under that of the distillation, with the same names
    of metrics; ended as the block ends."""
    tracking = mlflow_module(f"everything is in {run.folder}", log) if config.output.tracking else None
    if not tracking:
        yield NullTracker()
        return
    uri = default_uri(home())
    parent = _id_in(run, uri)
    tracker = tracking.MlflowTracker(
        uri,
        config.output.experiment,
        run_name=f"{run.folder.name}/{name}",
        tags={
            **({"mlflow.parentRunId": parent} if parent else {}),
            **run_tags(config, dataset.name), **provenance_tags(provenance), **tags, "folder": str(run.folder),
        },
        params=run_params(config),
        log=log,
    )  # fmt: skip
    with _ended(tracker):
        yield tracker


@contextmanager
def _ended(tracker: Any) -> Iterator[None]:
    """Finish it as the block ends, with the status that says how."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def read_run_reference(run: RunDirectory) -> dict[str, str]:
    """{"uri", "run_id"}: the store and the MLflow run of a distillation; empty where none was tracked."""
    path = run.folder / "mlflow.json"
    if not path.exists():
        return {}
    with undamaged(path, "delete it, and the run is logged as a new one"):
        told = json.loads(path.read_text())
        return {name: str(told[name]) for name in ("uri", "run_id")}


def _id_in(run: RunDirectory, uri: str) -> str | None:
    """The id of the run in the store `uri`; None where it isn't there."""
    before = read_run_reference(run)
    return before.get("run_id") if before.get("uri") == uri else None


def write_run_reference(run: RunDirectory, tracker: Any) -> None:
    """Keep the id of the MLflow run, so that --resume goes on with it."""
    path = run.folder / "mlflow.json"
    if tracker.run_id:
        text = json.dumps({"uri": tracker.uri, "run_id": tracker.run_id}) + "\n"
        if not path.exists() or path.read_text() != text:
            files.write_text(path, text)
