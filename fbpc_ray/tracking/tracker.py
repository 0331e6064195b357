"""MLflow, kept at arm's length: runs and what is logged to them. Tracking may be late or fail, and never stops a run.
Only this file imports MLflow, mlflow_model.py, which writes models, and served.py, which MLflow runs.

Every call of a `Tracker` only appends to a queue; one daemon thread drains it. A thread, and not a call that tries and
gives up, because the first use of a SQLite database takes seconds, and a server that accepts and never answers costs a
whole timeout a call: neither may be taken out of the distillation loop. Importing this file (3 s, all MLflow's) stays
with the caller: two threads that import at once can see half-made modules. Nothing forks, and notes are printed by the
caller's thread at its next call, so that they don't tear a progress bar.

A delivery that failed may have arrived all the same, so each can be repeated without harm: metrics carry the time of
the call (MLflow drops a point that it has), a run is found again by its `fbpc_session` tag, images by key and step.
After a failure the server is probed. Silent: wait `retry_seconds`. Alive: only this record is at fault, so it is set
aside, tried again later, and doesn't hold up those behind it.
"""

import contextlib
import getpass
import hashlib
import os
import re
import sys
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fbpc_ray.core.files import file_lock
from fbpc_ray.core.storage import Place, local
from fbpc_ray.tracking.uri import absolute, database, run_url

ENVIRONMENT = {  # defaults that MLflow reads at import and later: silent, no telemetry, short waits; the user's win
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the queue retries; MLflow would repeat even the creation of a run
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "GIT_PYTHON_REFRESH": "quiet",
}
for _variable, _value in ENVIRONMENT.items():
    os.environ.setdefault(_variable, _value)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # only what the import itself says
    from mlflow import MlflowClient
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.http_dataset_source import HTTPDatasetSource
    from mlflow.data.numpy_dataset import from_numpy
    from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
    from mlflow.exceptions import MlflowException

SESSION = "fbpc_session"  # tag of a run: the Tracker that created it
KIND = {"mlflow.experimentKind": "custom_model_development"}  # of an experiment: its pages are those of trained models
MAX_METRICS, MAX_PARAMS, MAX_PARAM, MAX_TAG, MAX_NAME = 1000, 100, 6000, 8000, 250  # MLflow's limits
LAST_TRIES = 3  # of finish, with a server that doesn't answer
FLOAT_MAX = sys.float_info.max  # SQL stores keep an infinity as this


class Found(NamedTuple):
    """A run of the store."""

    run_id: str
    experiment_id: str
    running: bool


def find_runs(uri: str, experiment: str, tag: str, value: str) -> dict[str, Found]:
    """{key of a `Tracker`: its run} of the runs that carry a tag. Empty where MLflow doesn't answer."""
    uri = absolute(uri)
    silence_warnings()
    with contextlib.suppress(Exception):
        client, found, page = _open_store(uri, database(uri)), {}, None
        known = client.get_experiment_by_name(experiment)
        while known:
            part = client.search_runs([known.experiment_id], f"tags.`{_name(tag)}` = '{value}'", page_token=page)
            for run in part:
                key = run.data.tags.get(SESSION, run.info.run_id)
                found[key] = Found(run.info.run_id, run.info.experiment_id, run.info.status == "RUNNING")
            page = part.token
            if not page:
                return found
    return {}


@dataclass(slots=True)
class _Record:
    """One call of the caller. `metrics` beside `send`: neighbours of that kind share one request."""

    send: Callable[[MlflowClient, str, bool], None]  # (client, run id, was this tried before?)
    metrics: list[Metric] | None = None
    tries: int = 0


