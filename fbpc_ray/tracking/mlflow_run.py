"""One MLflow run: found again or created, and its metrics without points that it has already."""

import contextlib
import getpass
import json
import sys
import uuid
from collections.abc import Callable

from fbpc_ray.tracking.mlflow_client import (
    MAX_METRICS,
    SESSION_TAG,
    Metric,
    MlflowClient,
    MlflowException,
    Run,
    milliseconds,
    open_store,
    stored_value,
)
from fbpc_ray.tracking.uri import VIEW_TAG, artifact_folder, database

COLUMNS = (
    "metrics.`test/accuracy`", "metrics.`test/nll`", "metrics.`val/accuracy`", "metrics.`val/nll`", "tags.`method`",
    "tags.`data`", "tags.`ipc`",
)  # fmt: skip
"""Columns of the list of runs; MLflow's own are source, model and data set."""
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    VIEW_TAG: json.dumps({"selectedColumns": COLUMNS}),
}
"""Tags of an experiment: MLflow shows its pages as those of trained models, and `fbpc ui` the columns."""


class MlflowRun:
    """A run of an experiment, created at the first `open` that MLflow answers.

    Args:
        uri: of the store, absolute.
        run_id: continue this run. key: in its place, continue the run made with this key, or make one.
        note: called with (kind, line) for what the user should know.
    """

    def __init__(
        self, uri: str, experiment: str, run_name: str, run_id: str | None, key: str, note: Callable[[str, str], None]
    ):
        self.uri = uri
        self.run_id = run_id
        """None until the store has answered; when continuing, the given id from the start."""
        self.experiment_id: str | None = None
        self.continued = run_id is not None
        self._experiment, self._run_name, self._note = experiment, run_name, note
        self._started, self._session, self._keyed = milliseconds(), key or uuid.uuid4().hex, bool(key)
        self._past: dict[str, set[tuple[int, float]]] = {}  # continued run: metric -> {(step, value)} it has already

    def open(self) -> MlflowClient:
        """Find or create experiment and run. May be called again after it raised anywhere."""
        client = open_store(self.uri, database(self.uri), self._note)
        run = self._existing(client)
        if run is None:
            experiment_id = self._open_experiment(client)
            run = self._of_session(client, experiment_id) or self._create(client, experiment_id)
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self.experiment_id, self.run_id = run.info.experiment_id, run.info.run_id
        return client

    def _existing(self, client: MlflowClient) -> Run | None:
        """Return the run of `run_id`; None, with a note, where it is gone."""
        if not self.run_id:
            return None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            self._note("gone", f"MLflow: {self.uri} has no run {self.run_id} any more; a new one is created.")
            self.run_id, self.continued = None, False
            return None
        return run

    def _open_experiment(self, client: MlflowClient) -> str:
        """Return the experiment's id; create the experiment if missing, restore it if deleted."""
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return self._create_experiment(client)
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
            self._note("restored", f"MLflow: experiment {self._experiment!r} was deleted; it is restored.")
        if experiment.tags.get(VIEW_TAG) != EXPERIMENT_TAGS[VIEW_TAG]:  # of earlier code
            client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, EXPERIMENT_TAGS[VIEW_TAG])
        return experiment.experiment_id

    def _create_experiment(self, client: MlflowClient) -> str:
        folder = artifact_folder(self.uri)
        artifacts = folder.as_uri() if folder else None
        try:
            return client.create_experiment(self._experiment, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
        except MlflowException:
            experiment = client.get_experiment_by_name(self._experiment)
            if experiment is None:
                raise
            return experiment.experiment_id  # another run made it meanwhile

    def _of_session(self, client: MlflowClient, experiment_id: str) -> Run | None:
        """Return the run that carries the session key: made earlier, or by a request whose answer was lost."""
        runs = client.search_runs([experiment_id], f"tags.{SESSION_TAG} = '{self._session}'", max_results=1)
        if not runs:
            return None
        self.continued = self.continued or self._keyed
        return runs[0]

    def _create(self, client: MlflowClient, experiment_id: str) -> Run:
        tags = {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL", SESSION_TAG: self._session}
        with contextlib.suppress(OSError, KeyError):
            tags["mlflow.user"] = getpass.getuser()
        return client.create_run(experiment_id, start_time=self._started, tags=tags, run_name=self._run_name)

    def send_metrics(self, client: MlflowClient, points: list[Metric]) -> None:
        """Log points, without those that a continued run has already."""
        run_id = str(self.run_id)
        if self.continued:
            for key in {point.key for point in points} - self._past.keys():
                history = client.get_metric_history(run_id, key)
                self._past[key] = {(old.step, stored_value(old.value)) for old in history}
            points = [point for point in points if (point.step, stored_value(point.value)) not in self._past[point.key]]
        for start in range(0, len(points), MAX_METRICS):
            client.log_batch(run_id, metrics=points[start : start + MAX_METRICS], synchronous=True)
