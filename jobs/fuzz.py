"""Damage files at random and count what their readers make of them.

    python jobs/fuzz.py --count 5000 --json benchmarks/results/fuzz.json

With --only, the report keeps the counts of the other readers; each reader's counts name the commit of its code.

Each reader gets --count files with flipped bits, cuts, and inserted, repeated and overwritten bytes. A file is refused
in one line, or gives the right value; of formats without a checksum (a user's own data) another value is counted as
changed. The exit status is 1 if a file gave a wrong value or a traceback, or took more than 10 s or 1 GB.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.fuzz import Counts, all_readers, fuzz, write_report

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core.provenance import capture
from fbpc_ray.execution.serial import device_name


@dataclass(frozen=True)
class Arguments:
    """Damage files at random and count what their readers make of them."""

    count: int = 200
    """Damaged files of each reader."""
    seed: int = 0
    """Of the damage."""
    only: tuple[str, ...] = ()
    """Only readers whose name contains one of these."""
    json: str = ""
    """Also write the counts to this file; with --only, in the place of those that it has of the same readers."""


def run(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/fuzz.py", about=__doc__)
    counts: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory(prefix="fbpc-fuzz-") as folder, warnings.catch_warnings(action="ignore"):
        for reader in all_readers(Path(folder)):
            if not args.only or any(part in reader.name for part in args.only):
                counts[reader.name] = fuzz(reader, args.count, args.seed)
                print(json.dumps({reader.name: counts[reader.name].as_json()}), flush=True)
    if args.json:
        path, provenance = Path(args.json).absolute(), capture(device_name("cpu"))._asdict()
        write_report(path, args.seed, counts, provenance, keep=bool(args.only))
    if any(count.faults for count in counts.values()):
        sys.exit(1)


if __name__ == "__main__":
    main.run(run, sys.argv[1:])
