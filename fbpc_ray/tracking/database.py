"""State of MLflow's SQLite database, read without MLflow and SQLAlchemy.

MLflow creates a database in some seventy migrations. A process that is killed among them leaves a database that MLflow
refuses for good.
"""

import re
import shlex
import sqlite3
import time
from contextlib import closing
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from fbpc_ray.core.addresses import redacted

QUIET_SECONDS = 10.0
"""Seconds without a write after which no process is still creating a half-made database."""
SIDECARS = ("-journal", "-wal", "-shm")
"""Suffixes of SQLite's files beside a database."""
HEADER = b"SQLite format 3\0"


class DatabaseState(NamedTuple):
    """State of a database file."""

    kind: Literal["missing", "whole", "half-made", "damaged", "other", "foreign"]
    """missing: no file, or an empty one. half-made: its creation was interrupted, and it holds no run. other: of
    another version of MLflow, or interrupted while it was migrated. foreign: no database of MLflow."""
    reason: str = ""

    @property
    def is_useless(self) -> bool:
        """Return whether the file must be moved before MLflow can create a database."""
        return self.kind in ("half-made", "damaged")


def inspect(path: Path) -> DatabaseState:
    """Read the state of a database. Raises OSError where the file can't be read."""
    if not path.exists() or not path.stat().st_size:
        return DatabaseState("missing")
    with path.open("rb") as file:
        header = file.read(100)
    if not header.startswith(HEADER):
        return DatabaseState("foreign", "file is not a database")
    if _is_truncated(path, header):
        return DatabaseState("damaged", "its end is missing")
    try:
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            return _inspect_tables(connection)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return DatabaseState("damaged", str(error))
        return DatabaseState("whole", str(error))  # locked or not readable: MLflow's error says more


def inspect_quiet(path: Path, quiet_seconds: float = QUIET_SECONDS) -> DatabaseState:
    """Read the state of a database; wait while another process may still be creating it."""
    end = time.monotonic() + 60 * quiet_seconds  # a file of the future is never quiet
    while True:
        state = inspect(path)
        may_grow = state.kind == "half-made" or (state.kind == "missing" and path.exists())
        if not may_grow or _seconds_since_write(path) > quiet_seconds or time.monotonic() > end:
            return state
        time.sleep(min(0.5, quiet_seconds))


def move_aside(path: Path, kind: str) -> Path:
    """Rename a database and SQLite's files beside it; return its new path, `path`.`kind`-1 or the next that is free."""
    number = 1
    while (target := path.with_name(f"{path.name}.{kind}-{number}")).exists():
        number += 1
    for suffix in (*SIDECARS, ""):
        source = Path(f"{path}{suffix}")
        if source.exists():  # a journal that stays would be applied to the next database of this name
            source.rename(f"{target}{suffix}")
    return target


def moved_line(file: Path, state: DatabaseState) -> str:
    """Move a useless database aside; return the line that says so."""
    target = move_aside(file, state.kind)
    what = "the run that created it was killed, and it holds no run" if state.kind == "half-made" else state.reason
    return f"MLflow: {file} is {state.kind} ({what}); moved to {target.name}"


def upgrade_command(uri: str) -> str:
    """Return how to bring a database to the installed version of MLflow."""
    return f"copy it, then mlflow db upgrade {shlex.quote(redacted(uri))}"


@cache
def revisions() -> tuple[frozenset[str], str]:
    """Return the revisions that the installed MLflow knows and the newest of them; nothing where MLflow is missing."""
    spec = find_spec("mlflow")
    if spec is None or not spec.submodule_search_locations:
        return frozenset(), ""
    folder = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations" / "versions"
    older: dict[str, str] = {}
    for path in folder.glob("*.py"):
        matches = dict(re.findall(r"^(revision|down_revision)\s*=\s*[\"']?(\w+)", path.read_text(), re.MULTILINE))
        older[matches.get("revision", "")] = matches.get("down_revision", "")
    newest = older.keys() - set(older.values()) - {""}
    return frozenset(older), newest.pop() if len(newest) == 1 else ""


def _inspect_tables(connection: sqlite3.Connection) -> DatabaseState:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return DatabaseState("half-made", "it has no tables")
    if not tables & {"experiments", "alembic_version"}:
        return DatabaseState("foreign", "it has no tables of MLflow")
    versions = connection.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else []
    revision = next((version for (version,) in versions), "")
    known, newest = revisions()
    holds_runs = _count(connection, tables, "runs") > 0 or _count(connection, tables, "experiments") > 1
    if revision and revision == newest and {"experiments", "runs"} <= tables:
        return DatabaseState("whole")
    if revision and (not newest or revision not in known):
        return DatabaseState("other", f"revision {revision}, which is not one of this MLflow")
    place = f"migration {revision} of {newest}" if revision else "before its first migration"
    if holds_runs:
        return DatabaseState("other", place)
    return DatabaseState("half-made", place)


def _count(connection: sqlite3.Connection, tables: set[str], name: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] if name in tables else 0


def _is_truncated(path: Path, header: bytes) -> bool:
    """Tell whether the file is shorter than its header says; a write-ahead log may hold the rest."""
    if len(header) < 100:
        return True
    page, pages = int.from_bytes(header[16:18], "big"), int.from_bytes(header[28:32], "big")
    is_valid = header[24:28] == header[92:96]  # else the number of pages is of an earlier change
    has_log = Path(f"{path}-wal").exists()
    return is_valid and not has_log and path.stat().st_size < pages * (65536 if page == 1 else page)


def _seconds_since_write(path: Path) -> float:
    times = [Path(f"{path}{suffix}").stat().st_mtime for suffix in ("", *SIDECARS) if Path(f"{path}{suffix}").exists()]
    return time.time() - max(times, default=0.0)
