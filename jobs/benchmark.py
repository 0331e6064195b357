"""Seconds of an outer step: ours beside a plain implementation, beside its passes alone, and beside BPC-fKL.

    python jobs/benchmark.py --data parquet:PATH --json benchmarks/results/benchmark.json
    make bench ARGS="--data parquet:PATH"

Every way takes the same steps with the same draws, in turn, on the same number of threads:

    reference   tests/support/reference.py: Algorithm 1 with nn.Module, torch.optim and a loop over images, in a process
    ours        what a worker does, all its expert sides and machine code on disk already
    ours, cold  the same without expert sides on disk
    floor       as many passes as ours took, back to back, compiled, and nothing else
    bpc-fkl     a step of the weight-space baseline with as many draws (S = 30), by our worker
    ours, bf16  ours with --precision bf16
    ours, pool  a step of a distillation with `--map-init warm`, whose solves begin at earlier solutions
    official bpc  with --peer: a step of the official code's BPC-fKL, by that code (jobs/peer_bpc.py)

Ratios are medians over repeats of the ratio within a repeat. Needs neither Ray nor MLflow.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # where runpy runs this file
import benchmark_peer
from benchmark_report import PHASES, draw, line, table, write_report
from benchmark_ways import (
    Case,
    first_run,
    floor_of,
    pool_of,
    ratios_of,
    reference_seconds,
    spread,
    timed,
    training,
    worker,
    write_untrained,
)

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset, with_method
from fbpc_ray.core.provenance import Provenance, capture
from fbpc_ray.distillation.methods.common import GradientStats
from fbpc_ray.distillation.state import GradientTask, gradient_tasks, initial_state
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import device_name
from fbpc_ray.models.precision import require
from fbpc_ray.reproduction import cost

RATIOS = (
    ("reference", "ours"), ("reference", "ours, cold"), ("ours", "floor"), ("ours", "bpc-fkl"), ("ours", "ours, bf16"),
    ("ours, pool", "bpc-fkl"), ("ours", "ours, pool"), (benchmark_peer.WAY, "ours"), (benchmark_peer.WAY, "bpc-fkl"),
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Seconds and memory of an outer step, and what they are made of."""

    data: str = "cifar10"
    """Data set, as `fbpc distill --data`."""
    data_root: str = "data"
    """Folder of cifar10."""
    networks: tuple[str, ...] = ("convnet-in",)
    """A case each; networks joined by + are one case of several architectures, one after the other."""
    widths: tuple[int, ...] = (32,)
    """Widths, one case each."""
    ipcs: tuple[int, ...] = (1, 10)
    """Images per class, one case each."""
    ways: tuple[str, ...] = ("reference", "ours", "ours, cold", "floor", "bpc-fkl")
    """What is timed; also: ours, pool | ours, bf16."""
    steps: int = 2
    """Steps that each way takes in a repeat."""
    repeats: int = 5
    """Times that each way has its go."""
    first_run: int = 0
    """Also the first so many steps, nothing on disk, compilation included, beside the reference."""
    training: bool = True
    """Also the seconds of a batch of training an expert of the first network, beside the bare loop."""
    memory: bool = True
    """Also the peak memory of a step, in a process of its own."""
    experts: str = ""
    """Folder with trained experts of these networks, of --expert-epochs epochs, for `ours, pool`, whose MAP steps
    depend on what u becomes; empty: untrained ones, which cost as much otherwise."""
    expert_epochs: int = 2
    """Epochs of the experts."""
    warm_pool_size: int = 5
    """Solutions of `ours, pool`."""
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu | cuda."""
    peer: str = ""
    """A checkout of the official BPC code, whose BPC-fKL step on CIFAR-10's shapes is timed too; empty: none."""
    compiled: bool = True
    """Whether ours runs compiled passes (on a CPU)."""
    json: str = ""
    """Also write what was measured to this file; beside it a table (.md), and pictures where cases differ in their ipc
    or their number of networks."""


