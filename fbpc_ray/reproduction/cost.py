"""Measure peak memory and seconds of one step of a method (Tables 7-9), in a separate process.

`python -m fbpc_ray.reproduction.cost` reads {"config": ..., "device": ..., "steps": ...} on standard input and writes
{"peak_gb", "seconds": [...], "parameters"} on standard output. The experts are one untrained trajectory: neither memory
nor time depends on the values of an expert's weights. A first step, which warms up, is not timed. The peak is that of
CUDA's allocator, or on a CPU the growth of the process above its size between two steps (data, network, libraries).
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fbpc_ray.core import config as configs
from fbpc_ray.core import files
from fbpc_ray.core.allocator import give_back_freed_memory
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.distillation.state import gradient_tasks
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution.session import open_session
from fbpc_ray.models.functional import Network


class CpuClock:
    """CPU seconds of this process, and of earlier processes that worked on the same run, from its file."""

    def __init__(self, path: Path):
        self.path, self._start = path, time.process_time()
        try:
            self._before = float(path.read_text())
        except (OSError, ValueError):  # none, or damaged: only this process counts
            self._before = 0.0

    def seconds(self) -> float:
        """Return the CPU seconds up to now."""
        return self._before + time.process_time() - self._start

    def save(self) -> None:
        """Write the seconds for a process that resumes the run."""
        files.write_text(self.path, f"{self.seconds()}\n")


class Cost(NamedTuple):
    """Cost of a step."""

    peak_gb: float
    """1e9 bytes."""
    seconds: list[float]
    """Of each timed step."""
    parameters: int
    """Sum over all networks."""


def measure(config: Config, device: str, steps: int) -> Cost:
    """Measure `steps` steps in a new process; a step computes all architectures, one after the other."""
    job = json.dumps({"config": config.flat(), "device": device, "steps": steps})
    program = [sys.executable, "-m", "fbpc_ray.reproduction.cost"]
    process = subprocess.run(program, input=job, capture_output=True, text=True)
    if process.returncode < 0:
        raise UserError(
            f"the measurement failed: signal {-process.returncode} ended its process, as it does when memory runs out; "
            "free memory, then run the same command again",
            code=1,
        )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise UserError(f"the measurement failed: {lines[-1].removeprefix('error: ')}")
    return Cost(**json.loads(process.stdout.splitlines()[-1]))


def _measure(config: Config, device: str, steps: int) -> Cost:
    epochs = 3  # enough for every method to start at 0
    rule = {"start_epoch": 1, "start_rule": "before"}
    with tempfile.TemporaryDirectory() as folder:
        config = config.updated(expert_count=1, expert_epochs=epochs, experts=folder, trajectory_cache_gb=0.0, **rule)
        session = open_session(config, lambda line: None)
        networks = [Network(spec) for spec in session.specs]
        for store, network in zip(session.stores, networks, strict=True):
            store.write(0, (network.module(generator(0, "cost", epoch)).state_dict() for epoch in range(epochs + 1)))
        state, _ = session.initial
        worker = Worker(**session.worker_group().worker._asdict(), device=device)

        def take(step: int) -> None:
            for task in gradient_tasks(len(networks), 1):
                worker.gradient(task, step, state.images.numpy(), state.inner_lr)

        take(0)  # warms up libraries and caches
        before = _reset(device)
        seconds = []
        for step in range(1, steps + 1):
            start = time.perf_counter()
            take(step)
            seconds.append(time.perf_counter() - start)
        return Cost((_peak(device) - before) / 1e9, seconds, sum(network.parameter_count for network in networks))


def _reset(device: str) -> int:
    """Reset the peak; return the bytes in use."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _status(name: str) -> int:
    """Read a line of /proc/self/status, given in kB, as bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measure the job on standard input; print the cost."""
    job: dict[str, Any] = json.load(sys.stdin)
    try:
        cost = _measure(configs.Config().updated(**job["config"]), job["device"], job["steps"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    print(json.dumps(cost._asdict()))


if __name__ == "__main__":
    main()
