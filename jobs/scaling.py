"""Measure the overhead and the scaling of Ray: steps in one process, on one worker and on two, in turn.

    python jobs/scaling.py --json benchmarks/results/scaling.json

Runs each way of --ways for --steps steps from the same first images, --repeats times in turn, one thread per gradient,
checks that all give the same bits, and prints seconds per step (medians) with two ratios, medians over repeats:
one worker / serial - 1 is the overhead of Ray, one worker / two workers the scaling.

    python jobs/scaling.py --actors 1 8 16 32 64 --json benchmarks/results/scaling-actors.json

measures the driver instead, with trivial actors on --nodes simulated nodes: see jobs/scaling_actors.py.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of its own, on loopback; read as Ray is imported

import torch

sys.path.insert(0, str(Path(__file__).parent))  # where runpy runs this file

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.core.provenance import capture
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import loop
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial, device_name
from fbpc_ray.execution.worker_group import worker_group

ARCHITECTURES = ("convnet-in", "convnet-gn", "convnet-ln", "convnet-bn")


@dataclass(frozen=True)
class Arguments:
    """Serial, one Ray worker, two Ray workers: seconds per step of four architectures."""

    data: str = "digits"
    """Data set, as `fbpc distill --data`."""
    width: int = 32
    """Width of the ConvNets."""
    ipc: int = 1
    """Images per class."""
    posterior_steps: int = 30
    """K [paper: 30]."""
    steps: int = 10
    """Steps in one measurement."""
    repeats: int = 5
    """Measurements of each way."""
    actors: tuple[int, ...] = ()
    """Measure the driver with these numbers of trivial actors instead; empty: steps as above."""
    processes: int = 64
    """--actors: most processes; more actors share them, as the driver sees it no differently."""
    nodes: int = 4
    """--actors: simulated nodes of the cluster."""
    units: int = 512
    """--actors: least gradients in a repeat."""
    json: str = ""
    """File that gets the measurements, too."""


def scaling(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/scaling.py", about=__doc__)
    if args.actors:
        measure_driver(args)
        return
    with tempfile.TemporaryDirectory(prefix="fr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        report = measure(args, Path(folder))
    s = report["seconds_a_step"]
    counts = f"{args.steps} steps of {len(ARCHITECTURES)} architectures, {args.repeats} repeats"
    print(f"\n{counts}, one thread per gradient")
    for way, values in s.items():
        print(f"{way:12} {values['median']:.3f} s per step  ({min(values['all']):.3f} to {max(values['all']):.3f})")
    print(f"overhead of Ray: {report['overhead']['median']:+.1%}  ({_range(report['overhead'], '+.1%')})")
    print(f"one worker / two: {report['scaling']['median']:.2f}  ({_range(report['scaling'], '.2f')})")
    if args.json:
        files.write_text(Path(args.json).absolute(), json.dumps(report, indent=2) + "\n")


def measure_driver(args: Arguments) -> None:
    """Measure the driver's cost of a gradient task for each number of actors; print and write it."""
    if min(args.actors) < 1 or not 1 <= args.nodes <= max(args.actors):
        raise UserError(f"--actors {' '.join(map(str, args.actors))}: must be 1 or more, the largest at least --nodes")
    import scaling_actors

    numbers = tuple(sorted(args.actors))
    with tempfile.TemporaryDirectory(prefix="fr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        rows = scaling_actors.measure(numbers, args.processes, args.nodes, args.units, args.repeats, folder)
    report = {
        "rows": rows,
        "most / fewest actors": {
            name: each[-1]["cpu_seconds_a_unit"]["median"] / each[0]["cpu_seconds_a_unit"]["median"]
            for name, each in rows.items()
        },
        "command": " ".join(["python", *sys.argv]), "settings": vars(args) | {"json": Path(args.json).name},
        **capture(device_name("cpu"))._asdict(),
    }  # fmt: skip
    for name, ratio in report["most / fewest actors"].items():
        print(f"images of {name}: a task with {numbers[-1]} actors costs {ratio:.2f} times one with {numbers[0]}")
    if args.json:
        files.write_text(Path(args.json).absolute(), json.dumps(report, indent=2) + "\n")


def measure(args: Arguments, folder: Path) -> dict[str, Any]:
    """Return the seconds of every way and repeat, and their ratios."""
    from fbpc_ray.execution.ray.ray_backend import RayBackend

    config = preset("digits").updated(
        data=args.data, architectures=ARCHITECTURES, width=args.width, ipc=args.ipc, experts=str(folder / "experts"),
        expert_count=1, expert_epochs=2, start_epoch=1, posterior_steps=args.posterior_steps, threads=1, prefetch=0,
        batch_size=500, device="cpu", address="local", trajectory_cache_gb=0.0, compiled="off",
    )  # fmt: skip
    dataset = session.load_data(config, print)
    serial = Serial("cpu", Interruption())
    session.open_session(config, print, dataset).train_experts(serial, print)
    two = RayBackend(config.workers, Interruption(), num_cpus=2, include_dashboard=False, _temp_dir=str(folder / "r"))
    one = RayBackend(config.updated(cpus_per_actor=2.0).workers, Interruption())  # on the same cluster
    ways: dict[str, Backend] = {"serial": serial, "one worker": one, "two workers": two}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    try:
        images = [torch.empty(0)]
        for repeat in range(args.repeats):
            for way, backend in ways.items():
                ended, took = run(config, dataset, backend, args.steps)
                seconds[way].append(took)
                images.append(ended)
                print(f"repeat {repeat + 1}, {way}: {took:.3f} s per step", flush=True)
        if not all(torch.equal(result, images[1]) for result in images[1:]):
            raise UserError("the ways differ in their bits: this is a bug", code=1)
        provenance = capture(two.describe())
    finally:
        two.close()
    return {
        "seconds_a_step": {way: _summary(values) for way, values in seconds.items()},
        "overhead": _summary([r / s - 1 for r, s in zip(seconds["one worker"], seconds["serial"], strict=True)]),
        "scaling": _summary([r / s for r, s in zip(seconds["one worker"], seconds["two workers"], strict=True)]),
        "command": " ".join(["python", *sys.argv]),
        "settings": vars(args),
        "architectures": ARCHITECTURES,
        **provenance._asdict(),
    }


def run(config: Config, dataset: Dataset, backend: Backend, steps: int) -> tuple[torch.Tensor, float]:
    """Return the images after the steps, and seconds per step; the clock starts after a first step of ready workers."""
    d = config.distillation
    specs = session.network_specs(config, dataset)
    stores = [session.expert_store(config, dataset, spec) for spec in specs]
    state, labels = initial_state(dataset, d.ipc, d.seed)
    names = config.networks.architectures
    backend.start_workers(worker_group(config, dataset, labels, specs, stores))
    try:
        state, began = loop.take_step(d, names, state, backend).state, time.perf_counter()
        for _ in range(steps):
            state = loop.take_step(d, names, state, backend).state
        return state.images, (time.perf_counter() - began) / steps
    finally:
        backend.stop_workers()


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "all": values}


def _range(summary: dict[str, Any], form: str) -> str:
    return f"{min(summary['all']):{form}} to {max(summary['all']):{form}}"


if __name__ == "__main__":
    main.run(scaling, sys.argv[1:])
