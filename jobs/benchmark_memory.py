"""Peak memory and seconds of one outer step of a large coreset, with --memory-budget.

    python jobs/benchmark_memory.py --data parquet:CIFAR100 --ipc 50 --width 32 --memory-budget 6GB --json FILE.json
    python jobs/benchmark_memory.py --image-size 224 --ipc 50 --width 8 --memory-budget 6GB --map-max-steps 10

The step is a whole one, by the serial backend: theta_x and its K steps, the MAP solve, the K steps on u, Psi, Eq. 17,
the update of the images; one network, one process. Before it, passes of each shape are compiled and called once. The
peak is the kernel's: VmHWM of the process, reset by /proc/self/clear_refs just before the step, so it has all that the
process holds then (Python, torch, data, experts). A MAP solve may be cut short by --map-max-steps, which changes the
seconds, not the peak; the report says how the solve ended. The expert is untrained: neither depends on its weights.

Without --data the images are noise: --image-size, --classes, --per-class. Needs neither Ray nor MLflow.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from benchmark import write_untrained
from benchmark_report import write_report

from fbpc_ray.api import dataset as dataset_of
from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.numerics import numerics
from fbpc_ray.core.presets import PRESETS, preset
from fbpc_ray.core.provenance import capture
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.types import Batch
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import loop
from fbpc_ray.execution import memory_budget, session
from fbpc_ray.execution.serial import Serial, device_name
from fbpc_ray.execution.session import Session
from fbpc_ray.reproduction import cost


@dataclass(frozen=True)
class Arguments:
    """Peak memory and seconds of one outer step."""

    data: str = ""
    """Data set, as `fbpc distill --data`; empty: noise."""
    image_size: int = 224
    """Noise: side of the images."""
    classes: int = 10
    """Noise: classes."""
    per_class: int = 60
    """Noise: training images of each class."""
    preset: str = "cifar100-ipc50"
    """Settings of Algorithm 1, a row of Table 4."""
    network: str = "convnet-in"
    """Network."""
    width: int = 32
    """Its width."""
    ipc: int = 50
    """Images per class; B is all of them."""
    memory_budget: str = "6GB"
    """As `fbpc distill`; empty: none."""
    chunk_images: int = 0
    """As `fbpc distill`."""
    map_max_steps: int = 2000
    """Adam steps after which the MAP solve ends."""
    posterior_steps: int = 30
    """K."""
    compiled: bool = True
    """Whether passes are compiled."""
    threads: int = 1
    """CPU threads."""
    json: str = ""
    """File that gets the measurement."""


def benchmark(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/benchmark_memory.py", about=__doc__)
    if args.preset not in PRESETS:
        raise UserError(f"--preset {args.preset}: choose from {', '.join(PRESETS)}")
    provenance = capture(device_name("cpu"))
    with tempfile.TemporaryDirectory(prefix="fbpc-memory-") as folder:
        report = measure(args, Path(folder))
    print(describe(report))
    if args.json:
        write_report(asdict(args), report, provenance)


def measure(args: Arguments, folder: Path) -> dict[str, Any]:
    """Take one step; return its peak memory, its seconds and their parts."""
    opened = open_session(args, folder)
    for spec, store in zip(opened.specs, opened.stores, strict=True):
        write_untrained(store, spec, store.missing(1))
    d, chunk = opened.config.distillation, opened.config.networks.chunk_images
    backend, (state, _) = Serial("cpu", Interruption(())), opened.initial
    backend.start_workers(opened.worker_group())
    seconds_compiling = warm_up(backend, opened)
    at_rest = cost._reset("cpu")
    began = time.perf_counter()
    step = loop.take_step(d, opened.config.networks.architectures, state, backend)
    seconds = time.perf_counter() - began
    peak = cost._peak("cpu")
    (row,) = step.rows
    budget = memory_budget.parse_size(args.memory_budget) if args.memory_budget else None
    return {
        "images": len(state.images), "image_shape": list(opened.dataset.image_shape),
        "classes": len(opened.dataset.classes),
        "real_images": len(opened.dataset.train.labels), "chunk_images": chunk,
        "peak_gb": peak / 1e9, "at_rest_gb": at_rest / 1e9, "budget_gb": budget and budget / 1e9,
        "within_budget": budget and peak <= budget, "seconds": seconds, "seconds_of_first_passes": seconds_compiling,
        **{name: row[name] for name in ("map_steps", "map_ending", "map_loss", "loss", "gradient_norm")},
        **{name: row[name] for name in ("seconds_x", "seconds_map", "seconds_u", "seconds_gradient")},
    }  # fmt: skip


def open_session(args: Arguments, folder: Path) -> Session:
    """Open the session of the measurement, whose experts are in `folder`."""
    config = preset(args.preset).updated(
        ipc=args.ipc, architectures=(args.network,), width=args.width, memory_budget=args.memory_budget,
        chunk_images=args.chunk_images, map_max_steps=args.map_max_steps, posterior_steps=args.posterior_steps,
        compiled="on" if args.compiled else "off", threads=args.threads, backend="serial", device="cpu",
        expert_count=1, expert_epochs=1, start_epoch=1, experts=str(folder), trajectory_cache_gb=0.0, steps=1,
        expert_batch_size=1, **({"data": args.data} if args.data else {}),
    )  # fmt: skip
    dataset = session.load_data(config, print) if args.data else noise(args)
    config = config.updated(batch_size=args.ipc * len(dataset.classes))
    return session.open_session(config, print, dataset)


def noise(args: Arguments) -> Dataset:
    """Draw a data set of uniform pixels."""
    source, size = np.random.default_rng(0), args.image_size
    labels = np.arange(args.classes).repeat(args.per_class)
    images = source.integers(0, 256, (len(labels), 3, size, size), np.uint8)
    few = labels[:: args.per_class]
    test = source.integers(0, 256, (len(few), 3, size, size), np.uint8)
    return dataset_of((torch.from_numpy(images), labels), (torch.from_numpy(test), few))


def warm_up(backend: Serial, opened: Session) -> float:
    """Compile and call the passes of a step's shapes; return the seconds."""
    worker, config = backend.worker, opened.config
    assert worker is not None
    began = time.perf_counter()
    context = worker._context(backend.tasks[0])
    network, (state, labels) = context.network, opened.initial
    params = network.init(generator(0, "warm-up"))
    with numerics(config.workers.threads):
        for count in {config.distillation.batch_size, min(config.distillation.real_batch_size, len(context.real))}:
            images = state.images[torch.arange(count) % len(labels)]
            context.passes.loss_and_grad(params, Batch(images, labels[torch.arange(count) % len(labels)]))
        context.passes.logits(params, state.images)
    return time.perf_counter() - began


def describe(report: dict[str, Any]) -> str:
    """Format the measurement in three lines."""
    c, height, width = report["image_shape"]
    parts = ", ".join(f"{name.removeprefix('seconds_')} {report[name]:.1f}" for name in PARTS)
    budget = f" of {report['budget_gb']:.3g} GB" if report["budget_gb"] else ""
    return (
        f"m = {report['images']} of {c}x{height}x{width}, chunks of {report['chunk_images']}\n"
        f"peak {report['peak_gb']:.2f} GB{budget} (before the step {report['at_rest_gb']:.2f})\n"
        f"{report['seconds']:.0f} s: {parts}; {report['map_steps']} MAP steps ({report['map_ending']})"
    )


PARTS = ("seconds_x", "seconds_map", "seconds_u", "seconds_gradient")

if __name__ == "__main__":
    main.run(benchmark, sys.argv[1:])
