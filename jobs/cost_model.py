"""Cost of a distillation on many GPUs, by arithmetic from measured constants: the tables of docs/scaling.md.

    python jobs/cost_model.py

Measured constants come from files of benchmarks/results, which the first table names. The rate of a GPU, the price of
an hour and the number of MAP steps at 224x224 have not been measured: they are arguments, and the tables say so.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.execution.memory_estimate import count_activations, count_parameters
from fbpc_ray.models.functional import Network, Spec, specify
from fbpc_ray.models.passes import count_macs

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ACTORS, MEMORY = "scaling-actors.json", "benchmark-memory-224.json"
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Arguments:
    """Bytes, seconds and dollars of a distillation of ImageNet-100 at 224x224."""

    images: int = 126_689
    """Training images."""
    classes: int = 100
    """Classes."""
    image_size: int = 224
    """Side of the images."""
    width: int = 128
    """Width of the ConvNet."""
    ipc: int = 10
    """Images per class."""
    batch_size: int = 100
    """B."""
    steps: int = 500
    """N."""
    posterior_steps: int = 30
    """K."""
    real_batch_size: int = 256
    """Real images per step of the K steps."""
    map_steps: int = 100
    """Adam steps of a MAP solve: an assumption."""
    expert_count: int = 10
    """Experts."""
    expert_epochs: int = 50
    """Their epochs."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """Numbers of GPUs, one task each."""
    teraflops: tuple[float, ...] = (5.0, 50.0)
    """10^12 floating-point operations a second of a GPU: assumptions."""
    dollars: float = 2.5
    """Price of a GPU for an hour: an assumption."""
    network_gb: float = 1.25
    """Gigabytes a second of a node's network: an assumption (10 Gbit/s)."""


class Measured(NamedTuple):
    """Constants of the cost model, from committed result files."""

    unit_seconds: float
    """CPU seconds of the driver per task, with small images and the most actors."""
    byte_seconds: float
    """CPU seconds of the driver for a byte of a gradient, with the most actors."""
    actors: int
    core_flops: float
    """Floating-point operations a second of one CPU core in a whole step at 224x224."""
    peak_ratio: float
    """Peak memory of that step, as a share of its budget."""


class Work(NamedTuple):
    """Floating-point operations, from the layers' sizes."""

    forward: float
    """Of one image."""
    unit: float
    """Of a gradient."""
    expert: float
    """Of an expert."""


