"""An MLflow run and its records: logged, resumed, replaced where it is lost."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.mlflow_records import PICTURE, history, images, wait_for

from fbpc_ray.tracking import mlflow_client
from fbpc_ray.tracking import uri as mlflow_uri
from fbpc_ray.tracking.mlflow_run import MlflowRun
from fbpc_ray.tracking.tracker import Metric, MlflowClient, MlflowTracker


def silent(line: str) -> None:
    raise AssertionError(f"nothing to say, but: {line}")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a SQLite store in a folder whose name needs quoting, first used by the tests."""
    return f"sqlite:///{tmp_path_factory.mktemp('a b')}/per%25cent/mlflow.db"


def test_run_with_everything(store: str, tmp_path: Path):
    file = tmp_path / "note.txt"
    file.write_text("first")
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    start, start_here = time.process_time(), time.thread_time()
    tracker = MlflowTracker(
        store,
        "every thing",
        run_name="one",
        tags={"method": "map", "long": "t" * 9000},
        params={"steps": 3, "archs": ("conv", "mlp"), "long": "p" * 7000},
        log=silent,
        finish_seconds=300,
    )
    for step in range(3):
        tracker.log_metrics({"acc/conv": step / 4, "odd@name,here//x": 1.0, "f32": float(np.float32(0.5))}, step)
        tracker.log_image("core@set/all", PICTURE, step)
    tracker.log_metrics({"nan": math.nan, "inf": math.inf, "minus": -math.inf}, 7)
    tracker.log_artifact(file)
    tracker.log_artifact(folder, "deep")
    rng = np.random.default_rng(0)
    train, labels = rng.integers(0, 255, (50_000, 3, 8, 8), dtype=np.uint8), np.zeros(50_000, np.int64)
    tracker.log_dataset("cifar", "/data/cifar", train, labels, "training")
    tracker.log_dataset("cifar", "https://example.org/cifar", train[:100], labels[:100], "test")
    tracker.set_tags({"method": "fbpc"})
    queued = time.thread_time() - start_here
    tracker.finish("FINISHED")
    tracker.finish("FAILED")  # does nothing any more

    assert queued < (time.process_time() - start) / 4  # the first use of the database was left to the worker
    assert tracker.pending == 0
    client = MlflowClient(store)
    assert tracker.run_id and tracker.url
    assert tracker.url.endswith(f"/runs/{tracker.run_id}?workflowType=machine_learning")
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "one")
    assert run.info.end_time and run.info.end_time >= run.info.start_time
    assert run.data.params["steps"] == "3"
    assert run.data.params["archs"] == "('conv', 'mlp')"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("[cut, 7000 characters]")
    assert run.data.tags["long"].endswith("[cut, 9000 characters]")
    assert run.data.tags["method"] == "fbpc"
    assert {"mlflow.user", "mlflow.source.name"} <= run.data.tags.keys()
    assert history(client, tracker.run_id, "acc/conv") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert history(client, tracker.run_id, "odd_name_here/x") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert history(client, tracker.run_id, "f32") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert math.isnan(history(client, tracker.run_id, "nan")[0][1])
    assert history(client, tracker.run_id, "inf") == [(7, sys.float_info.max)]
    assert history(client, tracker.run_id, "minus") == [(7, -sys.float_info.max)]
    assert images(client, tracker.run_id) == [f"core_set~all+step+{step}" for step in range(3)]
    assert run.data.tags["mlflow.loggedImages"] == "True"  # what makes the UI look for pictures
    assert Path(client.download_artifacts(tracker.run_id, "note.txt")).read_text() == "first"
    assert Path(client.download_artifacts(tracker.run_id, "deep/figures/a.txt")).read_text() == "a"
    assert run.inputs is not None
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert inputs["training"].name == "cifar"
    assert "50000, 3, 8, 8" in str(inputs["training"].profile)
    assert "/data/cifar" in inputs["training"].source
    assert inputs["test"].source_type == "http"
    assert inputs["training"].digest != inputs["test"].digest
    home = Path(store.removeprefix("sqlite:///").replace("%25", "%")).parent
    assert any((home / "mlartifacts" / tracker.run_id / "artifacts").iterdir())


