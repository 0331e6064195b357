"""URIs of MLflow's store and of its pages, without importing MLflow, which takes 3 s."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.provenance import home

SQLITE = "sqlite:///"
TRAINING = "workflowType=machine_learning"
"""What makes MLflow show the pages of trained models, not those of language models, which it begins with."""
VIEW = "fbpc"
"""Key of the shared view of an experiment's runs, whose columns are test scores, method, data and images per class."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Tag of an experiment that holds the view."""
PORT = 5000
"""Where `fbpc ui` shows a local store, unless that is taken."""


def default_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the SQLite database of the folder `root`; always absolute."""
    return absolute(os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(root.absolute() / "mlflow.db"))


def sqlite_uri(path: Path) -> str:
    """Return the address of a SQLite file; SQLAlchemy decodes it."""
    return SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def absolute(uri: str) -> str:
    """Make a relative SQLite path absolute; leave any other URI unchanged."""
    path = uri.removeprefix(SQLITE)
    return f"{SQLITE}{Path(path).absolute()}" if uri.startswith(SQLITE) and path else uri


def database(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for any other."""
    return Path(unquote(urlsplit(uri).path[1:])) if uri.startswith(SQLITE) else None


def artifact_folder(uri: str) -> Path | None:
    """Return where the artifacts of a database's new experiment go; None for a server, which chooses itself.

    MLflow's own choice is relative to the current folder, which in a submitted Ray job is a temporary copy.
    """
    if file := database(uri):
        return file.parent / "mlartifacts"
    return home() / "mlartifacts" if re.match(r"(postgresql|mysql|mssql)(\+\w+)?://", uri) else None


def remote(uri: str) -> bool:
    """Tell whether the store is a server, which shows its own pages."""
    return uri.startswith(("http://", "https://"))


def server(uri: str) -> str:
    """Return the address of the pages, without secrets: the server, or where `fbpc ui` will show a local store."""
    return redacted(uri).rstrip("/") if remote(uri) else f"http://127.0.0.1:{PORT}"


def list_url(uri: str, experiment_id: str, has_view: bool = False) -> str:
    """Return the page of an experiment's runs; with the columns of `VIEW_TAG` if the experiment has them."""
    view = f"&viewStateShareKey={VIEW}" if has_view else ""
    return f"{server(uri)}/#/experiments/{experiment_id}/runs?{TRAINING}{view}"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the page of a run."""
    return f"{server(uri)}/#/experiments/{experiment_id}/runs/{run_id}?{TRAINING}"


def compare_url(uri: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the page that compares runs of one experiment."""
    runs, experiments = (quote(json.dumps(list(ids), separators=(",", ":"))) for ids in (run_ids, [experiment_id]))
    return f"{server(uri)}/#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}"


def ui_command(uri: str) -> str:
    """Return how to see `uri`: the address of a server, or the shell command that shows a local store.

    The command leaves out an address with a password, which `fbpc ui` reads from MLFLOW_TRACKING_URI.
    """
    if remote(uri):
        return redacted(uri)
    if redacted(uri) != uri:
        return f"{_program('fbpc')} ui"
    return f"{_program('fbpc')} ui --tracking-uri {shlex.quote(absolute(uri))}"


def serve_command(folder: Path) -> str:
    """Return the shell command that serves the model in `folder` at 127.0.0.1:5001, to this machine alone."""
    # MLflow looks for uvicorn by its name alone.
    path = (
        "" if _program("mlflow") == "mlflow" else f'env PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH" '
    )
    return f"{path}mlflow models serve -m {shlex.quote(str(folder))} --env-manager local --host 127.0.0.1 --port 5001"


def _program(name: str) -> str:
    """Return this environment's command; by its bare name only if the shell finds the same one."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(beside) or not beside.exists() else shlex.quote(str(beside))
