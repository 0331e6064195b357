"""Names of the protocols of SGHMC evaluations (--protocol).

paper: the defaults of core/settings.py, fitted to the paper's Random rows by jobs/calibrate_sghmc.py.
calibrated: see calibration.py.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fbpc_ray.core.config import Evaluation

PAPER, CALIBRATED = "paper", "calibrated"


def chain_settings(settings: Evaluation) -> dict[str, Any]:
    """Return the settings of chains, by their flags."""
    return {name: value for name, value in asdict(settings).items() if name.startswith("chain_")}


def name_of(settings: Evaluation) -> str:
    """Return the name of the protocol of `settings`: `paper`, with the flags that differ from it; "" without chains."""
    if settings.inference != "sghmc":
        return ""
    usual = chain_settings(Evaluation())
    changed = [flag_of(name, value) for name, value in chain_settings(settings).items() if value != usual[name]]
    return f"{PAPER}, changed: {' '.join(changed)}" if changed else PAPER


def flag_of(name: str, value: Any) -> str:
    """Return a setting as words of the command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {' '.join(value) if isinstance(value, list) else value}"


def of_result(result: Mapping[str, Any], settings: Evaluation | None = None) -> str:
    """Return the protocol that result.json names; of a result of earlier code that of `settings`, or ""."""
    return str(result.get("protocol", name_of(settings) if settings else ""))
