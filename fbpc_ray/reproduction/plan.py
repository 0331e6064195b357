"""Plan a reproduction: the cells for every seed of the distillation, and the missing coresets."""

import hashlib
import shlex
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log
from fbpc_ray.core.storage import place
from fbpc_ray.data import coreset, coreset_reader
from fbpc_ray.data.corrupted_splits import official
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.data.ood import check_resize
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.execution import validation
from fbpc_ray.execution.session import check_memory, load_data, network_specs
from fbpc_ray.reproduction.outside_coresets import OutsideCoreset, read
from fbpc_ray.reproduction.rows import cell_key, coreset_key
from fbpc_ray.reproduction.tables import TABLES, Cell, Request, cells_of

CORRUPTED = ("corruptions", "grid")
"""Kinds of tables that score corrupted images."""


class Options(NamedTuple):
    """Options of a reproduction."""

    table: str
    scale: str
    request: Request
    out: Path
    only: tuple[str, ...]
    """Parts of names 'row/column': only cells with one of them are made. Empty: all."""
    corruptions: Path | None
    cost_steps: int
    dry_run: bool
    ood: str = ""
    """A data set whose test images are out of distribution, for a grid."""
    ood_resize: bool = False
    coreset_rows: dict[str, str] = {}  # noqa: RUF012  nobody changes it
    """{row of a grid: file or folder of a coreset that others made}."""
    whitenings: dict[str, str] = {}  # noqa: RUF012
    """{row of `coreset_rows`: file of the whitening of its images}."""


class Task(NamedTuple):
    """A cell for one seed of the distillation."""

    cell: Cell
    key: str
    coreset: Path
    dataset: Dataset
    outside: OutsideCoreset | None = None


def eval_seeds(options: Options) -> range:
    """Return the numbers of a cell's rows: chains, or measured steps."""
    kind = TABLES[options.table].kind
    if kind == "cost":
        return range(options.cost_steps)
    return range(0 if kind == "picture" else options.request.scale.num_chains)


def tasks_of(options: Options, log: Log) -> list[Task]:
    """Return the chosen cells for every seed of the distillation; load data, check networks."""
    cells = cells_of(options.table, options.request)
    outside = _outside(options, cells, log)
    cells += [cell for one in outside.values() for cell in one.cells(cells[0])]
    kind = TABLES[options.table].kind
    for flag, value, kinds in (("--ood", options.ood, ("grid",)), ("--corruptions", options.corruptions, CORRUPTED)):
        if value and kind not in kinds:
            others = " or ".join(name for name, table in TABLES.items() if table.kind in kinds)
            raise UserError(f"{flag}: {options.table} has no use for it; leave it out, or choose {others}")
    check_resize(options.ood, options.ood_resize)
    names = [f"{cell.row}/{cell.column}" for cell in cells]
    if unknown := [part for part in options.only if not any(part in name for name in names)]:
        raise UserError(
            f"--only '{unknown[0]}': no such cell in {options.table}; choose from "
            f"{', '.join(shlex.quote(name) for name in names)}, or parts of these"
        )
    parts = options.only or ("",)
    chosen = [cell for cell, name in zip(cells, names, strict=True) if any(part in name for part in parts)]
    datasets: dict[str, Dataset] = {}
    digests: dict[tuple[str, str], str] = {}
    tasks = []
    for cell in chosen:
        try:
            cell = cell._replace(config=validation.validate(cell.config))
        except UserError as error:
            raise UserError(f"{cell.row}/{cell.column}: {error}; --only makes other cells alone") from None
        source = cell.config.data.data
        if source not in datasets:
            datasets[source] = load_data(cell.config, log)
            if options.corruptions:
                official(options.corruptions, datasets[source])  # raises if the folder doesn't fit the data
        dataset = datasets[source]
        network_specs(cell.config.updated(architectures=(cell.judged_on,)), dataset)
        check_memory(cell.config, dataset, network_specs(cell.config, dataset))
        if one := outside.get(cell.row):
            key = cell_key(options.table, one.folder_name, cell.column, cell.judged_on, cell.config)
            tasks.append(Task(cell, key, options.out / "coresets" / one.folder_name, dataset, one))
            continue
        hashed = _with_digest(cell.config, dataset, digests)
        for seed in range(options.request.scale.distill_seeds):
            config, hashed = cell.config.updated(seed=seed), hashed.updated(seed=seed)
            key = cell_key(options.table, cell.row, cell.column, cell.judged_on, hashed, cost=kind == "cost")
            method, ipc = config.distillation.method, config.distillation.ipc
            folder = options.out / "coresets" / f"{method}-ipc{ipc}-{coreset_key(hashed)}"
            tasks.append(Task(cell._replace(config=config), key, folder, dataset))
    return tasks


def _with_digest(config: Config, dataset: Dataset, known: dict[tuple[str, str], str]) -> Config:
    """Return `config`, for keys, with a digest of the initial coreset in place of its path.

    So a moved file changes no key, and a changed one does. `known` has digests by path and data set.
    """
    path = config.distillation.initial_coreset
    if not path:
        return config
    at = path, dataset.name
    if at not in known:
        try:  # whether it fits the data set is for the distillation to say
            loaded = coreset_reader.load(place(path), None)
        except UserError:  # it does not say its classes or its normalisation
            loaded = coreset_reader.load(place(path), dataset)
        known[at] = hashlib.sha256(coreset.dumps(loaded.coreset)).hexdigest()[:16]
    return config.updated(initial_coreset=known[at])


def _outside(options: Options, cells: list[Cell], log: Log) -> dict[str, OutsideCoreset]:
    """Read the coresets that others made, by row; `cells` are the table's own. Raises UserError."""
    if not options.coreset_rows and not options.whitenings:
        return {}
    if TABLES[options.table].kind != "grid":
        raise UserError(f"--coreset-row, --whitening: {options.table} has no such rows; use grid or grid-cifar100")
    clashes = {cell.row for cell in cells} & options.coreset_rows.keys()
    if clashes:
        raise UserError(f"--coreset-row {min(clashes)}=...: the grid has a row of this name; give another name")
    coresets, notes = read(options.coreset_rows, options.whitenings, load_data(cells[0].config, log))
    for note in notes:
        log(f"note: {note}")
    return {one.name: one for one in coresets}


def without_coreset(tasks: Iterable[Task]) -> list[Task]:
    """Return one task for each missing coreset."""
    first = {task.coreset: task for task in reversed(list(tasks))}
    return [task for path, task in reversed(first.items()) if not RunDirectory(path).coreset_path.exists()]


def by_data(tasks: Iterable[Task]) -> Iterable[tuple[Dataset, list[Task]]]:
    ordered = sorted(tasks, key=lambda task: task.dataset.name)
    for _, group in groupby(ordered, key=lambda task: task.dataset.name):
        members = list(group)
        yield members[0].dataset, members
