"""Hit drivers at random moments and compare what they leave with an undisturbed run.

    python jobs/kill_driver.py --kills 200 --seed 0 --json benchmarks/results/kill-driver.json

Each run distils digits with experts, chains and MLflow in folders of its own. It is hit by SIGKILL, SIGTERM, SIGINT or
SIGSTOP at a moment drawn from --seed, started again with --resume auto, hit again, and so on until an attempt ends by
itself. Leaves with 0 where every run has the coreset, the scores and the MLflow run of an undisturbed one to the bit,
and none printed a traceback; else with 1, and keeps the folders of the runs that differ.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.kills import kill_drivers

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.provenance import capture
from fbpc_ray.execution.serial import device_name


@dataclass(frozen=True)
class Arguments:
    """Hit drivers at random moments, and compare what they leave with an undisturbed run."""

    kills: int = 20
    """Hits in all."""
    seed: int = 0
    """Of what is sent, and when."""
    json: str = ""
    """Also write the counts to this file, after each run."""


def run(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/kill_driver.py", about=__doc__)
    folder = Path(tempfile.mkdtemp(prefix="fbpc-kills-"))
    provenance = capture(device_name("cpu"))._asdict()
    for report in kill_drivers(folder, args.kills, args.seed):
        print(f"{report.runs} runs, {sum(report.hits.values())} hits, {len(report.faults)} faults", flush=True)
        if args.json:
            files.write_json(Path(args.json).absolute(), {"seed": args.seed, **report.as_json(), **provenance})
    for name, value in report.as_json().items():
        print(f"{name}: {value}")
    if report.faults:
        print(f"the folders of the runs that differ are in {folder}")
        sys.exit(1)


if __name__ == "__main__":
    main.run(run, sys.argv[1:])
