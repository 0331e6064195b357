"""What made a result: versions, commit, and where files go by default."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from fbpc_ray import __version__

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")


def home() -> Path:
    """Where experts, outputs and mlflow.db go unless told otherwise: $FBPC_HOME, else the current folder; in a
    submitted Ray job, whose current folder is a temporary copy, ~/fbpc-ray."""
    if chosen := os.environ.get("FBPC_HOME"):
        return Path(chosen).expanduser().absolute()
    return Path.home() / "fbpc-ray" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it stands on; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "fbpc-ray": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of this code, '+changes' where files differ from it, or 'unknown' outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head, status = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.strip() + ("+changes" if status.strip() else "")
