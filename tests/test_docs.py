"""README, docs/ and --help can be done: their commands, their Python and their examples run.

Commands run in this process, each page's in a folder of its own; support/docs.py says which flags make them small.
"""

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.docs import (
    PAGES,
    ROOT,
    commands,
    failures_of,
    fences,
    run,
    run_here,
    words_of,
)
from support.runs import train_experts

from fbpc_ray.commands import help
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import readers
from fbpc_ray.distillation import worker
from fbpc_ray.distillation.state import GradientTask, initial_state
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial
from fbpc_ray.models import registry

pytestmark = pytest.mark.usefixtures("offline")


SMALLER = {
    '"width": 16, "steps": 20': '"width": 8, "steps": 2, "expert_count": 1, "expert_epochs": 6, "map_max_steps": 40',
    'posterior(coreset, "convnet-ln")': 'posterior(coreset, "convnet-ln", chain_epochs=20, chain_every=10)',
}
"""The same for Python: what README's calls are given -> what they get here."""


@contextlib.contextmanager
def at(desk: Path, place: Path, lines: list[str]) -> Iterator[None]:
    """A copy of the desk, with the runs that the commands `lines` expect; what they register is undone."""
    shutil.copytree(desk / "my-images", place / "my-images")
    outputs = {word for entry in lines for word, flag in zip(words_of(entry)[1:], words_of(entry), strict=False)
            if flag == "--out" and "distill" in entry and "--resume" not in entry}  # fmt: skip
    for name in ("first", "second", "mine", "other"):
        if f"runs/{name}" not in outputs:
            shutil.copytree(desk / "runs" / "first", place / "runs" / name)
    shutil.copytree(desk / "experts", place / "experts")
    shutil.copytree(ROOT / "benchmarks" / "coresets", place / "benchmarks" / "coresets")
    registers: list[dict[str, Any]] = [worker.METHODS, readers.NAMED, registry.ARCHITECTURES]
    before, modules, paths = [dict(entry) for entry in registers], set(sys.modules), list(sys.path)
    try:
        with contextlib.chdir(place):
            yield
    finally:
        for register, entries in zip(registers, before, strict=True):
            register.clear()
            register.update(entries)
        sys.path[:] = paths
        for name in set(sys.modules) - modules:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(place):
                del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_the_python_of_a_page_run(page, desk, tmp_path):
    """Its commands and its Python, in order. Python that begins with `# NAME.py` is that file."""
    blocks = fences((ROOT / page).read_text())
    lines = [entry for language, text in blocks if language == "sh" for entry in commands(text)]
    names: dict[str, Any] = {"__name__": "page"}
    broken = []
    with at(desk, tmp_path, lines):
        for language, text in blocks:
            if language == "sh":
                for command in commands(text):
                    broken += failures_of(command, lambda command=command: run(command))
            elif language == "python" and (outcome := re.match(r"# (\w+\.py)\n", text)):
                Path(outcome[1]).write_text(text)
            elif language == "python":
                for setting, small in SMALLER.items():
                    text = text.replace(setting, small)
                broken += failures_of(text, lambda text=text: exec(compile(text, page, "exec"), names))
    assert not broken, "\n\n".join(broken)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *help.PAGES])
def test_the_examples_of_help_run(command, desk, tmp_path):
    lines = [example for example, _ in (help.PAGES[command].examples if command else help.FIRST)]
    with at(desk, tmp_path, lines):
        if command == "evaluate --coreset":
            run_here(["export", "runs/first", "--format", "hf", "--out", "my-coreset"])
        broken = [
            line
            for line_of_help in lines
            for line in failures_of(line_of_help, lambda line_of_help=line_of_help: run(line_of_help))
        ]
    assert not broken, "\n\n".join(broken)


def test_what_is_made_smaller_is_in_readme():
    text = (ROOT / "README.md").read_text()
    assert all(setting in text for setting in SMALLER)


def test_a_command_that_nobody_knows_is_an_error():
    """The lists above can fail: an unknown program, command or flag, and a file that isn't there."""
    for command in ("fbcp distill", "fbpc destil", "fbpc distill --stepps 3 --dry-run", "python jobs/tune_.py",
                    "python jobs/chaos.py --stepps 3", "ray start --heed", "make tset"):  # fmt: skip
        assert failures_of(command, lambda command=command: run(command)), command


def test_the_method_of_extending_learns(small, digits, tmp_path):
    """Its block as it stands, as a worker of a run would call it: its images are what the experts are surer of."""
    (block,) = [text for language, text in fences((ROOT / "docs/extending.md").read_text())
                if language == "python" and "worker.METHODS[" in text]  # fmt: skip
    before = dict(worker.METHODS)
    try:
        exec(compile(block, "extending", "exec"), {})
        settings = replace(small.distillation, method="confident")
        specs = session.network_specs(small, digits)
        stores = train_experts(small, digits, Serial("cpu", Interruption()))
        state, labels = initial_state(digits, 1, 0)
        gradients_of = Worker(specs, stores, digits, labels.numpy(), settings, "dsa", 2, device="cpu", threads=1)
        images, losses = state.images.clone(), []
        for _ in range(10):
            value, stats, *_ = gradients_of.gradient(GradientTask(0, 0), 0, images.numpy(), 0.0)
            again = gradients_of.gradient(GradientTask(0, 0), 0, images.numpy(), 0.0)
            assert (again[0] == value).all()
            losses.append(stats.loss)
            images = images - 0.1 * torch.from_numpy(value)
        assert losses[-1] < losses[0]
    finally:
        worker.METHODS.clear()
        worker.METHODS.update(before)
