"""Kill runs at random moments, resume them, and compare what they leave with an undisturbed run.

    python jobs/kill_runs.py --target driver --kills 200 --json benchmarks/results/kill-driver.json
    python jobs/kill_runs.py --target ray --kills 50 --json benchmarks/results/kill-ray.json

Each run distils digits with experts, chains and MLflow in folders of its own. At a moment drawn from --seed, its
driver gets SIGKILL, SIGTERM, SIGINT or SIGSTOP, or a worker, the node manager or the head of its own Ray cluster is
killed. The job starts it again with --resume auto, hits it again, and so on until an attempt ends by itself. The exit
status is 0 if every run has the coreset, the scores and the MLflow run of an undisturbed one to the bit, none printed a
traceback, and no process is left; else 1, and the folders of the runs that differ stay.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.kills import Report, hit_driver, hit_ray, hit_runs

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.provenance import capture
from fbpc_ray.execution.serial import device_name


@dataclass(frozen=True)
class Arguments:
    """Kill runs at random moments, resume them, and compare what they leave with an undisturbed run."""

    target: Literal["driver", "ray"] = "driver"
    """What is hit: the driver of a run without Ray, or the processes of a run's own Ray cluster."""
    kills: int = 20
    """Hits in all."""
    seed: int = 0
    """Of what is sent, and when."""
    json: str = ""
    """Also write the counts to this file, after each run."""


def run(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/kill_runs.py", about=__doc__)
    folder = Path(tempfile.mkdtemp(prefix="fk", dir="/tmp"))
    provenance = capture(device_name("cpu"))._asdict()
    report = Report()
    on_ray = {"backend": "ray", "address": "local", "device": "cpu"} if args.target == "ray" else {}
    for report in hit_runs(folder, args.kills, args.seed, hit_ray if on_ray else hit_driver, **on_ray):
        print(f"{report.runs} runs, {sum(report.hits.values())} hits, {len(report.faults)} faults", flush=True)
        if args.json:
            files.write_json(
                Path(args.json).absolute(), {"target": args.target, "seed": args.seed, **report.as_json(), **provenance}
            )
    for name, value in report.as_json().items():
        print(f"{name}: {value}")
    if report.faults:
        print(f"the folders of the runs that differ are in {folder}")
        sys.exit(1)


if __name__ == "__main__":
    main.run(run, sys.argv[1:])
