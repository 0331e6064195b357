"""Shared by the tests: the digits, and experts that are trained once a session."""

import atexit
import os
import shutil
import tempfile

os.environ["RAY_AUTH_MODE"] = "disabled"  # read as Ray is imported
os.environ["FBPC_CACHE"] = tempfile.mkdtemp(prefix="fbpc-cache-")

from pathlib import Path

import pytest
import torch

from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import preset
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.datasets import Dataset, load
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.run_directory import Run
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Backend, Serial

for _name in ("FBPC_HOME", "FBPC_CACHE_GB", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):  # a user's own are not for tests
    os.environ.pop(_name, None)
atexit.register(shutil.rmtree, os.environ["FBPC_CACHE"], ignore_errors=True)

SMALL = {
    "architectures": ("convnet-in", "convnet-bn"), "width": 8, "expert_count": 2, "expert_epochs": 3,
    "start_epoch": 1, "steps": 4, "gamma": 0.5, "map_lr": 0.02, "posterior_steps": 4, "real_batch_size": 32,
    "checkpoint_every": 2, "mc_samples": 5, "eval_seeds": 2, "chain_steps": 20, "chain_every": 10,
    "tracking": False, "threads": 1, "x_cache": 0.0,
}  # fmt: skip
"""Settings with which a run on digits takes seconds and leaves nothing out."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tests' tensors are small: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Config:
    """A small configuration whose experts are trained."""
    folder: Path = tmp_path_factory.mktemp("experts")
    config = preset("digits").updated(**SMALL, experts=str(folder))
    train_experts(config, digits, Serial("cpu", Interruption()))
    return config


def train_experts(config: Config, digits: Dataset, backend: Backend) -> list[ExpertStore]:
    """The stores of the configuration, filled."""
    specs = session.specs(config, digits)
    stores = [session.store(config, digits, spec) for spec in specs]
    count = config.experts.expert_count
    loop.train_experts(stores, specs, count, digits, backend, lambda line: None)
    return stores


def run_on(
    backend: Backend, config: Config, digits: Dataset, folder: Path, on_step=lambda values, step: None, state=None,
    rows=None,
):  # fmt: skip
    """Distil with `backend`: the images after the last step, and what each step and architecture reported of itself."""
    specs = session.specs(config, digits)
    stores = [session.store(config, digits, spec) for spec in specs]
    first, labels = loop.first_state(digits, config.distillation.ipc, config.distillation.seed)
    state, rows = state or first, rows or []
    backend.start_workers(session.crew(config, digits, labels, specs, stores))
    try:
        state = loop.distill(config, Run(folder), state, rows, backend, Interruption(), on_step, lambda state: None)
    finally:
        backend.stop_workers()
    return state.images, [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]


def flags(config: Config, **changes: object) -> list[str]:
    """The configuration as command-line flags."""
    words: list[str] = []
    for name, value in config.updated(**changes).flat().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        elif value != "":
            words += [flag, str(value)]
    return words
