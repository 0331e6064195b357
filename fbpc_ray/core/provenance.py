"""Record versions, commit and device of a result, and choose the default folders of files."""

import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from fbpc_ray import __version__
from fbpc_ray.core.storage import local_folder

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")


def home() -> Path:
    """Return the default folder of experts, outputs and mlflow.db: $FBPC_HOME, else the current folder.

    In a submitted Ray job, whose current folder is a temporary copy, it is ~/fbpc-ray.
    """
    if chosen := os.environ.get("FBPC_HOME"):
        return local_folder(chosen, "FBPC_HOME").absolute()
    return Path.home() / "fbpc-ray" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()


def without_folders(data: str) -> str:
    """Return the name of a data set without the folders of this machine: folder:/a/pets -> folder:pets."""
    kind, colon, path = data.partition(":")
    name = Path(path).name
    return f"{kind}:{Path(path).resolve().name if name in ('', '..') else name}" if colon else data


def new_output(what: str, data: str, ipc: int) -> Path:
    """Return the folder of a run that names none: outputs/TIME-WHAT-DATA-ipcN, ending in -2, -3 ... if that exists.

    Args:
        what: method or command.
        data: as --data names it.
    """
    data = without_folders(data).rpartition(":")[2]
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{what}-{data}-ipc{ipc}"
    folders = (home() / "outputs" / f"{name}{suffix}" for suffix in chain([""], (f"-{n}" for n in count(2))))
    return next(folder for folder in folders if not folder.exists())


class Provenance(NamedTuple):
    """Versions, commit and device at the start of the work."""

    versions: dict[str, str]
    """By package: python, fbpc-ray and the installed ones of `PACKAGES`."""
    commit: str
    """Git commit of this code; with '+changes' if files differ from it; 'unknown' outside a checkout."""
    device: str
    """Description of the device."""


def capture(device: str) -> Provenance:
    """Record the provenance of work that starts now on `device`."""
    return Provenance(_versions(), _commit(), device)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "fbpc-ray": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        head, status = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.strip() + ("+changes" if status.strip() else "")