def test_resume_continues_the_same_run(store: str):
    first = MlflowTracker(store, "resume", run_name="r", params={"steps": 2, "seed": 0}, log=silent)
    for step in range(4):
        first.log_metrics({"loss": 1 / (step + 1), "worst": math.inf, "none": math.nan}, step)
    first.log_image("u", PICTURE, 0)
    first.log_dataset("d", "source", PICTURE, PICTURE[:, 0, 0], "training")
    first.finish("KILLED")
    assert first.run_id

    second = MlflowTracker(
        store, "resume", run_name="r", run_id=first.run_id, params={"steps": 9, "seed": 0, "new": 1}, log=silent
    )
    assert second.run_id == first.run_id  # known at once, so that a checkpoint can keep it
    for step in range(2, 6):  # steps 2 and 3 are done again after the checkpoint, with the same result
        second.log_metrics({"loss": 1 / (step + 1), "worst": math.inf, "none": math.nan}, step)
    second.log_metrics({"loss": 7.0}, 3)  # not the same result: kept
    second.log_image("u", PICTURE, 0)
    second.log_image("u", PICTURE, 4)
    second.log_dataset("d", "source", PICTURE, PICTURE[:, 0, 0], "training")
    client = MlflowClient(store)
    wait_for(lambda: second.pending == 0)
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.finish("FINISHED")

    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"steps": "2", "seed": "0", "new": "1"}
    assert run.data.tags["resumed/steps"] == "9"
    assert "resumed/seed" not in run.data.tags
    expected = [(step, 1 / (step + 1)) for step in range(6)]
    assert history(client, first.run_id, "loss") == sorted([*expected, (3, 7.0)])
    assert [step for step, _ in history(client, first.run_id, "worst")] == list(range(6))
    assert sorted(point.step for point in client.get_metric_history(first.run_id, "none")) == list(range(6))
    assert images(client, first.run_id) == ["u+step+0", "u+step+4"]
    assert run.inputs is not None
    assert len(run.inputs.dataset_inputs) == 1
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_lost_run_and_deleted_experiment_are_replaced(store: str):
    first = MlflowTracker(store, "lost", run_name="r", log=silent)
    first.finish("FINISHED")
    client = MlflowClient(store)
    assert first.run_id and first.experiment_id
    client.delete_run(first.run_id)
    client.delete_experiment(first.experiment_id)
    lines: list[str] = []
    for run_id in (first.run_id, "0" * 32):
        second = MlflowTracker(store, "lost", run_name="r", run_id=run_id, log=lines.append)
        second.log_metrics({"a": 1.0}, 0)
        second.finish("FINISHED")
        assert second.run_id not in (None, run_id)
        assert second.pending == 0
        assert history(client, str(second.run_id), "a") == [(0, 1.0)]
    assert len(lines) == 3  # two lost runs, one experiment
    assert sum("a new one is created" in line for line in lines) == 2
    assert sum("is restored" in line for line in lines) == 1


def test_a_record_that_is_not_taken_holds_nothing_up(store: str, tmp_path: Path):
    lines: list[str] = []
    tracker = MlflowTracker(store, "refused", run_name="r", log=lines.append, retry_seconds=0.1)
    tracker.log_artifact(tmp_path / "missing.txt")
    tracker.log_artifact(tmp_path / "late.txt")
    tracker.log_image("u", np.zeros((2, 2, 7), np.uint8), 0)
    tracker.log_metrics({"a": 1.0}, 0)
    wait_for(lambda: tracker.pending == 3)
    client = MlflowClient(store)
    assert history(client, str(tracker.run_id), "a") == [(0, 1.0)]
    (tmp_path / "late.txt").write_text("here")
    wait_for(lambda: tracker.pending == 2)
    tracker.finish("FINISHED")
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    assert len(lines) == 2
    assert "does not take a record" in lines[0]
    assert "2 records not delivered" in lines[1]


def test_run_deleted_meanwhile(store: str):
    lines: list[str] = []
    tracker = MlflowTracker(store, "deleted", run_name="r", log=lines.append)
    wait_for(lambda: tracker.run_id is not None)
    MlflowClient(store).delete_run(str(tracker.run_id))
    for step in range(3):
        tracker.log_metrics({"a": 1.0}, step)
    tracker.finish("FINISHED")
    assert tracker.pending == 3
    assert len(lines) == 2