def benchmark(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/benchmark.py", about=__doc__)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device here: use --device cpu")
    if args.device == "cuda" and "reference" in args.ways:
        print("note: the reference is for the CPU; it is left out")
        args = replace(args, ways=tuple(way for way in args.ways if way != "reference"), first_run=0)
    known = ("reference", "ours", "ours, cold", "floor", "bpc-fkl", "ours, pool", "ours, bf16")
    if "ours, bf16" in args.ways:
        require("bf16", args.device)
    if unknown := set(args.ways) - set(known):
        raise UserError(f"unknown way '{unknown.pop()}': choose from {', '.join(known)}")
    if args.peer:
        benchmark_peer.check(args.peer, args.widths)
        args = replace(args, ways=(*args.ways, benchmark_peer.WAY))
    cases, provenance = [], capture(device_name(args.device))  # before a file of results is another than that committed
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="fbpc-benchmark-") as folder,
        ProcessPoolExecutor(1, mp_context=spawn) as elsewhere,
    ):
        os.environ.setdefault("FBPC_CACHE", str(Path(folder) / "cache"))
        for names in args.networks:
            for width in args.widths:
                for ipc in args.ipcs:
                    case = prepare(args, tuple(names.split("+")), width, ipc, Path(folder))
                    cases.append(measure(case, args, Path(folder), elsewhere))
                    print(line(cases[-1]), flush=True)
                    if args.json:
                        write(args, cases, provenance)


def prepare(args: Arguments, names: tuple[str, ...], width: int, ipc: int, folder: Path) -> Case:
    row = f"cifar10-ipc{ipc}" if ipc in (1, 10, 50) else "cifar10-ipc10"
    config = preset(row).updated(
        data=args.data, data_root=args.data_root, ipc=ipc, architectures=names, width=width, expert_count=1,
        expert_epochs=args.expert_epochs, start_epoch=1, experts=args.experts or str(folder / "experts"),
        threads=args.threads, device=args.device, compiled="on" if args.compiled else "off",
    )  # fmt: skip
    dataset = session.load_data(config, print)
    config = config.updated(batch_size=ipc * len(dataset.classes))
    specs = session.network_specs(config, dataset)
    stores = [session.expert_store(config, dataset, spec) for spec in specs]
    for spec, store in zip(specs, stores, strict=True):
        if store.missing(1) and args.experts:
            raise UserError(f"there are no experts of {spec.architecture} in {store.folder}: train them (fbpc experts)")
        write_untrained(store, spec, store.missing(1))
    d = config.distillation
    state, labels = initial_state(dataset, d.ipc, d.seed)
    return Case(config, dataset, specs, stores, state.images.numpy(), labels)


