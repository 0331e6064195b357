"""Seconds of an outer step: ours beside the obvious way to write it, beside its passes alone, and beside BPC-fKL.

    python jobs/benchmark.py --data parquet:PATH --json benchmarks/results/benchmark.json
    make bench ARGS="--data parquet:PATH"

Every way takes the same steps with the same draws, in turn, on the same number of threads:

    reference   tests/reference.py: Algorithm 1 with nn.Module, torch.optim and a loop over images, in its own process
    ours        what a worker does, all its x sides and machine code on disk already
    ours, cold  the same without x sides on disk
    floor       as many passes as ours took, back to back, compiled, and nothing else
    bpc-fkl     a step of the weight-space baseline with as many draws (S = 30), by our worker

Ratios are medians over repeats of the ratio within a repeat. Needs neither Ray nor MLflow.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

from fbpc_ray import atomic, pipeline, plan
from fbpc_ray.backend import device_name
from fbpc_ray.cli import COMMANDS, main
from fbpc_ray.config import Config, preset, with_method
from fbpc_ray.distill import Unit, Worker
from fbpc_ray.errors import UserError
from fbpc_ray.passes import Passes
from fbpc_ray.provenance import capture
from fbpc_ray.rng import generator
from fbpc_ray.types import Batch
from fbpc_ray.vision.datasets import Dataset, tensors
from fbpc_ray.vision.realdata import RealData
from fbpc_ray.vision.zoo import Network

RATIOS = (("reference", "ours"), ("reference", "ours, cold"), ("ours", "floor"), ("ours", "bpc-fkl"))


@dataclass(frozen=True)
class Arguments:
    """Seconds of an outer step, and what they are made of."""

    data: str = "cifar10"
    """Data set, as `fbpc distill --data`."""
    data_root: str = "data"
    """Folder of cifar10."""
    networks: tuple[str, ...] = ("convnet-in",)
    """Networks, one case each."""
    widths: tuple[int, ...] = (32,)
    """Widths, one case each."""
    ipcs: tuple[int, ...] = (1, 10)
    """Images a class, one case each."""
    ways: tuple[str, ...] = ("reference", "ours", "ours, cold", "floor", "bpc-fkl")
    """What is timed."""
    steps: int = 2
    """Steps that each way takes in a repeat."""
    repeats: int = 5
    """Times that each way has its go."""
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu | cuda."""
    compiled: bool = True
    """Whether ours runs compiled passes (on a CPU)."""
    json: str = ""
    """Also write what was measured to this file."""


def benchmark(argv: list[str], program: str) -> None:
    args = tyro.cli(Arguments, args=argv, prog=program, description=__doc__)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device here: use --device cpu")
    if args.device == "cuda" and "reference" in args.ways:
        print("note: the reference is for the CPU; it is left out")
        args = replace(args, ways=tuple(way for way in args.ways if way != "reference"))
    cases = []
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="fbpc-benchmark-") as folder,
        ProcessPoolExecutor(1, mp_context=spawn) as elsewhere,
    ):
        os.environ.setdefault("FBPC_CACHE", str(Path(folder) / "cache"))
        for network in args.networks:
            for width in args.widths:
                for ipc in args.ipcs:
                    cases.append(measure(args, network, width, ipc, Path(folder), elsewhere))
                    print(line(cases[-1]), flush=True)
                    if args.json:
                        found = {"cases": cases, "command": " ".join(["python", *sys.argv]), "settings": vars(args)}
                        found |= capture(device_name(args.device))._asdict()
                        atomic.write_text(Path(args.json).absolute(), json.dumps(found, indent=2) + "\n")


