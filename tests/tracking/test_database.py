"""MLflow's database where its creation was killed: a later run is tracked, and one line says what happened."""

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from support.runs import flags, refused

from fbpc_ray.commands import doctor_places, main
from fbpc_ray.core.errors import UserError
from fbpc_ray.tracking import database, mlflow_client
from fbpc_ray.tracking.mlflow_client import MlflowClient, open_store
from fbpc_ray.tracking.tracker import MlflowTracker
from fbpc_ray.tracking.uri import sqlite_uri

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's
NEWEST = database.revisions()[1]
OLDER = "c48cb773bb87"


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without a run, as `open_store` creates it."""
    path = tmp_path_factory.mktemp("whole") / "mlflow.db"
    open_store(sqlite_uri(path), path)
    return path


@pytest.fixture
def path(new_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it. Databases that a test creates are copies, too: MLflow takes seconds."""
    monkeypatch.setattr(mlflow_client, "_create_database", lambda file: shutil.copy(new_database, file))
    monkeypatch.setattr(database.inspect_quiet, "__defaults__", (0.0,))
    return Path(shutil.copy(new_database, tmp_path))


def sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def overwrite_schema(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 3000)


def remove_tables(path: Path) -> None:
    path.unlink()
    sql(path, "PRAGMA user_version = 1")


RUN = (
    "INSERT INTO runs (run_uuid, status, lifecycle_stage, experiment_id) "
    "VALUES ('0', 'FINISHED', 'active', (SELECT min(experiment_id) FROM experiments))"
)
VERSION = "UPDATE alembic_version SET version_num = '{}'"
CASES = {
    "whole": (lambda path: None, "whole", ""),
    "absent": (Path.unlink, "missing", ""),
    "empty": (lambda path: os.truncate(path, 0), "missing", ""),
    "truncated": (truncate, "damaged", "its end is missing"),
    "header alone": (lambda path: os.truncate(path, 50), "damaged", "its end is missing"),
    "schema overwritten": (overwrite_schema, "damaged", "malformed"),
    "tableless": (remove_tables, "half-made", "it has no tables"),
    "before the first migration": (lambda path: sql(path, "DROP TABLE alembic_version"), "half-made", "before"),
    "no revision": (lambda path: sql(path, "DELETE FROM alembic_version"), "half-made", "before its first migration"),
    "half-migrated": (lambda path: sql(path, VERSION.format(OLDER)), "half-made", f"migration {OLDER} of {NEWEST}"),
    "older, with a run": (lambda path: sql(path, VERSION.format(OLDER), RUN), "other", f"{OLDER} of {NEWEST}"),
    "newer": (lambda path: sql(path, VERSION.format("ffff")), "other", "revision ffff, which is not one"),
    "text": (lambda path: path.write_text("no database " * 99), "foreign", "file is not a database"),
    "another program's": (
        lambda path: (path.unlink(), sql(path, "CREATE TABLE songs (a)")), "foreign", "it has no tables of MLflow",
    ),
}  # fmt: skip


def test_the_known_revisions_are_mlflows():
    from mlflow.store.db.utils import _get_latest_schema_revision

    assert _get_latest_schema_revision() == NEWEST
    assert OLDER in database.revisions()[0]


@pytest.mark.parametrize("case", CASES)
def test_the_state_of_a_file_and_what_is_done_about_it(path: Path, case: str):
    """What holds no run is moved aside, with its journal; what may hold runs is left as it is."""
    spoil, kind, reason = CASES[case]
    spoil(path)
    state = database.inspect(path)
    assert state.kind == kind and reason in state.reason, state
    lines: list[str] = []
    before = path.read_bytes() if path.exists() else b""
    if kind == "foreign":  # left to MLflow
        return
    if kind == "other":
        with pytest.raises(UserError, match="mlflow db upgrade"):
            open_store(sqlite_uri(path), path, lambda _, line: lines.append(line))
        assert path.read_bytes() == before and lines == []
        return
    Path(f"{path}-journal").write_bytes(b"")
    client = open_store(sqlite_uri(path), path, lambda _, line: lines.append(line))
    assert client.get_experiment_by_name("Default") is not None
    assert database.inspect(path).kind == "whole"
    aside = [entry for entry in path.parent.iterdir() if entry.name.startswith(f"mlflow.db.{kind}")]
    if kind in ("whole", "missing"):
        assert lines == aside == []
    else:
        assert len(lines) == 1 and f"moved to mlflow.db.{kind}-1" in lines[0] and "\n" not in lines[0]
        assert (path.parent / f"mlflow.db.{kind}-1").read_bytes() == before


def test_names_beside_are_never_overwritten(path: Path):
    for number in (1, 2):
        path.write_bytes(bytes([number]))
        Path(f"{path}-journal").write_text("journal")
        assert database.move_aside(path, "damaged").name == f"mlflow.db.damaged-{number}"
        assert (path.parent / f"mlflow.db.damaged-{number}-journal").exists()
    assert (path.parent / "mlflow.db.damaged-1").read_bytes() == b"\1"
    assert not list(path.parent.glob("mlflow.db-*"))