def measure(case: Case, args: Arguments, folder: Path, elsewhere: Executor) -> dict[str, Any]:
    """Time every way and repeat, and what the flags ask for beside."""
    config, units = case.config, gradient_tasks(len(case.specs), 1)
    ours, cold = worker(case, config), worker(case, config, trajectory_cache_bytes=0.0)
    weights = with_method(config, "bpc-fkl", config.distillation.ipc).updated(start_rule="from", start_epoch=0)
    fkl, bf16 = worker(case, weights), worker(case, config, precision="bf16")
    map_steps: dict[tuple[GradientTask, int], int] = {}

    def our_step(step: int) -> None:
        for unit in units:
            map_steps[unit, step] = ours.gradient(unit, step, case.images, 0.0)[1].map_steps or 0

    def bf16_step(step: int) -> None:
        for unit in units:
            bf16.gradient(unit, step, case.images, 0.0)

    def cold_step(step: int) -> None:
        for unit in units:
            cold.gradient(unit, step, case.images, 0.0)

    def weight_step(step: int) -> None:
        for unit in units:
            fkl.gradient(unit, step, case.images, weights.distillation.inner_lr)

    floors = [floor_of(ours, case, unit, map_steps, args.device, args.threads) for unit in units]

    def floor_step(step: int) -> None:
        for floor in floors:
            floor(step)

    ways: dict[str, Callable[[int], None]] = {
        "ours": our_step, "ours, cold": cold_step, "bpc-fkl": weight_step,
        "floor": floor_step, "ours, bf16": bf16_step,
    }  # fmt: skip
    flat = json.dumps(config.flat())
    for step in range(args.steps):  # expert sides and machine code exist before the clock starts
        our_step(step)
        if "ours, bf16" in args.ways:
            bf16_step(step)
    pool_steps: list[int] = []
    if "ours, pool" in args.ways:
        ways["ours, pool"] = pool_of(case, args.device, args.warm_pool_size, args.repeats, pool_steps)
    others: dict[str, Callable[[int], float]] = {}
    if "reference" in args.ways:
        elsewhere.submit(reference_seconds, flat, args.threads, [0]).result()
        others["reference"] = lambda steps: elsewhere.submit(
            reference_seconds, flat, args.threads, list(range(steps))
        ).result()
    with ExitStack() as stack:
        if args.peer:
            n, d = config.networks, config.distillation
            peer = stack.enter_context(benchmark_peer.Peer(args.peer, n.width, d.ipc, args.threads, args.device))
            peer.seconds(1)
            others[benchmark_peer.WAY] = peer.seconds
        seconds = in_turn(ways, others, args)
    report = report_of(case, seconds, [ours.gradient(unit, 0, case.images, 0.0)[1] for unit in units])
    report["map_steps"] = statistics.fmean(map_steps.values())
    if pool_steps:
        report["map_steps_pool"] = statistics.fmean(pool_steps)
    if args.training:
        report["training"] = training(case, args.device, args.threads, args.repeats)
    if args.memory:
        report["peak_gb"] = {
            way: cost.measure(changed, args.device, 1).peak_gb
            for way, changed in (("ours", config), ("bpc-fkl", weights))
        }
    if args.first_run:
        report["first_run"] = first_run(case, args.first_run, args.threads, folder, elsewhere)
    return report


def report_of(case: Case, seconds: dict[str, list[float]], phases: list[GradientStats]) -> dict[str, Any]:
    """Describe a case: its sizes, the seconds of each way with their ratios, and the phases of our step."""
    config = case.config
    return {
        "networks": [spec.architecture for spec in case.specs], "width": config.networks.width,
        "ipc": config.distillation.ipc, "m": len(case.labels), "threads": config.workers.threads,
        "seconds": {way: spread(values) for way, values in seconds.items()}, "ratios": ratios_of(seconds, RATIOS),
        "phases": {name: sum(getattr(stats, key) for stats in phases) for key, name in PHASES.items()},
    }  # fmt: skip


def in_turn(
    ways: dict[str, Callable[[int], None]], others: dict[str, Callable[[int], float]], args: Arguments
) -> dict[str, list[float]]:
    """Return the seconds of a step of each way in each repeat.

    Args:
        ways: those of this process, functions that take the step of a number.
        others: those of other processes, functions that return the mean seconds of so many steps.
    """
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    for _ in range(args.repeats):
        for way in seconds:
            if way in others:
                seconds[way].append(others[way](args.steps))
            else:
                # A turn of the pool: some solves start at a new draw, which takes longer.
                count = args.warm_pool_size if way == "ours, pool" else args.steps
                seconds[way].append(timed(ways[way], range(count), args.device))
    return seconds


def write(args: Arguments, cases: list[dict[str, Any]], provenance: Provenance) -> None:
    """Write the file of `--json`, and the table beside it."""
    places = {"experts": "EXPERTS" if args.experts else "", "peer": "CHECKOUT" if args.peer else ""}
    path = write_report(vars(args) | places, {"cases": cases}, provenance)
    files.write_text(path.with_suffix(".md"), table(cases))
    draw(cases, path)


if __name__ == "__main__":
    main.run(benchmark, sys.argv[1:])
