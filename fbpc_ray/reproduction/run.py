"""Make a table or figure of the paper from scratch: experts, coresets, chains, rows, Markdown, picture.

Every part is found again by what it depends on, so the same command goes on where it stopped, and cells of different
tables share their experts and coresets.

    OUT/coresets/<key>/   a run for each distinct coreset
    OUT/rows/<table>/     a Parquet file for each (cell, seed)
    OUT/<table>.md .png   what they say, beside the paper's numbers; <table>-by-ipc.png where it has several sizes
"""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import Provenance, capture, home
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import coreset
from fbpc_ray.data.corrupted_splits import notes, official
from fbpc_ray.data.datasets import Dataset, denormalise
from fbpc_ray.distillation import loop
from fbpc_ray.evaluation import chains
from fbpc_ray.evaluation.chains import Chain
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Backend
from fbpc_ray.execution.session import Log
from fbpc_ray.models.functional import specify
from fbpc_ray.reporting import image_grids
from fbpc_ray.reproduction import tasks as work
from fbpc_ray.reproduction.render import markdown, over_ipc, picture
from fbpc_ray.reproduction.rows import Rows, cell_key, coreset_key
from fbpc_ray.reproduction.tables import TABLES, Cell, Request, cells_of


class Options(NamedTuple):
    """One call, beside the request."""

    table: str
    scale: str
    request: Request
    out: Path
    only: tuple[str, ...]
    """Parts of 'row/column' names; a cell is made where one is in its name. Empty: all."""
    corruptions: Path | None
    cost_steps: int
    dry_run: bool


class Task(NamedTuple):
    """A cell for one seed of the distillation."""

    cell: Cell
    key: str
    coreset: Path
    dataset: Dataset


def reproduce(options: Options, log: Log) -> tuple[Path, list[dict[str, Any]]]:
    """Make what is missing of a table; the path of its Markdown, and its rows in order. Raises UserError."""
    table, rows = TABLES[options.table], Rows(options.out / "rows" / options.table)
    tasks = _tasks(options, log)
    there = {(row["key"], row["eval_seed"]) for row in rows.read()}
    seeds = range(options.request.scale.num_chains)
    if table.kind == "cost":
        seeds = range(options.cost_steps)
    elif table.kind == "picture":
        seeds = range(0)
    missing = [(task, seed) for task in tasks for seed in seeds if (task.key, seed) not in there]
    log(f"{options.table}: {len(tasks)} cells, {len(missing)} of {len(tasks) * len(seeds)} rows to make")
    unmade = _unmade(tasks) if table.kind == "picture" else _unmade([task for task, _ in missing])
    if options.dry_run:
        log(f"{len(unmade) if table.kind != 'cost' else 0} coresets to distil; dry run: nothing was written")
        return options.out / f"{options.table}.md", []
    failed: dict[Path, str] = {}
    if missing or unmade:
        with session.backend(options.request.base, Interruption(), log) as workers:
            provenance = capture(workers.describe())
            if table.kind == "cost":
                _measure(options, {t.key: t for t, _ in missing}.values(), rows, workers, provenance)
            else:
                failed = _make(unmade, workers, provenance.commit, log)
                _judge(
                    options, [each for each in missing if each[0].coreset not in failed], rows, workers, provenance, log
                )
    order = {task.key: place for place, task in enumerate(tasks)}
    found = sorted((row for row in rows.read() if row["key"] in order), key=lambda row: order[row["key"]])
    kept = [task for task in tasks if task.coreset not in failed]
    path = _write(options, kept, found) if kept else None
    if failed:
        name, why = next(iter(failed.items()))
        rest = f"; {path} has the others" if path else ""
        raise UserError(f"{len(failed)} of the coresets could not be made: {name.name}: {why}{rest}", code=1)
    assert path is not None
    return path, found


def _tasks(options: Options, log: Log) -> list[Task]:
    """Every chosen cell for every seed of the distillation, its data loaded and its networks built once."""
    cells = cells_of(options.table, options.request)
    names = [f"{cell.row}/{cell.column}" for cell in cells]
    chosen = [
        cell
        for cell, name in zip(cells, names, strict=True)
        if not options.only or any(o in name for o in options.only)
    ]
    if not chosen:
        raise UserError(
            f"--only {' '.join(options.only)} fits no cell of {options.table}: choose from {', '.join(names)}"
        )
    datasets: dict[str, Dataset] = {}
    tasks = []
    for cell in chosen:
        source = cell.config.data.data
        if source not in datasets:
            datasets[source] = session.load_data(cell.config, log)
            if TABLES[options.table].kind == "corruptions" and options.corruptions:
                official(options.corruptions, datasets[source])  # said now, if it does not fit
        dataset = datasets[source]
        session.check(cell.config)
        session.specs(cell.config.updated(architectures=(cell.judged_on,)), dataset)
        session.specs(cell.config, dataset)
        for seed in range(options.request.scale.distill_seeds):
            config = cell.config.updated(seed=seed)
            key = cell_key(options.table, cell.row, cell.column, cell.judged_on, config)
            method, ipc = config.distillation.method, config.distillation.ipc
            folder = options.out / "coresets" / f"{method}-ipc{ipc}-{coreset_key(config)}"
            tasks.append(Task(cell._replace(config=config), key, folder, dataset))
    return tasks


def _unmade(tasks: Iterable[Task]) -> list[Task]:
    """One task for each coreset that is not there."""
    first = {task.coreset: task for task in reversed(list(tasks))}
    return [task for path, task in reversed(first.items()) if not work.RunDirectory(path).coreset_path.exists()]