def test_a_database_that_another_process_creates_now_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch):
    sql(path, "DELETE FROM alembic_version")
    naps: list[float] = []

    def finish_creation(seconds: float) -> None:
        naps.append(seconds)
        sql(path, f"INSERT INTO alembic_version VALUES ('{NEWEST}')")

    monkeypatch.setattr(database.time, "sleep", finish_creation)
    assert database.inspect_quiet(path, 10.0).kind == "whole"
    assert len(naps) == 1


def test_a_run_on_a_half_made_database_is_tracked(path: Path):
    sql(path, VERSION.format(OLDER))
    lines: list[str] = []
    tracker = MlflowTracker(sqlite_uri(path), "fbpc", run_name="r", log=lines.append)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    assert tracker.in_store and tracker.pending == 0
    assert MlflowClient(sqlite_uri(path)).get_run(str(tracker.run_id)).data.metrics == {"loss": 1.0}
    assert len(lines) == 1 and "moved to mlflow.db.half-made-1" in lines[0]


def test_a_run_on_another_version_is_not_in_the_store_and_the_line_says_what_to_do(path: Path):
    sql(path, VERSION.format(OLDER), RUN)
    lines: list[str] = []
    tracker = MlflowTracker(sqlite_uri(path), "fbpc", run_name="r", log=lines.append, retry_seconds=0.05)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    assert not tracker.in_store
    assert f"mlflow db upgrade {sqlite_uri(path)}" in lines[0] and "not delivered" in lines[1] and len(lines) == 2


def test_doctor_and_ui_look_at_the_database(path: Path, capsys: pytest.CaptureFixture[str]):
    uri = sqlite_uri(path)
    assert doctor_places.store_finding(path, uri) == ("ok", f"mlflow.db: {path} is whole", "")
    sql(path, VERSION.format(OLDER), RUN)
    finding = doctor_places.store_finding(path, uri)
    assert finding.state == "note" and finding.fix == f"copy it, then mlflow db upgrade {uri}"
    assert "mlflow db upgrade" in refused(capsys, "--tracking-uri", uri, command="ui", code=1)
    sql(path, "DELETE FROM runs")
    finding = doctor_places.store_finding(path, uri)
    assert finding.state == "note" and "is half-made" in finding.message and "the next run" in finding.fix
    assert "moved to mlflow.db.half-made-1" in refused(capsys, "--tracking-uri", uri, command="ui", code=1)
    assert doctor_places.store_finding(path, uri) == ("ok", f"mlflow.db: the first run creates {path}", "")
    path.write_text("text " * 99)
    assert doctor_places.store_finding(path, uri).state == "note"


@pytest.mark.slow
def test_the_end_of_a_run_names_the_ui_only_where_the_run_is(path: Path, small, capsys, monkeypatch):
    monkeypatch.setenv("FBPC_HOME", str(path.parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = flags(small, backend="serial", method="random", architectures=("convnet-bn",), num_chains=1, tracking=True)
    for number, (statement, arrives) in enumerate((("SELECT 1", True), (RUN, True), (VERSION.format(OLDER), False))):
        sql(path, statement)
        main.main(["distill", *words, "--out", str(path.parent / f"run{number}")])
        output = capsys.readouterr().out
        assert ("fbpc ui" in output) == arrives, output


def create_ours(path: Path) -> None:
    open_store(sqlite_uri(path), path)


def create_by_mlflow(path: Path) -> None:
    MlflowClient(sqlite_uri(path))


@pytest.mark.slow
@pytest.mark.parametrize("create", [create_ours, create_by_mlflow])
def test_a_creation_killed_at_any_moment_ends_no_tracking(create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGKILL as the file reaches a size. Ours leaves no database or the whole one; MLflow's own is put right.

    Nobody else creates the file: it need not be quiet for seconds before it is moved aside.
    """
    monkeypatch.setattr(database.inspect_quiet, "__defaults__", (0.0,))
    draw = random.Random(0)
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, size = folder / "mlflow.db", draw.randrange(1, 700_000)
        child = multiprocessing.get_context("fork").Process(target=create, args=(path,))
        child.start()
        while child.is_alive() and sum(_size(entry) for entry in folder.glob("*mlflow.db*")) < size:
            time.sleep(0.001)
        os.kill(int(child.pid or 0), signal.SIGKILL)
        child.join()
        if create is create_ours:
            assert database.inspect(path).kind in ("missing", "whole")
        tracker = MlflowTracker(sqlite_uri(path), "fbpc", run_name="r", log=lambda line: None, finish_seconds=300)
        tracker.finish("FINISHED")
        assert tracker.in_store and tracker.pending == 0
        assert not list(folder.glob(".mlflow.db.*"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
