"""CPU seconds of single passes: float32 beside bfloat16, and freed blocks kept beside blocks given back.

    python jobs/benchmark_passes.py --widths 32 128 --json benchmarks/results/benchmark-passes.json

Each row is a pair, timed in turn on one thread. Its ratio is the median over repeats of first / second within a repeat.
CPU seconds of the process, not of the wall clock, so that programs on other cores disturb less. For each width:

    pass of 10, of 100      a training pass of the distillation, compiled: fp32 / bf16
    expert batch            256 images: fp32, eager / bf16, compiled
    expert batch, kept      fp32: blocks of up to 64 MiB kept / of up to 1 GiB, each in a process of its own
    prediction, kept        500 images: the same
    prediction, batches     one batch of 500 images / ten of 50

The limit of the machine, in GFLOP/s of fp32: a matrix product, the network's widest convolution alone, forwards, and
the pass of the distillation, counted as three forward passes. Without bfloat16 instructions the rows of bf16 are left
out. The images are noise of 3x32x32.
"""

import ctypes
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d, cross_entropy

sys.path.insert(0, str(Path(__file__).parent))  # where runpy runs this file
from benchmark_report import with_range

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import allocator, files
from fbpc_ray.core.provenance import capture
from fbpc_ray.core.rng import generator
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.core.types import Batch
from fbpc_ray.execution.serial import device_name
from fbpc_ray.models import compiler
from fbpc_ray.models.functional import Network, specify
from fbpc_ray.models.passes import Passes, count_macs
from fbpc_ray.models.precision import supports_bf16

EXPERT_BATCH, TEST_BATCH = 256, 500
Call = Callable[[], object]


@dataclass(frozen=True)
class Arguments:
    """CPU seconds of passes in float32 and bfloat16, and with freed memory kept or given back."""

    network: str = "convnet-in"
    """Network."""
    widths: tuple[int, ...] = (32, 128)
    """Widths, one after the other."""
    images: tuple[int, ...] = (10, 100)
    """Images of a training pass of the distillation, one row each."""
    repeats: int = 9
    """Times that each pair is timed."""
    coreset: int = 0
    """Measure instead one training pass of so many images in chunks, of --chunk-images images and of --small-chunks."""
    chunk_images: int = 2500
    """--coreset: images of the first's chunks."""
    small_chunks: int = 250
    """--coreset: images of the second's chunks."""
    classes: int = 10
    """Classes."""
    compiled: bool = True
    """Whether passes of the distillation, and expert batches in bf16, are compiled."""
    json: str = ""
    """Also write what was measured to this file, and a table (.md) beside it."""