def measure(args: Arguments, name: str, width: int, ipc: int, folder: Path, elsewhere: Executor) -> dict[str, Any]:
    """One case: the seconds of every way and repeat."""
    row = f"cifar10-ipc{ipc}" if ipc in (1, 10, 50) else "cifar10-ipc10"
    config = preset(row).updated(
        data=args.data, data_root=args.data_root, ipc=ipc, architectures=(name,), width=width, expert_count=1,
        expert_epochs=2, start_epoch=1, experts=str(folder / "experts"), threads=args.threads, device=args.device,
        compiled="on" if args.compiled else "off",
    )  # fmt: skip
    dataset = plan.load_data(config, print)
    config = config.updated(batch_size=ipc * len(dataset.classes))
    spec = plan.specs(config, dataset)[0]
    store = plan.store(config, dataset, spec)
    network = Network(spec)  # no time depends on the values of an expert's weights
    store.write(0, (network.module(generator(0, "benchmark", epoch)).state_dict() for epoch in range(3)))
    d = config.distillation
    state, labels = pipeline.first_state(dataset, d.ipc, d.seed)
    images = state.images.numpy()

    def worker(changed: Config, **more: Any) -> Worker:
        arguments = plan.crew(changed, dataset, labels, [spec], [store]).arguments | more
        return Worker(**arguments, device=args.device)

    ours, cold = worker(config), worker(config, x_cache_bytes=0.0)
    weights = with_method(config, "bpc-fkl", ipc).updated(start_rule="from", start_epoch=0)
    fkl = worker(weights)
    taken: dict[int, int] = {}

    def our_step(step: int) -> None:
        taken[step] = ours.gradient(Unit(0, 0), step, images, 0.0)[1]["map_steps"]

    ways: dict[str, Callable[[int], None]] = {
        "ours": our_step,
        "ours, cold": lambda step: void(cold.gradient(Unit(0, 0), step, images, 0.0)),
        "floor": floor_step(ours, config, dataset, labels, taken, args),
        "bpc-fkl": lambda step: void(fkl.gradient(Unit(0, 0), step, images, weights.distillation.inner_lr)),
    }
    if unknown := set(args.ways) - {"reference", *ways}:
        raise UserError(f"unknown way '{unknown.pop()}': choose from reference, {', '.join(ways)}")
    flat = json.dumps(config.flat())
    for step in range(args.steps):  # x sides and machine code are there before the clock starts
        our_step(step)
    if "reference" in args.ways:
        elsewhere.submit(reference_seconds, flat, args.threads, 1).result()
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    for _ in range(args.repeats):
        for way in seconds:
            if way == "reference":
                seconds[way].append(elsewhere.submit(reference_seconds, flat, args.threads, args.steps).result())
                continue
            began = time.perf_counter()
            for step in range(args.steps):
                ways[way](step)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[way].append((time.perf_counter() - began) / args.steps)
    ratios = {
        f"{a} / {b}": [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        for a, b in RATIOS
        if a in seconds and b in seconds
    }
    phases = ours.gradient(Unit(0, 0), 0, images, 0.0)[1]
    return {
        "network": spec.architecture, "width": width, "ipc": ipc, "m": len(labels), "threads": args.threads,
        "map_steps": statistics.fmean(taken.values()),
        "seconds": {way: {"median": statistics.median(each), "all": each} for way, each in seconds.items()},
        "ratios": {name: {"median": statistics.median(each), "all": each} for name, each in ratios.items()},
        "phases": {key: value for key, value in phases.items() if key.startswith("seconds_")},
    }  # fmt: skip


@cache
def _reference_of(flat: str) -> tuple[Any, ...]:
    """What the reference needs, loaded once a process."""
    config = Config().updated(**json.loads(flat))
    dataset = plan.load_data(config, print)
    spec = plan.specs(config, dataset)[0]
    store = plan.store(config, dataset, spec)
    snapshots = [store.read(0, epoch) for epoch in range(config.experts.expert_epochs + 1)]
    state, labels = pipeline.first_state(dataset, config.distillation.ipc, config.distillation.seed)
    real = RealData(*tensors(dataset.train, "cpu"), dataset.mean, dataset.std)
    return spec, snapshots, real, state.images, labels, config.distillation


def reference_seconds(flat: str, threads: int, steps: int) -> float:
    """A step of the obvious way, on the CPU, in a process that knows nothing of our allocator's settings."""
    spec, snapshots, real, images, labels, settings = _reference_of(flat)
    torch.set_num_threads(threads)
    began = time.perf_counter()
    for number in range(steps):
        reference.gradient(spec, snapshots, real, images, labels, number, settings)
    return (time.perf_counter() - began) / steps


def floor_step(
    ours: Worker, config: Config, dataset: Dataset, labels: torch.Tensor, taken: dict[int, int], args: Arguments
) -> Callable[[int], None]:
    """The passes of a step whose x side is on disk: MAP steps and K steps with their backward pass, 2 K for Psi, and
    the two of Eq. 17."""
    d, network = config.distillation, Network(ours.specs[0], args.device)
    passes, forward = Passes(network, ours.compiled), network.forward
    params = network.init(generator(0, "benchmark"))
    images = torch.randn(len(labels), *dataset.image_shape, generator=generator(0, "images")).to(args.device)
    batch = Batch(images, labels.to(args.device))

    def step(number: int) -> None:
        torch.set_num_threads(args.threads)
        for _ in range(taken[number] + 1 + d.posterior_steps):
            passes.loss_gradient(params, batch)
        for _ in range(2 * d.posterior_steps):
            passes.logits(params, images)
        for _ in range(2):
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(forward(params, leaf).sum(), leaf)

    return step


def void(_: Any) -> None:
    """For its effect."""


def line(case: dict[str, Any]) -> str:
    """A case for the terminal."""
    seconds = ", ".join(f"{way} {each['median']:.2f}" for way, each in case["seconds"].items())
    ratios = ", ".join(f"{name} {each['median']:.2f}" for name, each in case["ratios"].items())
    where = f"{case['network']} width {case['width']}, ipc {case['ipc']}, {case['map_steps']:.0f} MAP steps"
    return f"{where}\n  seconds a step: {seconds}\n  ratios: {ratios}"


if __name__ == "__main__":
    COMMANDS["benchmark"] = benchmark
    main(["benchmark", *sys.argv[1:]])
