"""CPU seconds of a step of `--method vbpc`: ours beside eager passes, beside its passes alone, and its algebra.

    python jobs/benchmark_vbpc.py --data parquet:PATH --json benchmarks/results/benchmark-vbpc.json

For each width and number of images per class, in turn on one thread:

    step        what a worker does for a network of the pool that has been used: a training step on u, features of u
                and of a real batch, the loss, its gradient by images and labels
    eager       the same without compiled passes
    passes      the passes of a step alone, compiled
    algebra     Cholesky, predictions, loss and KL on features (n, h), forwards and backwards, in float64

n is the number of rows of u with its mirror images, h that of features. Ratios are medians over repeats of the ratio
within a repeat. Peak memory of a step: growth of the process. Needs neither Ray nor MLflow.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_report import with_range, write_report
from benchmark_ways import ratios_of, spread

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.config import Config
from fbpc_ray.core.numerics import numerics
from fbpc_ray.core.presets import preset, with_method
from fbpc_ray.core.provenance import capture
from fbpc_ray.core.rng import generator
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.core.types import Batch
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.methods import vbpc
from fbpc_ray.distillation.state import GradientTask
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import device_name
from fbpc_ray.models.last_layer import posterior, scaled
from fbpc_ray.reporting.charts import comparison
from fbpc_ray.reproduction import cost

Way = Callable[[], object]
RATIOS = (("step", "passes"), ("eager", "step"), ("algebra", "step"))
TASK = GradientTask(0, 0)


@dataclass(frozen=True)
class Arguments:
    """CPU seconds of a step of vbpc."""

    data: str = "digits"
    """Data set, as `fbpc distill --data`."""
    network: str = "convnet-in"
    """Network."""
    widths: tuple[int, ...] = (32, 128)
    """Its widths."""
    ipcs: tuple[int, ...] = (1, 10, 50)
    """Images per class."""
    repeats: int = 3
    """Turns of each way."""
    compiled: bool = True
    """Compile the passes, but for the way `eager`."""
    threads: int = 1
    """CPU threads."""
    json: str = ""
    """File that gets every value; the table and the picture lie beside it."""


def benchmark(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/benchmark_vbpc.py", about=__doc__)
    provenance, dataset = capture(device_name("cpu")), None
    cases = []
    for width in args.widths:
        for ipc in args.ipcs:
            config = config_of(args, width, ipc)
            dataset = dataset or session.load_data(config, print)
            cases.append(measure(config, dataset, args.repeats))
            print(table(cases[-1:]))
    if args.json:
        path = write_report(asdict(args), {"cases": cases}, provenance)
        files.write_text(path.with_suffix(".md"), table(cases) + "\n")
        draw(cases, path.with_suffix(".png"))


def config_of(args: Arguments, width: int, ipc: int) -> Config:
    base = preset("digits") if args.data == "digits" else Config()
    return with_method(base, "vbpc", ipc).updated(
        data=args.data, architectures=(args.network,), width=width, ipc=ipc, threads=args.threads, device="cpu",
        backend="serial", compiled="on" if args.compiled else "off",
    )  # fmt: skip


def measure(config: Config, dataset: Dataset, repeats: int) -> dict[str, Any]:
    """Time every way of a case in turn, after a call that compiles and warms up."""
    opened = session.open_session(config, print, dataset)
    worker, eager = (
        Worker(**opened.worker_group().worker._replace(compiled=compiled)._asdict(), device="cpu")
        for compiled in (config.workers.compiled == "on", False)
    )
    state = opened.initial[0]
    assert state.soft_labels is not None
    images, labels = state.images.numpy(), state.soft_labels.numpy()
    start = worker.gradient(TASK, 0, images, 0.0, soft_labels=labels).solution

    def step_of(by: Worker) -> Way:
        return lambda: by.gradient(TASK, 0, images, 0.0, start=start, soft_labels=labels)

    features, passes_alone = passes_of(worker, state.images, state.soft_labels)
    ways = {
        "step": step_of(worker), "eager": step_of(eager), "passes": passes_alone,
        "algebra": algebra_of(config, *features, len(dataset.classes), len(dataset.train.labels)),
    }  # fmt: skip
    with numerics(config.workers.threads):
        for way in ways.values():
            way()
        at_rest = cost._reset("cpu")
        ways["step"]()
        peak = cost._peak("cpu") - at_rest
        seconds = {name: [0.0] * repeats for name in ways}
        for repeat in range(repeats):
            for name, way in ways.items():
                seconds[name][repeat] = cpu_seconds(way)
    return {
        "width": config.networks.width, "ipc": config.distillation.ipc, "n": len(features[0]),
        "h": features[0].shape[1], "real_batch_size": len(features[1]), "peak_gb": peak / 1e9,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": ratios_of(seconds, RATIOS),
    }  # fmt: skip


def passes_of(worker: Worker, images: Tensor, soft_labels: Tensor) -> tuple[tuple[Tensor, Tensor], Way]:
    """Return the scaled features of u (n, h) and of a real batch (b, h), and the passes of a step as a function."""
    context = worker._context(TASK)
    passes, settings = context.passes, context.settings
    params = context.network.init(generator(0, "benchmark"))
    u = vbpc._regression_data(images, soft_labels, settings)
    real = vbpc._real_batch(context, 0).images
    with torch.no_grad():
        features = scaled(passes.features(params, u.images)), scaled(passes.features(params, real))
    cotangent = torch.ones_like(features[0])

    def run() -> None:
        passes.squared_loss_and_grad(params, Batch(u.images, u.targets))
        with torch.no_grad():
            passes.features(params, real)
        leaf = u.images.clone().requires_grad_()
        torch.autograd.grad(passes.features(params, leaf), leaf, cotangent)

    return features, run


def algebra_of(config: Config, u: Tensor, real: Tensor, classes: int, count: int) -> Way:
    """Return the loss of a step on features with its gradient by features and targets, as a function."""
    d = config.distillation
    targets = torch.randn(len(u), classes, generator=generator(0, "targets"))
    labels = torch.arange(len(real)) % classes

    def run() -> None:
        phi, y = u.clone().requires_grad_(), targets.clone().requires_grad_()
        layer = posterior(phi, y, d.ridge, d.prior_precision)
        loss, _, _ = vbpc.vbpc_loss(layer, real, labels, y, d, count)
        torch.autograd.grad(loss, (phi, y))

    return run


def cpu_seconds(way: Way) -> float:
    """Return the CPU seconds of a call, over as many calls as take a tenth of a second or more."""
    calls, began = 0, time.process_time()
    while calls < 1 or time.process_time() - began < 0.1:
        way()
        calls += 1
    return (time.process_time() - began) / calls


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Format one row for each case: medians in milliseconds, ratios with their range."""
    names = list(cases[0]["seconds"])
    rows = []
    for case in cases:
        times = [f"{1000 * case['seconds'][name]['median']:.3g}" for name in names]
        ratios = map(with_range, case["ratios"].values())
        sizes = [str(case[name]) for name in ("width", "ipc", "n", "h")]
        rows.append([*sizes, *times, *ratios, f"{case['peak_gb']:.2f}"])
    header = ["width", "ipc", "n", "h", *(f"{name}, ms" for name in names), *cases[0]["ratios"], "peak, GB"]
    return markdown_table(header, rows)


def draw(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw seconds and memory against n, a panel for each h."""
    sizes = sorted({case["h"] for case in cases})
    for suffix, label, values in (
        ("", "CPU seconds", lambda case: {name: case["seconds"][name]["median"] for name in ("step", "algebra")}),
        ("-memory", "GB", lambda case: {"step": case["peak_gb"]}),
    ):
        panels = []
        for h in sizes:
            of_size = sorted((case for case in cases if case["h"] == h), key=lambda case: case["n"])
            names = values(of_size[0])
            panels.append(
                (f"h = {h}", [comparison.Curve(n, [(c["n"], values(c)[n], 0.0) for c in of_size]) for n in names])
            )
        comparison.curves(panels, "n, rows of u", path.with_stem(path.stem + suffix), label)


if __name__ == "__main__":
    main.run(benchmark, sys.argv[1:])