def cost_model(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/cost_model.py", about=__doc__)
    print(tables(args))


def tables(args: Arguments) -> str:
    """Format the three tables: constants, bytes, seconds and dollars."""
    spec = specify("convnet-in", (3, args.image_size, args.image_size), args.classes, args.width, 0)
    work, constants = work_of(args, spec), measured(RESULTS)
    return "\n\n".join([constant_rows(args, work, constants), byte_rows(args, spec), time_rows(args, work, constants)])


def unit_flops(forward: float, *, batch: int, real: int, map_steps: float, posterior_steps: int) -> float:
    """Count the operations of one gradient; a backward pass counts as two forward ones.

    The MAP solve and the K steps of theta_u on B images, the K steps of theta_x on real images, K forward passes of B
    images for either Psi, and Eq. 17: forward and backward of B images by two networks.
    """
    u_side = batch * (3 * map_steps + 3 * posterior_steps)
    psi, eq_17 = 2 * batch * posterior_steps, 2 * 3 * batch
    return forward * (u_side + 3 * real * posterior_steps + psi + eq_17)


def work_of(args: Arguments, spec: Spec) -> Work:
    """Count the operations of the model."""
    forward = 2.0 * count_macs(Network(spec))
    unit = unit_flops(
        forward, batch=args.batch_size, real=args.real_batch_size, map_steps=args.map_steps,
        posterior_steps=args.posterior_steps,
    )  # fmt: skip
    return Work(forward, unit, 3 * forward * args.images * args.expert_epochs)


def measured(folder: Path) -> Measured:
    """Read the constants from the committed files."""
    actors, memory = (json.loads((folder / name).read_text()) for name in (ACTORS, MEMORY))
    small, large = (rows[-1] for rows in (actors["rows"]["10x1x8x8"], actors["rows"]["100x3x32x32"]))
    unit, more = (row["cpu_seconds_a_unit"]["median"] for row in (small, large))
    size = 4 * (100 * 3 * 32 * 32 - 10 * 8 * 8)
    settings = memory["settings"]
    spec = specify(settings["network"], tuple(memory["image_shape"]), memory["classes"], settings["width"], 0)
    flops = unit_flops(
        2.0 * count_macs(Network(spec)), batch=memory["images"], real=min(256, memory["real_images"]),
        map_steps=memory["map_steps"], posterior_steps=settings["posterior_steps"],
    )  # fmt: skip
    return Measured(
        unit, max(0.0, more - unit) / size, small["actors"], flops / memory["seconds"],
        memory["peak_gb"] / memory["budget_gb"],
    )  # fmt: skip


def constant_rows(args: Arguments, work: Work, constants: Measured) -> str:
    """Format where each constant is from."""
    actors = f"measured, {constants.actors} actors: `{ACTORS}`"
    return markdown_table(
        ["constant", "value", "from"],
        [
            ["driver, a task", f"{1e3 * constants.unit_seconds:.2f} ms of CPU", actors],
            ["driver, a gradient of 100 MB", f"{1e8 * constants.byte_seconds:.2f} s of CPU", actors],
            ["a CPU core in a step at 224x224", f"{constants.core_flops / 1e9:.0f} GFLOP/s", f"measured: `{MEMORY}`"],
            ["memory of that step", f"{100 * constants.peak_ratio:.0f} % of --memory-budget", f"measured: `{MEMORY}`"],
            ["forward pass of an image", f"{work.forward / 1e9:.2f} GFLOP", "counted from the layers"],
            ["a task", f"{work.unit / 1e12:.0f} TFLOP", f"counted, with {args.map_steps} MAP steps"],
            ["an expert", f"{work.expert / 1e15:.1f} PFLOP", "counted from the layers"],
            ["MAP steps", f"{args.map_steps}", "**assumed**; 14 to 140 were measured at 32x32"],
            ["a GPU", " or ".join(f"{rate:g} TFLOP/s" for rate in args.teraflops), "**assumed**: no GPU was measured"],
            ["an hour of a GPU", f"${args.dollars:g}", "**assumed**"],
            ["a node's network", f"{args.network_gb:g} GB/s", "**assumed**"],
        ],
    )


def byte_rows(args: Arguments, spec: Spec) -> str:
    """Format the bytes of one run."""
    pixels, parameters = 3 * args.image_size**2, count_parameters(spec)
    m = args.ipc * args.classes
    return markdown_table(
        ["bytes", "how many", "where"],
        [
            ["training images, uint8", _bytes(args.images * pixels), "each node, shared by its workers"],
            ["u", _bytes(4 * m * pixels), "the driver, and each node once a step"],
            ["gradient of a task", _bytes(4 * min(args.batch_size, m) * pixels), "from each worker to the driver"],
            ["parameters", _bytes(4 * parameters), f"{parameters:,} of a ConvNet of depth {spec.depth}"],
            ["K steps of theta_x", _bytes(4 * parameters * (1 + args.posterior_steps)), "a worker"],
            ["experts", _bytes(4 * parameters * args.expert_count * (1 + args.expert_epochs)), "the store"],
            ["activations of an image", _bytes(4 * count_activations(spec)), "a pass with gradient: 1.2 to 1.9 times"],
        ],
    )


def time_rows(args: Arguments, work: Work, constants: Measured) -> str:
    """Format seconds and dollars, for each rate and number of GPUs."""
    pixels, m = 3 * args.image_size**2, args.ipc * args.classes
    rows = []
    for rate in args.teraflops:
        for gpus in args.gpus:
            nodes = -(-gpus // GPUS_OF_A_NODE)
            unit = work.unit / (1e12 * rate)
            gradient = 4 * min(args.batch_size, m) * pixels
            driver = gpus * (constants.unit_seconds + gradient * constants.byte_seconds)
            network = (nodes - 1) / nodes * gpus * gradient / (1e9 * args.network_gb)
            network += (nodes > 1) * 4 * m * pixels / (1e9 * args.network_gb)
            step = unit + max(driver, network)
            experts = args.expert_count * work.expert / (1e12 * rate * min(gpus, args.expert_count)) / 3600
            hours = args.steps * step / 3600
            rows.append([
                f"{rate:g}", str(gpus), f"{unit:.1f}", f"{driver:.1f}", f"{network:.1f}", f"{100 * unit / step:.0f} %",
                f"{hours:.1f}", f"{experts:.1f}", f"{args.dollars * gpus * (hours + experts):,.0f}",
            ])  # fmt: skip
    head = [
        "TFLOP/s",
        "GPUs",
        "task, s",
        "driver, s",
        "network, s",
        "GPUs at work",
        "steps, h",
        "experts, h",
        "dollars",
    ]
    return markdown_table(head, rows)


def _bytes(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


if __name__ == "__main__":
    main.run(cost_model, sys.argv[1:])
