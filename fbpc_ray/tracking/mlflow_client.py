"""MLflow's client: import, environment, stores, and requests that can be repeated safely.

Importing this file takes 3 s, all of them MLflow's. A caller imports it, not a thread: two threads that import at once
can see half-made modules.
"""

import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.files import file_lock
from fbpc_ray.tracking.database import SIDECARS, inspect_quiet, moved_line, upgrade_command
from fbpc_ray.tracking.uri import absolute, database, sqlite_uri

ENVIRONMENT = {  # defaults that MLflow reads at import and later; variables that the user has set win
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

SESSION_TAG = "fbpc_session"
"""Tag of a run: the session key of the tracker that created it."""
MAX_METRICS, MAX_PARAMS, MAX_PARAM, MAX_TAG, MAX_NAME = 1000, 100, 6000, 8000, 250
"""MLflow's limits: two counts a request, three lengths."""
FLOAT_MAX = sys.float_info.max
"""SQL stores keep an infinity as this."""


__all__ = [
    "CodeDatasetSource", "DatasetInput", "HTTPDatasetSource", "InputTag", "Metric", "MlflowClient", "MlflowException",
    "Run", "find_runs", "from_numpy",
]  # fmt: skip
"""Of MLflow's names, those that the room's other files use."""


class FoundRun(NamedTuple):
    """A run of a store."""

    run_id: str
    experiment_id: str
    running: bool


def find_runs(uri: str, experiment: str, tag: str, value: str) -> dict[str, FoundRun]:
    """Return the runs that carry a tag, by the key of their tracker. Empty where MLflow doesn't answer."""
    silence_warnings()
    try:
        return _search_runs(absolute(uri), experiment, f"tags.`{valid_name(tag)}` = '{value}'")
    except Exception:  # noqa: BLE001  whatever MLflow, SQL or the network raises
        return {}


def _search_runs(uri: str, experiment: str, query: str) -> dict[str, FoundRun]:
    client = open_store(uri, database(uri))
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return {}
    runs: dict[str, FoundRun] = {}
    token = None
    while True:
        page = client.search_runs([known.experiment_id], query, page_token=token)
        for run in page:
            key = run.data.tags.get(SESSION_TAG, run.info.run_id)
            runs[key] = FoundRun(run.info.run_id, run.info.experiment_id, run.info.status == "RUNNING")
        token = page.token
        if not token:
            return runs


def silence_warnings() -> None:
    """Ignore the warnings of SQLAlchemy about MLflow's own tables, which opening a database raises."""
    warnings.filterwarnings("ignore", message=r"The ``noload`` loader strategy", category=DeprecationWarning)


def open_store(uri: str, file: Path | None, note: Callable[[str, str], None] = lambda kind, line: None) -> MlflowClient:
    """Return a client; create the database `file` if it is missing.

    A database is opened by one process at a time: two first uses at once break it. A half-made or damaged one is moved
    aside.

    Args:
        note: called with (kind, line) for what the user should know.

    Raises UserError for a database of another version of MLflow.
    """
    if file is None:
        return MlflowClient(uri)
    with file_lock(file.with_name(".mlflow.lock")):
        state = inspect_quiet(file)
        if state.is_useless:
            note("moved", moved_line(file, state))
        if state.kind == "other":
            raise UserError(f"{file} was written by another version of MLflow ({state.reason}): {upgrade_command(uri)}")
        if state.is_useless or state.kind == "missing":
            _create_database(file)
        return MlflowClient(uri)


def _create_database(file: Path) -> None:
    """Create a database under another name and move it in place: a kill leaves none, or the whole.

    The caller holds the lock, so that a temporary file of another process is one that was killed.
    """
    for leftover in file.parent.glob(f".{file.name}.*.tmp*"):
        leftover.unlink(missing_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    MlflowClient(sqlite_uri(temporary))._tracking_client.store.engine.dispose()
    for suffix in SIDECARS:  # of a database that was deleted: SQLite would apply a journal to the new one
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    temporary.replace(file)


def send_tags(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    """Set tags, as many requests as MLflow's limit needs."""
    tags = [RunTag(valid_name(key), cut(redacted(value), MAX_TAG)) for key, value in values.items()]
    for start in range(0, len(tags), MAX_PARAMS):
        client.log_batch(run_id, tags=tags[start : start + MAX_PARAMS], synchronous=True)


def send_params(client: MlflowClient, run_id: str, values: Mapping[str, object]) -> None:
    """Log the params that the run doesn't have; MLflow can't change params, so changed ones become tags."""
    old = client.get_run(run_id).data.params
    texts = {valid_name(key): cut(redacted(value), MAX_PARAM) for key, value in values.items()}
    params = [Param(key, text) for key, text in texts.items() if key not in old]
    for start in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS], synchronous=True)
    send_tags(client, run_id, {f"resumed/{key}": text for key, text in texts.items() if old.get(key, text) != text})


def has_image(client: MlflowClient, run_id: str, key: str, step: int) -> bool:
    """Tell whether `log_image` has completed for key and step (it writes the compressed copy last)."""
    start = f"images/{key.replace('/', '~')}+step+{step}+timestamp+"
    paths = [file.path for file in client.list_artifacts(run_id, "images")]
    return any(path.startswith(start) and path.endswith("+compressed.webp") for path in paths)


def valid_name(key: str) -> str:
    """Make `key` a valid name of a metric, param or tag: other characters become _, and /a//../b becomes a/b."""
    parts = [part for part in re.sub(r"[^/\w.\- :]", "_", key).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_NAME].rstrip("/") or "_"


def cut(value: object, limit: int) -> str:
    """Return the text of `value`, shortened to `limit` characters with a mark that says so."""
    text = str(value)
    mark = f" ... [cut, {len(text)} characters]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def stored_value(value: float) -> float:
    """Return `value` as a store returns it, comparable: NaN, which equals nothing, becomes -inf, which no store has."""
    return -np.inf if np.isnan(value) else float(np.clip(value, -FLOAT_MAX, FLOAT_MAX))


def reason(error: Exception) -> str:
    """Return an error's text in one line of at most 120 characters, without secrets; its end names the cause."""
    text = redacted(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:40]} ... {text[-75:]}"


def milliseconds() -> int:
    return int(time.time() * 1000)
