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
from support.runs import SMALL, distil, flags, train_experts
from support.tiers import cpu_seconds, exceeded_limit, longest_files_first

from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import preset
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.datasets import Dataset, load
from fbpc_ray.execution.serial import Serial

for _name in ("FBPC_HOME", "FBPC_CACHE_GB", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):  # a user's own are not for tests
    os.environ.pop(_name, None)
atexit.register(shutil.rmtree, os.environ["FBPC_CACHE"], ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests that are left after -m and -k, so that parallel workers end at about the same time."""
    items[:] = longest_files_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fail a test of the quick tier that takes more CPU time than the tier allows."""
    before = cpu_seconds()
    result = yield
    message = exceeded_limit(cpu_seconds() - before, [marker.name for marker in item.iter_markers()])
    if message is not None:
        pytest.fail(message, pytrace=False)
    return result


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


@pytest.fixture(scope="session")
def finished_run(small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of 12 steps on the serial backend; a test that changes it makes a copy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    distil(*flags(small, backend="serial", steps=12, out=str(folder)))
    return folder


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of one's own, and a run on digits."""
    from support.docs import fill_desk  # costs the other tests nothing

    return fill_desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Files go to the current folder, and nothing is asked of the network."""
    monkeypatch.delenv("FBPC_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
