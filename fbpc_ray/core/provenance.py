"""What made a result: versions, commit, and where files go by default."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fbpc_ray import __version__
from fbpc_ray.core.storage import local_folder

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")


def home() -> Path:
    """Where experts, outputs and mlflow.db go unless told otherwise: $FBPC_HOME, else the current folder; in a
    submitted Ray job, whose current folder is a temporary copy, ~/fbpc-ray."""
    if chosen := os.environ.get("FBPC_HOME"):
        return local_folder(chosen, "FBPC_HOME").absolute()
    return Path.home() / "fbpc-ray" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()


class Provenance(NamedTuple):
    """What made a result, as it was when the work began."""

    versions: dict[str, str]
    """Of Python, of this package and of what it stands on; packages that are not installed are left out."""
    commit: str
    """Of this code, '+changes' where files differ from it, 'unknown' outside a checkout."""
    device: str
    """In words."""


def capture(device: str) -> Provenance:
    """The provenance of work that begins now on `device`."""
    return Provenance(_versions(), _commit(), device)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fbpc-ray": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


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
