"""Runs to report on."""

from pathlib import Path

import pytest
from support.runs import flags

from fbpc_ray.commands import main
from fbpc_ray.core.presets import with_method


@pytest.fixture(scope="session")
def ended_runs(small, tmp_path_factory) -> dict[str, Path]:
    """Runs that have ended: of FBPC, of a weight-space baseline, and random images."""
    root = tmp_path_factory.mktemp("runs")
    changes = {
        "fbpc": {}, "bpc": with_method(small, "bpc-fkl", 1).updated(steps=2, syn_steps=3, start_epoch=1).flat(),
        "random": {"method": "random", "ipc": 2},
    }  # fmt: skip
    for name, settings in changes.items():
        words = flags(small, **settings | {"backend": "serial", "device": "cpu", "out": str(root / name)})
        main.main(["distill", *words])
    return {name: root / name for name in changes}