class MlflowTracker:
    """One MLflow run. No method raises because of MLflow, and only `finish` waits for it.

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
        silence_warnings()  # here, because the worker's thread must not change the filters
        self.uri = absolute(uri)
        self.run_id = run_id  # None while the store has not answered yet; when continuing, the given id from the start
        self.experiment_id: str | None = None
        self._experiment, self._run_name, self._log = experiment, run_name, log
        self._retry_seconds, self._finish_seconds = retry_seconds, finish_seconds
        self._started, self._session, self._keyed = _milliseconds(), key or uuid.uuid4().hex, bool(key)
        self._continued = run_id is not None
        self._past: dict[str, set[tuple[int, float]]] = {}  # continued run: metric -> {(step, value)} it has already
        self._wake = threading.Condition()  # guards what follows; the worker sends without holding it
        self._queue: deque[_Record] = deque()
        self._aside: list[_Record] = []  # failed although the server answers
        self._aside_due = 0.0  # time.monotonic() of their next try
        self._refused = 0  # the server will never take them
        self._notes: deque[str] = deque()  # lines for `log`
        self._noted: set[str] = set()
        self._status: str | None = None  # set by finish
        self._deadline = float("inf")  # time.monotonic() after which finish waits for no more records
        self._ended = False  # the run has its status on the server
        if tags:
            self.set_tags(tags)
        if params:
            values = dict(params)
            self._put(_Record(lambda client, run, _: _send_params(client, run, values)))
        self._worker = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._worker.start()

    def wait(self, seconds: float) -> bool:
        """Until the run has an id, for so long at most, or until MLflow doesn't answer. Whether it has one."""
        end = time.monotonic() + seconds
        while not self.experiment_id and time.monotonic() < end and "silent" not in self._noted:
            time.sleep(0.05)
        self._say_notes()
        return self.experiment_id is not None

    @property
    def pending(self) -> int:
        """Calls whose record has not been delivered (yet)."""
        return len(self._queue) + len(self._aside) + self._refused

    @property
    def url(self) -> str | None:
        """The run's page: on its server, or where `fbpc ui` will show it; None while the run has no id."""
        return run_url(self.uri, self.experiment_id, str(self.run_id)) if self.experiment_id else None

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points at `step`. NaN and infinity are kept: MLflow stores NaN as it is and an infinity as +-1.8e308."""
        now = _milliseconds()
        points = [Metric(_name(key), float(value), now, int(step)) for key, value in values.items()]
        self._put(_Record(lambda client, run, _: self._send_metrics(client, run, points), metrics=points))

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """A picture (h, w, 3) uint8 of a series; the run's "Model metrics" tab shows `key` with a slider over steps."""
        key, image, now = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", key), image.copy(), _milliseconds()

        def send(client: MlflowClient, run: str, again: bool) -> None:
            if not (again or self._continued) or not _has_image(client, run, key, step):
                client.log_image(run, image, key=key, step=step, timestamp=now, synchronous=True)

        self._put(_Record(send))

    def log_artifact(self, path: Place, folder: str | None = None) -> None:
        """A file, or a folder of this machine with all it holds, under `folder` of the run's artifacts; read when it is
        delivered."""
        path = path.absolute()

        def send(client: MlflowClient, run: str, _again: bool) -> None:
            if isinstance(path, Path) and path.is_dir():
                client.log_artifacts(run, str(path), f"{folder}/{path.name}" if folder else path.name)
                return
            with local(path) as file:
                client.log_artifact(run, str(file), folder)

        self._put(_Record(send))

    def log_dataset(self, name: str, source: str, images: np.ndarray, labels: np.ndarray, context: str) -> None:
        """Record the data used: images (n, ...), labels (n,), `source` a URL or a description, `context` such as
        "training". Keeps no reference to them, and looks at 512 images at most for the digest."""
        digest = hashlib.sha256(f"{images.shape} {images.dtype} {labels.dtype}".encode())
        digest.update(np.ascontiguousarray(images[:: max(1, len(images) // 512)]).tobytes())
        digest.update(np.ascontiguousarray(labels).tobytes())
        web = source.startswith(("http://", "https://"))
        origin = HTTPDatasetSource(source) if web else CodeDatasetSource({"mlflow.source.name": source})
        data = from_numpy(images, origin, labels, name, digest.hexdigest()[:8])
        entry = DatasetInput(data._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
        self._put(_Record(lambda client, run, _: client.log_inputs(run, [entry])))

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set or replace tags of the run."""
        values = dict(values)
        self._put(_Record(lambda client, run, _: _send_tags(client, run, values)))

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED: try a last time to deliver the rest, for at most
        `finish_seconds`, and say in one line what was not delivered. A second call does nothing."""
        if self._status is not None:
            return
        with self._wake:
            # The last quarter is kept for the status: a run that ended must not read RUNNING because of a long queue.
            self._deadline = time.monotonic() + 0.75 * self._finish_seconds
            self._status = status
            self._wake.notify()
        self._worker.join(self._finish_seconds)
        self._say_notes()
        if self.pending:
            self._log(f"MLflow: {self.pending} records not delivered to {self.uri}; the run's folder has everything.")
        elif not self._ended:
            self._log(f"MLflow: {self.uri} did not take the end of the run; it may still read RUNNING there.")
        elif "silent" in self._noted:
            self._log(f"MLflow: {self.uri} answered in the end, all records are delivered.")

    def _put(self, record: _Record) -> None:
        with self._wake:
            self._queue.append(record)
            self._wake.notify()
        self._say_notes()

    def _say_notes(self) -> None:
        while self._notes:
            self._log(self._notes.popleft())

    def _note(self, kind: str, line: str) -> None:
        """Have `line` said, unless a line of its kind was said before."""
        if kind not in self._noted:
            self._noted.add(kind)
            self._notes.append(line)

    # From here on: the worker thread.

    def _work(self) -> None:
        client, last = None, 0
        while True:
            last += self._status is not None  # read before delivering: what was queued before finish gets its try
            answered = False
            try:
                client = client or self._begin()
                answered = self._deliver(client)
            except Exception as error:  # noqa: BLE001  whatever MLflow, SQL or the network raises
                self._silent(error)
            if last and (answered or last == LAST_TRIES or time.monotonic() > self._deadline):
                break
            with self._wake:
                if last:
                    self._wake.wait(min(1.0, self._retry_seconds))
                elif answered:
                    self._wake.wait_for(
                        lambda: self._queue or self._status, self._retry_seconds if self._aside else None
                    )
                else:
                    self._wake.wait_for(lambda: self._status, self._retry_seconds)
        tries = 2 if answered else 0
        while client and tries and not self._ended:
            tries -= 1
            with contextlib.suppress(Exception):
                client.set_terminated(str(self.run_id), self._status, _milliseconds())
                self._ended = True

    def _begin(self) -> MlflowClient:
        """Find or create experiment and run. May be called again after it raised anywhere."""
        place = database(self.uri)
        client, run = _open_store(self.uri, place), None
        if self.run_id:
            try:
                run = client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            if run is None or run.info.lifecycle_stage == "deleted":
                self._note("gone", f"MLflow: {self.uri} has no run {self.run_id} any more; a new one is created.")
                run, self.run_id, self._continued = None, None, False
        if run is None:
            run = self._create_run(client, place.parent if place else None)
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self.experiment_id, self.run_id = run.info.experiment_id, run.info.run_id
        return client

    def _create_run(self, client: MlflowClient, place: Path | None) -> Run:
        """The run of this Tracker, in its experiment: created, or found if an earlier answer was lost on the way."""
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            # MLflow's own default is relative to the working directory, which may be a temporary one.
            where = (place / "mlartifacts").as_uri() if place else None
            try:
                experiment_id = client.create_experiment(self._experiment, artifact_location=where, tags=KIND)
            except MlflowException:
                experiment = client.get_experiment_by_name(self._experiment)
                if experiment is None:
                    raise
                experiment_id = experiment.experiment_id  # another run made it meanwhile
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment_id)
                self._note("restored", f"MLflow: experiment {self._experiment!r} was deleted; it is restored.")
        found = client.search_runs([experiment_id], f"tags.{SESSION} = '{self._session}'", max_results=1)
        if found:
            self._continued = self._continued or self._keyed
            return found[0]
        tags = {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL", SESSION: self._session}
        with contextlib.suppress(OSError, KeyError):
            tags["mlflow.user"] = getpass.getuser()
        return client.create_run(experiment_id, start_time=self._started, tags=tags, run_name=self._run_name)

    def _deliver(self, client: MlflowClient) -> bool:
        """Send what is queued, oldest first; True if the server answered. Once over the deadline, stop."""
        if self._status or time.monotonic() >= self._aside_due:
            with self._wake:
                self._queue.extend(self._aside)
                self._aside.clear()
        while self._queue and time.monotonic() < self._deadline:
            batch = self._head()
            again = batch[0].tries > 0
            for record in batch:
                record.tries += 1
            try:
                if batch[0].metrics is None:
                    batch[0].send(client, str(self.run_id), again)
                else:
                    points = [point for record in batch for point in record.metrics or []]
                    self._send_metrics(client, str(self.run_id), points)
            except Exception as error:  # noqa: BLE001  whatever MLflow, SQL, the network or a disk raises
                if not self._answers(client):
                    self._silent(error)
                    return False
                if len(batch) == 1 and again:
                    self._set_aside(error)
            else:
                with self._wake:
                    for _ in batch:
                        self._queue.popleft()
        return True

    def _head(self) -> list[_Record]:
        """The oldest record; with the metrics that follow it, as far as they fit in one request and are new."""
        batch, points = [self._queue[0]], len(self._queue[0].metrics or [])
        if batch[0].metrics is not None and not batch[0].tries:
            for index in range(1, len(self._queue)):
                record = self._queue[index]
                points += len(record.metrics or [])
                if record.metrics is None or record.tries or points > MAX_METRICS:
                    break
                batch.append(record)
        return batch

    def _set_aside(self, error: Exception) -> None:
        """Take the oldest record, which failed twice on a live server, out of the way of the others."""
        with self._wake:
            record = self._queue.popleft()
            code = error.get_http_status_code() if isinstance(error, MlflowException) else 500
            if 400 <= code < 500 and code not in (408, 429):
                self._refused += 1  # invalid, or the run was deleted: will not get better
            else:
                self._aside.append(record)
                self._aside_due = time.monotonic() + self._retry_seconds
        self._note("refused", f"MLflow: {self.uri} does not take a record ({reason(error)}); going on without it.")

    def _answers(self, client: MlflowClient) -> bool:
        with contextlib.suppress(Exception):
            client.get_run(str(self.run_id))
            return True
        return False

    def _silent(self, error: Exception) -> None:
        tail = "" if self._status else f"; going on without it, trying again every {self._retry_seconds:g} s"
        self._note("silent", f"MLflow: {self.uri} does not answer ({reason(error)}){tail}.")

    def _send_metrics(self, client: MlflowClient, run: str, points: list[Metric]) -> None:
        if self._continued:
            for key in {point.key for point in points} - self._past.keys():
                self._past[key] = {(old.step, _stored(old.value)) for old in client.get_metric_history(run, key)}
            points = [point for point in points if (point.step, _stored(point.value)) not in self._past[point.key]]
        for start in range(0, len(points), MAX_METRICS):
            client.log_batch(run, metrics=points[start : start + MAX_METRICS], synchronous=True)


def silence_warnings() -> None:
    """Keep back what MLflow's own tables make SQLAlchemy say when a database is opened."""
    warnings.filterwarnings("ignore", message=r"The ``noload`` loader strategy", category=DeprecationWarning)


def _open_store(uri: str, file: Path | None) -> MlflowClient:
    """A client; for a database `file`, one process after another: two first uses at once break it."""
    if file is None:
        return MlflowClient(uri)
    with file_lock(file.with_name(".mlflow.lock")):
        return MlflowClient(uri)


def _send_tags(client: MlflowClient, run: str, values: Mapping[str, str]) -> None:
    tags = [RunTag(_name(key), _cut(value, MAX_TAG)) for key, value in values.items()]
    for start in range(0, len(tags), MAX_PARAMS):
        client.log_batch(run, tags=tags[start : start + MAX_PARAMS], synchronous=True)


def _send_params(client: MlflowClient, run: str, values: Mapping[str, object]) -> None:
    """Params can't be changed in MLflow: log those the run doesn't have, and the changed ones as tags."""
    old = client.get_run(run).data.params
    texts = {_name(key): _cut(value, MAX_PARAM) for key, value in values.items()}
    params = [Param(key, text) for key, text in texts.items() if key not in old]
    for start in range(0, len(params), MAX_PARAMS):
        client.log_batch(run, params=params[start : start + MAX_PARAMS], synchronous=True)
    _send_tags(client, run, {f"resumed/{key}": text for key, text in texts.items() if old.get(key, text) != text})


def _has_image(client: MlflowClient, run: str, key: str, step: int) -> bool:
    """Whether `log_image` has completed for key and step (it writes the compressed copy last)."""
    start = f"images/{key.replace('/', '~')}+step+{step}+timestamp+"
    files = [file.path for file in client.list_artifacts(run, "images")]
    return any(file.startswith(start) and file.endswith("+compressed.webp") for file in files)


def _name(key: str) -> str:
    """`key` as MLflow takes names of metrics, params, tags: any other character becomes _, and /a//../b becomes a/b."""
    parts = [part for part in re.sub(r"[^/\w.\- :]", "_", key).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_NAME].rstrip("/") or "_"


def _cut(value: object, limit: int) -> str:
    text = str(value)
    mark = f" ... [cut, {len(text)} characters]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def _stored(value: float) -> float:
    """`value` as a store gives it back, fit to be compared: NaN, which equals nothing, as the impossible -inf."""
    return -np.inf if np.isnan(value) else float(np.clip(value, -FLOAT_MAX, FLOAT_MAX))


def reason(error: Exception) -> str:
    """The innermost cause in at most 120 characters of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:40]} ... {text[-75:]}"


def _milliseconds() -> int:
    return int(time.time() * 1000)
