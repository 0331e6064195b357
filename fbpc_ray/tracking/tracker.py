"""The tracker that logs to MLflow. Tracking may be late or fail, and never stops a run.

Every call only appends a record to the queue of `delivery.Sender`, whose thread sends it.
"""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.storage import Place, local
from fbpc_ray.tracking.delivery import Notes, Record, Sender
from fbpc_ray.tracking.mlflow_client import (
    CodeDatasetSource,
    DatasetInput,
    HTTPDatasetSource,
    InputTag,
    Metric,
    MlflowClient,
    find_runs,
    from_numpy,
    has_image,
    milliseconds,
    send_params,
    send_tags,
    silence_warnings,
    valid_name,
)
from fbpc_ray.tracking.mlflow_run import MlflowRun
from fbpc_ray.tracking.uri import absolute, database, run_url

__all__ = ["Metric", "MlflowClient", "MlflowTracker", "find_runs"]


FIRST_USE = 4
"""Times `finish_seconds` that a short run waits for its database, whose creation takes 3 s of CPU, more when busy."""


class MlflowTracker:
    """One MLflow run, a `protocol.Tracker`. No method raises because of MLflow, and only `finish` waits for it.

    Args:
        uri: of the tracking server or database; a relative SQLite path is taken from the working directory.
        key: in the place of `run_id`: continue the run that was made with this key, or make one. Not for two at once.
        run_id: continue this run. Points it has already, with the same value, are not logged again; params that have
            changed become tags `resumed/<name>`. If it is gone, a new run is created, with a note.
        tags, params: of the run, the first two records to be delivered; too long values are cut, visibly.
        log: called with one line, from the caller's thread: once when MLflow doesn't answer, and at `finish`.
        retry_seconds: pause after a failed delivery. finish_seconds: the longest that `finish` waits.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        *,
        run_name: str,
        run_id: str | None = None,
        key: str = "",
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, object] | None = None,
        log: Callable[[str], None] = print,
        retry_seconds: float = 30.0,
        finish_seconds: float = 30.0,
    ):
        silence_warnings()  # here, because the sending thread must not change the filters
        self._log, self._finish_seconds, self._notes = log, finish_seconds, Notes()
        self._run = MlflowRun(absolute(uri), experiment, run_name, run_id, key, self._notes.add)
        self._sender = Sender(self._run, self._notes, retry_seconds)
        if tags:
            self.set_tags(tags)
        if params:
            values = dict(params)
            self._put(Record(lambda client, run, _: send_params(client, run, values)))
        self._sender.start()

    @property
    def uri(self) -> str:
        return self._run.uri

    @property
    def run_id(self) -> str | None:
        """None until the store has answered; when continuing, the given id from the start."""
        return self._run.run_id

    @property
    def experiment_id(self) -> str | None:
        return self._run.experiment_id

    @property
    def in_store(self) -> bool:
        """Whether the store has the run; not all of its records, see `pending`."""
        return self.experiment_id is not None

    @property
    def delivered(self) -> bool:
        """Whether the store has the end of the run and every record."""
        return self._sender.run_ended and not self.pending

    @property
    def url(self) -> str | None:
        """The run's page: on its server, or where `fbpc ui` will show it; None while the run has no id."""
        return run_url(self.uri, self.experiment_id, str(self.run_id)) if self.experiment_id else None

    @property
    def pending(self) -> int:
        """Calls whose record has not been delivered (yet)."""
        return self._sender.pending

    def wait(self, seconds: float) -> bool:
        """Wait until the run has an id or MLflow doesn't answer, `seconds` at most; return whether it has an id."""
        end = time.monotonic() + seconds
        while not self.experiment_id and time.monotonic() < end and "silent" not in self._notes.kinds:
            time.sleep(0.05)
        self._notes.print(self._log)
        return self.experiment_id is not None

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log points at `step`. MLflow stores NaN as it is and an infinity as +-1.8e308."""
        now = milliseconds()
        points = [Metric(valid_name(key), float(value), now, int(step)) for key, value in values.items()]
        self._put(Record(lambda client, run, _: self._run.send_metrics(client, points), metrics=points))

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log an image (h, w, 3) uint8; MLflow shows a series in "Model metrics", with a slider over the steps."""
        key, image, now = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", key), image.copy(), milliseconds()

        def send(client: MlflowClient, run: str, again: bool) -> None:
            if not (again or self._run.continued) or not has_image(client, run, key, step):
                client.log_image(run, image, key=key, step=step, timestamp=now, synchronous=True)

        self._put(Record(send))

    def log_artifact(self, path: Place, folder: str | None = None) -> None:
        """Log a file, or a local folder with its content, under `folder` of the run's artifacts; read at delivery."""
        path = path.absolute()

        def send(client: MlflowClient, run: str, _again: bool) -> None:
            if isinstance(path, Path) and path.is_dir():
                client.log_artifacts(run, str(path), f"{folder}/{path.name}" if folder else path.name)
                return
            with local(path) as file:
                client.log_artifact(run, str(file), folder)

        self._put(Record(send))

    def log_dataset(self, name: str, source: str, images: np.ndarray, labels: np.ndarray, context: str) -> None:
        """Record the data used: images (n, ...), labels (n,), `source` a URL or a description, `context` such as
        "training". Keeps no reference to them, and looks at no more than 1,023 images for the digest."""
        digest = hashlib.sha256(f"{images.shape} {images.dtype} {labels.dtype}".encode())
        digest.update(np.ascontiguousarray(images[:: max(1, len(images) // 512)]).tobytes())
        digest.update(np.ascontiguousarray(labels).tobytes())
        web = source.startswith(("http://", "https://"))
        origin = HTTPDatasetSource(source) if web else CodeDatasetSource({"mlflow.source.name": source})
        data = from_numpy(images, origin, labels, name, digest.hexdigest()[:8])
        entry = DatasetInput(data._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
        self._put(Record(lambda client, run, _: client.log_inputs(run, [entry])))

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set or replace tags of the run."""
        values = dict(values)
        self._put(Record(lambda client, run, _: send_tags(client, run, values)))

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; a second call does nothing.

        Try a last time to deliver the rest, for at most `finish_seconds` (longer while a database is created), and log
        one line about what was not delivered.
        """
        if self._sender.finished:
            return
        creates = status == "FINISHED" and database(self.uri) is not None and not self.in_store
        self._sender.finish(status, self._finish_seconds * (FIRST_USE if creates else 1))
        self._notes.print(self._log)
        uri = redacted(self.uri)
        if self.pending:
            self._log(f"MLflow: {self.pending} records not delivered to {uri}; the run's folder has everything.")
        elif not self._sender.run_ended:
            self._log(f"MLflow: {uri} did not take the end of the run; it may still read RUNNING there.")
        elif "silent" in self._notes.kinds:
            self._log(f"MLflow: {uri} answered in the end, all records are delivered.")

    def _put(self, record: Record) -> None:
        self._sender.put(record)
        self._notes.print(self._log)