def test_names_and_uris(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert mlflow_uri.default_uri(tmp_path / "a b") == f"sqlite:///{tmp_path}/a b/mlflow.db"
    assert mlflow_uri.default_uri(tmp_path / "50%?") == f"sqlite:///{tmp_path}/50%25%3F/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert mlflow_uri.default_uri(Path("x")) == f"sqlite:///{tmp_path}/x/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
    assert mlflow_uri.default_uri(tmp_path) == f"sqlite:///{tmp_path}/own.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflow_uri.default_uri(tmp_path) == "http://127.0.0.1:5000"
    assert mlflow_uri.ui_command("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert mlflow_uri.ui_command("sqlite:////r/mlflow.db") == "fbpc ui --tracking-uri sqlite:////r/mlflow.db"
    assert mlflow_uri.ui_command("sqlite:////a b/mlflow.db").endswith(" 'sqlite:////a b/mlflow.db'")
    assert mlflow_uri.database("sqlite:////a b/50%25%3F.db") == Path("/a b/50%?.db")
    monkeypatch.setenv("PATH", "/nowhere")
    assert mlflow_uri.ui_command("sqlite:////r.db").startswith(f"{Path(sys.executable).with_name('fbpc')} ui ")
    names = {"a/b": "a/b", "/a//../b/": "a/b", "x@y,z": "x_y_z", "": "_", "..": "_", "n" * 249 + "/x": "n" * 249}
    assert {name: mlflow_client.valid_name(name) for name in names} == names


@pytest.mark.parametrize("uri, folder", [
    ("sqlite:////r/a%20b/mlflow.db", "file:///r/a%20b/mlartifacts"),
    ("postgresql+psycopg2://user:word@db:5432/mlflow", "file:///home/me/fbpc-ray/mlartifacts"),
    ("mysql://user:word@db/mlflow", "file:///home/me/fbpc-ray/mlartifacts"),
    ("http://127.0.0.1:5000", None),
    ("databricks", None),
])  # fmt: skip
def test_artifacts_never_go_to_the_current_folder(uri, folder, monkeypatch):
    """In a submitted job it is a temporary copy, and MLflow keeps an experiment's address of artifacts for good."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("FBPC_HOME", raising=False)
    locations = []

    class Client:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name, artifact_location, tags):
            locations.append(artifact_location)
            return "1"

    run = MlflowRun(uri, "fbpc", "r", None, "", lambda kind, line: None)
    run._open_experiment(Client())  # type: ignore[arg-type]
    assert locations == [folder]


@pytest.mark.slow
def test_two_first_uses_at_once_are_silent_and_safe(tmp_path: Path):
    """Two processes, one new database: MLflow, Alembic and git print nothing, and both runs are complete."""
    code = (
        "import pathlib, sys; from fbpc_ray.tracking import tracker, uri\n"
        "t = tracker.MlflowTracker(uri.default_uri(pathlib.Path(sys.argv[1])), 'x', run_name='r', params={'a': 1},\n"
        "                     finish_seconds=250)\n"
        "t.log_metrics({'a': 1}, 0); t.finish('FINISHED'); print('pending', t.pending)\n"
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("MLFLOW") and k not in mlflow_client.ENVIRONMENT
    }
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300) for process in both] == [("pending 0\n", "")] * 2


@pytest.mark.slow
def test_an_experiment_that_another_run_makes_meanwhile_is_shared(store: str, monkeypatch: pytest.MonkeyPatch):
    create = MlflowClient.create_experiment

    def late(*arguments, **options):
        create(*arguments, **options)
        return create(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "create_experiment", late)
    tracker = MlflowTracker(store, "made meanwhile", run_name="r", log=silent)
    assert tracker.wait(60)
    tracker.finish("FINISHED")
    assert tracker.run_id


def test_metric_points_are_stored_once(store: str):
    """What repeating a delivery rests on: MLflow keeps one of two points that agree in all, NaN and inf included."""
    tracker = MlflowTracker(store, "twice", run_name="r", log=silent)
    tracker.finish("FINISHED")
    client, run = MlflowClient(store), str(tracker.run_id)
    points = [Metric("a", value, 1000, 3) for value in (1.0, math.nan, math.inf)]
    for _ in range(2):
        client.log_batch(run, metrics=points)
    assert len(client.get_metric_history(run, "a")) == 3


def test_a_key_finds_its_run_again_and_repeats_no_point(store: str):
    """What a sweep's trials rely on: a process that was killed and its successor are one run."""
    for step, status in ((0, "KILLED"), (1, "FINISHED")):
        tracker = MlflowTracker(
            store, "keyed", run_name="trial", key="sweep/3", tags={"sweep": "it's", "sweep_id": "s"}, log=silent
        )
        tracker.log_metrics({"nll": 2.0}, 0)
        tracker.log_metrics({"nll": 1.0}, step)
        assert tracker.wait(300)
        tracker.finish(status)
    other = MlflowTracker(store, "keyed", run_name="trial", key="sweep/4", tags={"sweep_id": "s"}, log=silent)
    assert other.wait(300)
    result = mlflow_client.find_runs(store, "keyed", "sweep_id", "s")
    assert result.keys() == {"sweep/3", "sweep/4"}
    assert (result["sweep/3"].run_id, result["sweep/3"].running) == (tracker.run_id, False)
    assert result["sweep/4"].running
    other.finish("FINISHED")
    points = MlflowClient(store).get_metric_history(str(tracker.run_id), "nll")
    assert sorted((point.step, point.value) for point in points) == [(0, 1.0), (0, 2.0), (1, 1.0)]
    page = mlflow_uri.compare_url("http://host:1/", "7", ["a", "b"])
    runs = "runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%227%22%5D"
    assert page == f"http://host:1/#/compare-runs?{runs}&workflowType=machine_learning"
    assert mlflow_client.find_runs(store, "no such experiment", "sweep_id", "s") == {}
    assert mlflow_client.find_runs("http://127.0.0.1:9", "keyed", "sweep_id", "s") == {}