def benchmark(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/benchmark_passes.py", about=__doc__)
    torch.set_num_threads(1)
    allocator.keep_freed_memory()
    provenance, rows, limits = capture(device_name("cpu")), list[dict[str, Any]](), list[dict[str, Any]]()
    dtypes = [torch.float32, *([torch.bfloat16] if supports_bf16("cpu") else [])]
    gflops = {str(dtype).removeprefix("torch."): product_gflops(dtype) for dtype in dtypes}
    print("matrix product, GFLOP/s: " + ", ".join(f"{name} {value:.0f}" for name, value in gflops.items()), flush=True)
    if len(dtypes) == 1:
        print("this CPU has no bfloat16 instructions: the rows of bf16 are left out", flush=True)
    for width in args.widths:
        for count in args.images if not args.coreset else ():
            limits.append(limit(args, width, count))
            print(limit_line(limits[-1]), flush=True)
        for name, first, second in pairs(args, width):
            rows.append({"name": name, "width": width, **compare(first, second, args.repeats)})
            print(line(rows[-1]), flush=True)
        for row in allocator_rows(args, width) if not args.coreset else ():
            rows.append(row)
            print(line(row), flush=True)
        if args.json:
            path = Path(args.json).absolute()
            settings = vars(args) | {"json": path.name}
            report = {"gflops": gflops, "limits": limits, "rows": rows, "settings": settings, **provenance._asdict()}
            files.write_json(path, report)
            files.write_text(path.with_suffix(".md"), table(rows, "Passes on one thread") + limit_table(limits))


def product_gflops(dtype: torch.dtype, size: int = 1024, repeats: int = 7) -> float:
    """Return the GFLOP/s of the quickest of some products of two square matrices."""
    matrix = torch.randn(size, size, generator=generator(0, "matrix")).to(dtype)
    return 2e-9 * size**3 / min(seconds(lambda: matrix @ matrix) for _ in range(repeats))


def limit(args: Arguments, width: int, count: int, repeats: int = 9) -> dict[str, Any]:
    """Time a training pass of `count` images, the network's widest convolution and a matrix product, in turn."""
    network = build(args.network, width, args.classes)
    passes, params, batch = Passes(network, compiling(args)), network.init(generator(0, "init")), noise(count)
    source = generator(0, "images")
    images, weight = (
        torch.randn(count, width, 16, 16, generator=source),
        torch.randn(width, width, 3, 3, generator=source),
    )
    matrix = torch.randn(1024, 1024, generator=source)
    work = {
        "product": (2 * 1024**3, lambda: matrix @ matrix),
        "convolution": (2 * 9 * width**2 * 16**2 * count, lambda: conv2d(images, weight, padding=1)),
        "pass": (6 * count_macs(network) * count, lambda: passes.loss_and_grad(params, batch)),
    }
    timed: dict[str, list[float]] = {name: [] for name in work}
    for number in range(repeats + 1):
        for name, (operations, call) in work.items():
            gflops = 1e-9 * operations / seconds(call)
            if number:  # the first is the warm-up
                timed[name].append(gflops)
    gflops = {name: {"median": statistics.median(values), "all": values} for name, values in timed.items()}
    shares = [a / b for a, b in zip(timed["pass"], timed["product"], strict=True)]
    return {
        "width": width, "images": count, "gflops": gflops,
        "pass / product": {"median": statistics.median(shares), "all": shares},
    }  # fmt: skip


def compiling(args: Arguments) -> Path | None:
    return compiler.folder() if args.compiled else None


def pairs(args: Arguments, width: int) -> list[tuple[str, Call, Call]]:
    """Return (name, first, second) of the pairs in this process."""
    network = build(args.network, width, args.classes)
    folder = compiling(args)
    params = network.init(generator(0, "init"))
    if args.coreset:
        whole = noise(args.coreset)
        large, small = (Passes(network, folder, chunk_images=size) for size in (args.chunk_images, args.small_chunks))
        name = f"pass of {args.coreset:,}, chunks of: {args.chunk_images} / {args.small_chunks}"
        return [(name, lambda: large.loss_and_grad(params, whole), lambda: small.loss_and_grad(params, whole))]
    fp32, bf16, eager = Passes(network, folder), Passes(network, folder, "bf16"), Passes(network)
    batch, test = noise(EXPERT_BATCH), noise(TEST_BATCH).images
    statistics_ = network.statistics(params, [batch.images])
    batches = [(f"pass of {count}", fp32, noise(count)) for count in args.images] + [("expert batch", eager, batch)]
    formats: list[tuple[str, Call, Call]] = [
        (
            f"{name}: fp32 / bf16", lambda first=first, batch=batch: first.loss_and_grad(params, batch),
            lambda batch=batch: bf16.loss_and_grad(params, batch),
        )
        for name, first, batch in batches
    ]  # fmt: skip
    return [
        *(formats if supports_bf16("cpu") else []),
        (
            "prediction, batches: 500 / 50", lambda: network.predict(params, statistics_, test),
            lambda: [network.predict(params, statistics_, part) for part in test.split(50)],
        ),
    ]  # fmt: skip


def build(name: str, width: int, classes: int = 10) -> Network:
    return Network(specify(name, (3, 32, 32), classes, width, 0))


def noise(count: int) -> Batch:
    images = torch.randn(count, 3, 32, 32, generator=generator(0, "images"))
    return Batch(images, torch.arange(count) % 10)


def compare(first: Call, second: Call, repeats: int) -> dict[str, Any]:
    """Time two calls in turn, after one of each."""
    first()
    second()
    timed = []
    for number in range(repeats):  # either goes first in half of the repeats
        if number % 2:
            timed.append((seconds(first), seconds(second)))
        else:
            timed.append((seconds(second), seconds(first))[::-1])
    return summary(timed)


def summary(timed: list[tuple[float, float]]) -> dict[str, Any]:
    one, other = zip(*timed, strict=True)
    ratios = [a / b for a, b in timed]
    return {
        "first": {"median": statistics.median(one), "all": list(one)},
        "second": {"median": statistics.median(other), "all": list(other)},
        "ratio": {"median": statistics.median(ratios), "all": ratios},
    }


def seconds(call: Call) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


# ---- with another limit of the allocator, in processes of their own


def allocator_rows(args: Arguments, width: int) -> list[dict[str, Any]]:
    """Compare blocks of up to 64 MiB kept with blocks of up to `KEPT_BELOW`, in one process each."""
    spawn = multiprocessing.get_context("spawn")
    limits = (64 * 2**20, allocator.KEPT_BELOW)
    pools = [ProcessPoolExecutor(1, mp_context=spawn, initializer=keep, initargs=(limit,)) for limit in limits]
    rows = []
    try:
        for kind, name in (("train", "expert batch"), ("predict", "prediction")):
            words = (args.network, width, kind)
            for pool in pools:
                pool.submit(timed_eager, *words).result()
            results = [[pool.submit(timed_eager, *words).result() for pool in pools] for _ in range(args.repeats)]
            faults = [statistics.median(result[side][1] for result in results) for side in (0, 1)]
            timed = [(one[0], other[0]) for one, other in results]
            name = f"{name}, kept: 64 MiB / 1 GiB"
            rows.append({"name": name, "width": width, **summary(timed), "page_faults": faults})
    finally:
        for pool in pools:
            pool.shutdown()
    return rows


def keep(limit: int) -> None:
    """Have this process keep freed blocks of up to `limit` bytes, on one thread."""
    torch.set_num_threads(1)
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(allocator.M_TRIM_THRESHOLD, 2**31 - 1)
    assert mallopt(allocator.M_MMAP_THRESHOLD, limit)


def timed_eager(name: str, width: int, kind: str) -> tuple[float, int]:
    """Return the CPU seconds and page faults of a pass, after one as warm-up."""
    network = build(name, width)
    params, batch = network.init(generator(0, "init")), noise(EXPERT_BATCH if kind == "train" else TEST_BATCH)
    statistics_ = network.statistics(params, [batch.images[:50]])

    def train() -> None:
        leaves = {key: value.requires_grad_() for key, value in params.items()}
        torch.autograd.grad(cross_entropy(network.forward(leaves, batch.images), batch.labels), list(leaves.values()))

    call = train if kind == "train" else lambda: network.predict(params, statistics_, batch.images)
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    took = seconds(call)
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# ---- output


def line(row: dict[str, Any]) -> str:
    """Format a row for the terminal."""
    text = f"width {row['width']}, {row['name']}: {row['first']['median']:.3g} / {row['second']['median']:.3g} s, "
    text += f"ratio {with_range(row['ratio'])}"
    return text + (", page faults {:,.0f} / {:,.0f}".format(*row["page_faults"]) if "page_faults" in row else "")


def limit_line(row: dict[str, Any]) -> str:
    """Format a row of `limit` for the terminal."""
    values = ", ".join(f"{name} {value['median']:.0f}" for name, value in row["gflops"].items())
    share = with_range(row["pass / product"])
    return f"width {row['width']}, {row['images']} images, GFLOP/s: {values}; pass / product {share}"


def limit_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows of `limit` as a Markdown table."""
    heads = ["width", "images", "product, GFLOP/s", "convolution, GFLOP/s", "pass, GFLOP/s", "pass / product"]
    cells = [
        [
            str(row["width"]), str(row["images"]), *(f"{value['median']:.0f}" for value in row["gflops"].values()),
            with_range(row["pass / product"]),
        ]
        for row in rows
    ]  # fmt: skip
    return f"\n{markdown_table(heads, cells)}\n" if rows else ""


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Format the rows as a Markdown table."""
    cells = [
        [
            str(row["width"]), row["name"], f"{row['first']['median']:.3g}", f"{row['second']['median']:.3g}",
            with_range(row["ratio"]),
            " / ".join(f"{count:,.0f}" for count in row.get("page_faults", [])),
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["width", "pair", "first, CPU s", "second, CPU s", "ratio", "page faults"]
    return f"{title}\n\n{markdown_table(heads, cells)}\n"


if __name__ == "__main__":
    main.run(benchmark, sys.argv[1:])
