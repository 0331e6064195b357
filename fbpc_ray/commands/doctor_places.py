"""Checks of `fbpc doctor`: folders and their space, the cache, MLflow's database, the token."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from fbpc_ray.core import cache, files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import home
from fbpc_ray.tracking.database import inspect, upgrade_command
from fbpc_ray.tracking.uri import database, default_uri

LOW_SPACE, NO_SPACE = 5e9, 2e8
"""Free bytes of a disk below which doctor prints a note, and below which a run fails."""


class Finding(NamedTuple):
    """The result of one check."""

    state: Literal["ok", "note", "fix"]
    """note: works, but slower or not in every case; fix: something that a run needs doesn't work."""
    message: str
    fix: str = ""
    """What to do."""

    def __str__(self) -> str:
        text = f"{self.message}: {self.fix}" if self.fix else self.message
        return f"{self.state:<6}{' '.join(text.split())}"


def folders() -> Iterator[Finding]:
    """Check that each folder of a run is writable and has space: home, runs, cache, temporary files."""
    writable = "set {} to a writable folder"
    try:
        yield folder_finding("HOME", Path.home(), "note", writable.format("HOME"))
    except RuntimeError:
        yield Finding("note", "HOME: this user has none", writable.format("HOME"))
    runs = "experts, runs and mlflow.db"
    try:
        yield folder_finding(runs, home(), "fix", writable.format("FBPC_HOME"))
    except (UserError, RuntimeError, OSError) as error:
        yield Finding("fix", f"{runs}: {error}", "set FBPC_HOME to a local folder")
    yield cache_finding()
    yield temporary_finding()


def folder_finding(name: str, path: Path, state: Literal["note", "fix"], fix: str) -> Finding:
    """Check that a file can be made in `path`, or in its nearest parent that exists, and the space on its disk."""
    try:
        existing = files.nearest_existing(path)
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".fbpc-doctor-"):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        reason = getattr(error, "strerror", None) or "not found"
        return Finding(state, f"{name}: {path} is not writable ({reason.lower()})", fix)
    message = f"{name}: {path}, {free / 1e9:.1f} GB free"
    if free < NO_SPACE:
        return Finding(state, message, f"free some space, or {fix}")
    if free < LOW_SPACE:
        return Finding("note", message, "a hundred experts take gigabytes: free some space")
    return Finding("ok", message)


def cache_finding() -> Finding:
    """Check the cache of experts and of compiled passes."""
    fix = "set FBPC_CACHE to a writable folder"
    try:
        path = cache.folder()
    except RuntimeError:
        return Finding("note", "cache: this user has no home", fix)
    if limit := os.environ.get("FBPC_CACHE_GB"):
        try:
            float(limit)
        except ValueError:
            return Finding("fix", f"FBPC_CACHE_GB is {limit!r}", "set it to a number of gigabytes, or unset it")
    finding = folder_finding("cache", path, "note", fix)
    if finding.state == "ok" and (shared := cache.open_to_others(path / "compiled")):
        message = f"cache: others can write to {shared}, so no compiled pass is loaded from it"
        return Finding("note", message, f"chmod go-w {shared}, or set FBPC_CACHE to a folder of your own")
    return finding


def temporary_finding() -> Finding:
    """Check the folder of Ray's sessions; Ray spills no object to a disk that is over 95 % full."""
    path = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    finding = folder_finding("temporary files", path, "fix", "set TMPDIR (RAY_TMPDIR for Ray) to another disk")
    if finding.state != "fix":
        usage = shutil.disk_usage(files.nearest_existing(path))
        if usage.free < 0.05 * usage.total:
            fix = "Ray spills no objects to it: free some space, or set RAY_TMPDIR to another disk"
            return Finding("note", f"temporary files: the disk of {path} is over 95 % full", fix)
    return finding


def store() -> Iterator[Finding]:
    """Check the database that runs are logged to."""
    with suppress(UserError, RuntimeError, OSError):  # of the home, which `folders` checks
        uri = default_uri(home())
        if file := database(uri):
            yield store_finding(file, uri)


def store_finding(file: Path, uri: str) -> Finding:
    """Check MLflow's database: a half-made one ends tracking with MLflow's own errors."""
    try:
        state = inspect(file)
    except OSError as error:
        return Finding("note", f"mlflow.db: {file} is not readable ({error})", "runs go on, untracked")
    message = f"mlflow.db: {file} is {state.kind}{f' ({state.reason})' if state.reason else ''}"
    match state.kind:
        case "missing":
            return Finding("ok", f"mlflow.db: the first run creates {file}")
        case "whole":
            return Finding("ok", message)
        case "half-made" | "damaged":
            return Finding("note", message, "the next run moves it aside and creates a new one")
        case "other":
            return Finding(
                "note",
                f"mlflow.db: {file} was written by another version of MLflow ({state.reason})",
                upgrade_command(uri),
            )
        case "foreign":
            return Finding("note", f"mlflow.db: {file} is not a store of MLflow ({state.reason})", "move it")


def token() -> Iterator[Finding]:
    yield token_finding(os.environ)


def token_finding(environment: Mapping[str, str]) -> Finding:
    """Check how Ray authenticates, without printing the token."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    generate = "ray get-auth-token --generate"
    try:
        file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        in_file = bool(file.is_file() and file.read_text().strip())
    except (OSError, RuntimeError, ValueError) as error:
        return Finding("note", f"Ray's token is not readable ({error})", "fix the permissions of its file")
    in_environment = bool(environment.get("RAY_AUTH_TOKEN"))
    exists = in_environment or in_file
    if mode not in ("", "token", "disabled"):
        return Finding("fix", f"RAY_AUTH_MODE is {mode!r}", "set it to token, or to disabled on a machine of your own")
    if mode == "token" and not exists:
        return Finding("fix", f"RAY_AUTH_MODE is token, but RAY_AUTH_TOKEN and {file} hold none", generate)
    if in_file and not in_environment and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding("note", f"Ray's token: others can read {file}", f"chmod 600 {file}")
    if mode == "disabled":
        return Finding(
            "note", "RAY_AUTH_MODE is disabled: anyone who reaches the cluster can use it", "set it to token"
        )
    if mode:
        return Finding("ok", "RAY_AUTH_MODE is token, and a token exists")
    if exists:
        fix = "commands here use it; for `ray start` and `ray job submit` export RAY_AUTH_MODE=token in each shell"
        return Finding("note", "Ray's token exists, RAY_AUTH_MODE is not set", fix)
    fix = f"before `ray start` export RAY_AUTH_MODE=token, then {generate}; fbpc alone needs neither"
    return Finding("note", "RAY_AUTH_MODE is not set, and no token exists", fix)
