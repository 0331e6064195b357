"""Runs as the tests make them: small settings, in this process by a backend or by the command line, and in others."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fbpc_ray.commands import main, parsing
from fbpc_ray.commands.arguments import KINDS
from fbpc_ray.core.config import Config
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data import coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.execution import session

SMALL = {
    "architectures": ("convnet-in", "convnet-bn"), "width": 8, "expert_count": 2, "expert_epochs": 3,
    "start_epoch": 1, "steps": 4, "gamma": 0.5, "map_lr": 0.02, "posterior_steps": 4, "real_batch_size": 32,
    "checkpoint_every": 2, "mc_samples": 5, "num_chains": 2, "chain_epochs": 20, "chain_every": 10,
    "tracking": False, "threads": 1, "trajectory_cache_gb": 0.0,
}  # fmt: skip
"""Settings with which a run on digits takes seconds and leaves nothing out."""
SMALL_VBPC = {
    "method": "vbpc", "architectures": ("convnet-in", "convnet-bn"), "width": 8, "steps": 7, "real_batch_size": 32,
    "checkpoint_every": 3, "pool_size": 2, "pool_steps": 3, "image_lr": 0.05, "label_lr": 0.1, "ridge": 0.05,
    "prior_precision": 2.0, "kl_weight": 3.0, "threads": 1, "tracking": False,
}  # fmt: skip
"""The same for a method that learns soft labels by a pool of networks."""
BRIEF_CHAIN: dict[str, Any] = {"width": 8, "chain_epochs": 20, "chain_every": 10}
"""Network and chain of a posterior that is sampled in a second."""


def silent(line: str) -> None:
    """Log nothing."""


def train_experts(config: Config, dataset: Dataset, workers: TaskRunner) -> list[ExpertStore]:
    """Train the experts of the configuration; return their stores."""
    opened = session.open_session(config, lambda line: None, dataset)
    opened.train_experts(workers, lambda line: None)
    return opened.stores


def run_on(
    backend: Backend, config: Config, digits: Dataset, folder: Path, on_step=lambda values, step: None, state=None,
    rows=None,
):  # fmt: skip
    """Distil with `backend`; return the images after the last step and the rows of all steps, without seconds."""
    opened = session.open_session(config, lambda line: None, digits)
    state = state or opened.initial[0]
    checkpointer = loop.Checkpointer(RunDirectory(folder), state, rows or [], config.distillation)
    try:
        state = loop.follow(
            opened.steps(state, backend), checkpointer,
            [lambda step: on_step(step.metrics(), step.state.step)], Interruption(),
        )  # fmt: skip
    finally:
        backend.stop_workers()
    rows = checkpointer.rows
    return state.images, [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]


def flags(config: Config, **changes: object) -> list[str]:
    """The configuration as command-line flags."""
    return flags_of(config.updated(**changes).flat())


def flags_of(settings: Mapping[str, object]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        elif value != "":
            words += [flag, str(value)]
    return words


ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}


def distil(*words: str) -> None:
    main.main(["distill", *words])


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fbpc_ray", *words], env={**ENVIRONMENT, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def images_of(folder: Path) -> torch.Tensor:
    return coreset.load(RunDirectory(folder).coreset_path).images


def refused(capsys, *words: str, command: str = "distill", code: int = 2) -> str:
    with pytest.raises(SystemExit) as left:
        main.main([command, *words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == code
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not foreign_flags(lines[0], command, words), lines[0]
    return lines[0]


def foreign_flags(line: str, command: str, words: Sequence[str] = ()) -> set[str]:
    """Flags that an error names and the command lacks, but for those in `words` and of other commands."""
    given = {word.partition("=")[0] for word in words}
    kinds = KINDS.get(command, ())[-1 if "--coreset" in given else 0 :][:1]
    known = {name.replace("_", "-") for kind in kinds for name in parsing.flags_of(kind)} | {"help"}
    named = re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z0-9-]*)", re.sub("`[^`]*`|distil with [^;]*", "", line))
    return {f"--{name}" for name in named if kinds and name not in known} - given
