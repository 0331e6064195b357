"""A run of the command line, its coreset, and posterior samples on it."""

from pathlib import Path

import pytest
from support.runs import BRIEF_CHAIN, flags

from fbpc_ray import api
from fbpc_ray.commands import main
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory


@pytest.fixture(scope="session")
def run(small, tmp_path_factory) -> RunDirectory[Path]:
    """What the command line makes."""
    folder = tmp_path_factory.mktemp("runs") / "cli"
    main.main(["distill", *flags(small, backend="serial", steps=2, out=str(folder))])
    return RunDirectory(folder)


@pytest.fixture(scope="session")
def pseudocoreset(run) -> coreset.Coreset:
    return coreset.load(run.coreset_path)


@pytest.fixture(scope="session")
def samples(pseudocoreset) -> api.Ensemble:
    """Of a network with BatchNorm, chain 1 of the run's two."""
    return api.posterior(pseudocoreset, "convnet-bn", seed=1, **BRIEF_CHAIN)
