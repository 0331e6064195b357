"""CPU seconds of an expert and of chains: another checkout of this repository beside this one.

    python jobs/benchmark_versions.py --before CHECKOUT --data parquet:PATH --json FILE.json

Runs `fbpc experts` and `fbpc evaluate --coreset` with the code of both, in turn, each in a process of its own on one
thread, on some images of the data. A command runs with few and with many epochs; the difference leaves its start out:

    expert   8 epochs of 1,280 images in batches of 256, eager
    chains   two, of 500 epochs of ten images and 5 predictions of 500 images each, eager

The ratio is the median over repeats of before / now within a repeat. CHECKOUT is of commit d3ba60b or later.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # where runpy runs this file
from benchmark_passes import line, summary, table
from benchmark_report import write_report

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import capture
from fbpc_ray.data import datasets
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.execution.serial import device_name

HERE = Path(__file__).parents[1]
TRAIN, TEST = 1_280, 500


@dataclass(frozen=True)
class Arguments:
    """CPU seconds of experts and chains by this checkout and by an earlier one."""

    before: str = ""
    """Folder of the other checkout."""
    data: str = "digits"
    """Data set, as `distill` takes it."""
    network: str = "convnet-in"
    """Network."""
    widths: tuple[int, ...] = (32, 128)
    """Widths, one after the other."""
    repeats: int = 3
    """Times that each pair is timed."""
    json: str = ""
    """Also write what was measured to this file, and a table (.md) beside it."""


class Case(NamedTuple):
    """A command whose epochs are timed."""

    name: str
    words: tuple[str, ...]
    flag: str
    """That of the epochs, by the name of the oldest checkout."""
    few: int
    many: int


def benchmark(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/benchmark_versions.py", about=__doc__)
    before = Path(args.before).absolute()
    if not args.before or not (before / "fbpc_ray" / "__main__.py").exists():
        raise UserError(f"--before {args.before}: must be a checkout of this repository, such as of d3ba60b")
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="fbpc-versions-") as folder:
        data, coreset = write_images(datasets.load(args.data), Path(folder))
        for width in args.widths:
            for case in cases(args.network, width, data, coreset):
                timed = [
                    (seconds(before, case, Path(folder)), seconds(HERE, case, Path(folder)))
                    for _ in range(args.repeats)
                ]
                rows.append({"name": case.name, "width": width, **summary(timed)})
                print(line(rows[-1]), flush=True)
    if args.json:
        report = {"rows": rows, "before": commit_of(before)}
        settings = {name: value for name, value in vars(args).items() if name != "before"}
        path = write_report(settings, report, capture(device_name("cpu")))
        files.write_text(path.with_suffix(".md"), table(rows, "First: the earlier checkout. Second: this one"))


def write_images(data: Dataset, folder: Path) -> tuple[Path, Path]:
    """Write some images of each split as a data set, and one image of each class as a coreset."""
    train, test = data.train, data.test
    first = [int(np.flatnonzero(train.labels[:TRAIN] == label)[0]) for label in range(len(data.classes))]
    np.savez(
        folder / "images.npz", x_train=train.images[:TRAIN], y_train=train.labels[:TRAIN],
        x_test=test.images[:TEST], y_test=test.labels[:TEST],
    )  # fmt: skip
    np.savez(folder / "coreset.npz", images=train.images[first], labels=train.labels[first])
    return folder / "images.npz", folder / "coreset.npz"


def cases(network: str, width: int, data: Path, coreset: Path) -> list[Case]:
    """Return the commands to time, with flags that d3ba60b has too."""
    common = ("--data", f"npz:{data}", "--architectures", network, "--width", str(width), "--threads", "1")
    common += ("--backend", "serial")
    experts = ("experts", *common, "--expert-count", "1", "--expert-batch-size", "256", "--expert-lr", "0.01")
    chains = ("evaluate", "--coreset", str(coreset), *common, "--eval-seeds", "1", "--chain-every", "100")
    chains += ("--compiled-chains", "off")
    return [
        Case("8 epochs of an expert", experts, "--expert-epochs", 1, 9),
        Case("500 epochs of two chains, with predictions", chains, "--chain-steps", 100, 600),
    ]


def seconds(checkout: Path, case: Case, folder: Path) -> float:
    """Return the CPU seconds of the epochs beyond the few, by the code of `checkout`. Raises UserError."""
    few, many = (_seconds(checkout, (*case.words, case.flag, str(epochs)), folder) for epochs in (case.few, case.many))
    if many <= few:
        raise UserError(f"{case.name}: too quick to be timed; give wider networks or larger images")
    return many - few


def _seconds(checkout: Path, words: Sequence[str], folder: Path) -> float:
    """Return the CPU seconds of one command, in a home of its own, so that no expert is there."""
    with tempfile.TemporaryDirectory(prefix="home-", dir=folder) as home:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "FBPC_HOME": home, "OMP_NUM_THREADS": "1"}
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "fbpc_ray", *words], cwd=checkout, env=environment, capture_output=True, text=True
        )
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{checkout.name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", code=1)
    return ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout; empty where git does not tell."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main.run(benchmark, sys.argv[1:])