def _by_data(tasks: Iterable[Task]) -> Iterable[tuple[Dataset, list[Task]]]:
    ordered = sorted(tasks, key=lambda task: task.dataset.name)
    for _, group in groupby(ordered, key=lambda task: task.dataset.name):
        members = list(group)
        yield members[0].dataset, members


def _make(tasks: list[Task], workers: Backend, commit: str, log: Log) -> dict[Path, str]:
    """The experts that the coresets need, then the coresets, a task each; why those failed that did, by folder."""
    failed = {}
    for dataset, group in _by_data(tasks):
        learned = [task.cell.config for task in group if task.cell.config.distillation.method != "random"]
        stores, count = {}, 0
        for config in learned:
            for spec in session.specs(config, dataset):
                store = session.store(config, dataset, spec)
                stores[store.folder] = (store, spec)
            count = max(count, config.experts.expert_count)
        if stores:
            each, specs = zip(*stores.values(), strict=True)
            loop.train_experts(each, specs, count, dataset, workers, log)
        items = [work.Making(task.cell.config, task.coreset, commit) for task in group]
        with loop.progress("distil", len(items), "coreset") as bar:
            for index, why in workers.map(work.make, dataset, items):
                bar.update()
                log(f"coreset {items[index].folder.name}" + (f" FAILED: {why}" if why else ""))
                if why:
                    failed[items[index].folder] = why
    return failed


def _judge(
    options: Options, missing: list[tuple[Task, int]], rows: Rows, workers: Backend, provenance: Provenance, log: Log
) -> None:
    """A chain for each row that is missing; a row is written as its chain ends."""
    kind = TABLES[options.table].kind
    groups: dict[str, list[tuple[Task, int]]] = {}
    for task, seed in missing:  # one evaluation, data set and augmentation share what is sent to the workers
        e, n = task.cell.config.evaluation, task.cell.config.networks
        groups.setdefault(repr((task.dataset.name, e, n.augment)), []).append((task, seed))
    with loop.progress("judge", len(missing), "chain") as bar:
        for group in groups.values():
            task, _ = group[0]
            config, dataset = task.cell.config, task.dataset
            items = [_judging(task, seed, kind, options.corruptions) for task, seed in group]
            e, augment, how = config.evaluation, config.networks.augment, config.workers.compiled_chains
            judge = chains.judge(dataset, "test", e, augment, compiled=how)
            court = work.SharedContext(
                chains.feasible(judge, [item.chain for item in items], workers.device, log), dataset
            )
            for index, findings in workers.map(work.judge, court, items):
                task, seed = group[index]
                rows.write([_row(options, task, seed, finding, provenance) for finding in findings])
                if not findings[0]:
                    log(f"warning: a chain diverged ({task.cell.row}, {task.cell.column}): its row is empty")
                bar.update()


def _judging(task: Task, seed: int, kind: str, corruptions: Path | None) -> work.Judging:
    made, cell = coreset.load(work.RunDirectory(task.coreset).coreset_path), task.cell
    n = cell.config.networks
    spec = specify(cell.judged_on, task.dataset.image_shape, len(task.dataset.classes), n.width, n.depth)
    chain = Chain(cell.row, made.images.numpy(), made.labels.numpy(), spec, seed)
    return work.Judging(chain, kind, corruptions, home() / "corruptions")


def _measure(options: Options, tasks: Iterable[Task], rows: Rows, workers: Backend, provenance: Provenance) -> None:
    """One after the other, so that no measurement disturbs another."""
    for task in tasks:
        item = work.Measuring(task.cell.config, options.cost_steps)
        for _, found in workers.map(work.cost, None, [item]):
            for number, seconds in enumerate(found.seconds):
                finding = {"peak_gb": found.peak_gb, "seconds": seconds, "parameters": float(found.parameters)}
                rows.write([_row(options, task, number, finding, provenance)])


def _row(options: Options, task: Task, seed: int, finding: work.Finding, provenance: Provenance) -> dict[str, Any]:
    made = None if TABLES[options.table].kind == "cost" else task.coreset  # a cost is that of any coreset
    return {
        "table": options.table, "key": task.key, "row": task.cell.row, "column": task.cell.column,
        "scale": options.scale, "judged_on": task.cell.judged_on, "config": json.dumps(task.cell.config.flat()),
        "commit": provenance.commit, "versions": json.dumps(provenance.versions), "device": provenance.device,
        "coreset": made and made.name, "coreset_commit": made and _commit_of(made),
        "distill_seed": task.cell.config.distillation.seed, "eval_seed": seed, **finding,
    }  # fmt: skip


def _commit_of(folder: Path) -> str | None:
    """Of the code that made a coreset, which may be older than that which judges it."""
    return coreset.metadata(work.RunDirectory(folder).coreset_path).get("commit")


def _write(options: Options, tasks: list[Task], rows: list[dict[str, Any]]) -> Path:
    configs = [task.cell.config for task in tasks]
    said = notes(options.corruptions, 0) if TABLES[options.table].kind == "corruptions" else ()
    path, image = options.out / f"{options.table}.md", options.out / f"{options.table}.png"
    sizes = image.with_name(f"{options.table}-by-ipc.png")
    images = [image.name]
    if TABLES[options.table].kind == "picture":
        task = tasks[0]
        made = coreset.load(work.RunDirectory(task.coreset).coreset_path)
        pixels = denormalise(made.images, made.mean, made.std).numpy()
        title = f"{task.cell.row}, {task.dataset.name}, {task.cell.config.distillation.ipc} a class"
        image_grids.coreset_grid(pixels, made.labels.numpy(), made.classes, image, title)
    else:
        picture(options.table, options.scale, rows, image)
        if over_ipc(options.table, options.scale, rows, sizes):
            images.append(sizes.name)
    files.write_text(path, markdown(options.table, options.scale, options.request, configs, rows, images, said))
    return path
