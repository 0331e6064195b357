"""Print the scores of rows that `fbpc reproduce` made, and their differences paired by seed: tables of docs/results.md.

    python jobs/compare_rows.py benchmarks/results/table1-ipc10 --baseline FBPC

A folder holds Parquet files of rows, such as OUT/rows/table1 of a reproduction. Rows of several folders are printed
together; FOLDER=NAME gives those of a folder another name, so that runs of one method with other settings are told
apart. --write keeps all rows in one file, without the folders of the machine that made them.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import without_folders
from fbpc_ray.core.storage import place
from fbpc_ray.reproduction.render import score_tables
from fbpc_ray.reproduction.rows import Rows, write_rows
from fbpc_ray.reproduction.summaries import SHOWN
from fbpc_ray.reproduction.tables import positions

SCORES = ("accuracy", "nll", "ece", "brier")


@dataclass(frozen=True)
class Arguments:
    """Tables of rows."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of rows; FOLDER=NAME renames their rows."""
    baseline: str = ""
    """Row to subtract from the others."""
    quantities: tuple[str, ...] = SCORES
    """Columns of the rows."""
    write: str = ""
    """Parquet file that gets all rows."""


def compare(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/compare_rows.py", about=__doc__)
    if unknown := set(args.quantities) - SHOWN.keys():
        raise UserError(f"--quantities {min(unknown)}: choose from {', '.join(SHOWN)}")
    rows = [row for word in args.folders for row in rows_of(word)]
    names = list(dict.fromkeys(row["row"] for row in rows))
    if args.baseline and args.baseline not in names:
        raise UserError(f"--baseline {args.baseline}: choose from {', '.join(names)}")
    print("\n".join(score_tables(rows, args.quantities, baseline=args.baseline)))
    if args.write:
        write_rows(place(args.write), [without_paths(row) for row in rows])


def rows_of(word: str) -> list[dict[str, Any]]:
    """Read the rows of FOLDER or FOLDER=NAME in the order of their table. Raises UserError where there are none."""
    folder, _, name = word.partition("=")
    rows = Rows(Path(folder)).read()
    if not rows:
        raise UserError(f"{folder}: holds no Parquet files of rows; give OUT/rows/TABLE of a reproduction")
    orders = {table: positions(table) for table in {row["table"] for row in rows}}
    rows.sort(key=lambda row: orders[row["table"]].get((row["row"], row["column"]), len(orders[row["table"]])))
    return [row | {"row": name} if name else row for row in rows]


def without_paths(row: dict[str, Any]) -> dict[str, Any]:
    """Replace the paths in a row's settings by their last part."""
    settings = json.loads(row["config"])
    paths = ("experts", "data_root", "out", "initial_coreset")
    changes = {name: Path(settings[name]).name for name in paths if settings.get(name)}
    changes["data"] = without_folders(settings["data"])
    return row | {"config": json.dumps(settings | changes)}


if __name__ == "__main__":
    main.run(compare, sys.argv[1:])
