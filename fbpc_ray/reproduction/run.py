"""Reproduce a table or figure of the paper: experts, coresets, chains, rows, Markdown, picture.

Every file's name has a key of what it depends on, so the same command resumes where it stopped, and cells of different
tables share their experts and coresets.

    OUT/coresets/<key>/   a run directory for each distinct coreset
    OUT/rows/<table>/     a Parquet file for each (cell, seed)
    OUT/<table>.md .png   the table beside the paper's numbers; <table>-by-ipc.png if it has several sizes; of a grid
                          <table>-seconds.png
"""

import json
from pathlib import Path
from typing import Any

from fbpc_ray.core import cores, files
from fbpc_ray.core.config import Config
from fbpc_ray.core.durations import describe_seconds
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log, progress
from fbpc_ray.core.provenance import Provenance, capture, home
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.sizes import Seconds, describe_device
from fbpc_ray.core.storage import Place
from fbpc_ray.core.tasks import TaskRunner
from fbpc_ray.data import coreset
from fbpc_ray.data.corrupted_splits import notes
from fbpc_ray.data.corruptions import PAIRS
from fbpc_ray.data.datasets import Dataset, denormalise
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.expert_training import train_missing_experts
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation.chains import Chain, arrays_of, evaluation_context, without_impossible_compilation
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.session import expert_store, load_ood, network_specs, uses_experts
from fbpc_ray.execution.sizing import local_device
from fbpc_ray.models.functional import Spec, specify
from fbpc_ray.reporting import image_grids
from fbpc_ray.reproduction import tasks as work
from fbpc_ray.reproduction.estimate import estimate
from fbpc_ray.reproduction.extras import ExtraColumns, Extras, extra_columns, extra_notes
from fbpc_ray.reproduction.outside_coresets import whitening_of
from fbpc_ray.reproduction.plan import Options, Task, by_data, eval_seeds, tasks_of, without_coreset
from fbpc_ray.reproduction.render import markdown, over_ipc, picture, picture_of_seconds, scale_of
from fbpc_ray.reproduction.rows import Rows
from fbpc_ray.reproduction.tables import TABLES


def reproduce(options: Options, log: Log) -> tuple[Path, list[dict[str, Any]]]:
    """Make the missing rows of a table; return its Markdown file and its rows. Raises UserError."""
    kind, rows = TABLES[options.table].kind, Rows(options.out / "rows" / options.table)
    tasks = tasks_of(options, log)
    seeds, columns = eval_seeds(options), _extra_columns(options, tasks[0].dataset, log)
    present = {(row["key"], row["eval_seed"]) for row in _of_these_images(options, columns, rows.read())}
    missing = [(task, seed) for task in tasks for seed in seeds if (task.key, seed) not in present]
    log(f"{options.table}: {len(tasks)} cells, {len(missing)} of {len(tasks) * len(seeds)} rows to make")
    unmade = without_coreset(tasks) if kind == "picture" else without_coreset([task for task, _ in missing])
    if options.dry_run:
        _describe(options, [task for task, _ in missing], unmade if kind != "cost" else [], log)
        return options.out / f"{options.table}.md", []
    failures = _fill(options, missing, unmade, columns, rows, log) if missing or unmade else {}
    complete = [task for task in tasks if task.coreset not in failures]
    order = {task.key: index for index, task in enumerate(tasks)}
    valid = (row for row in _of_these_images(options, columns, rows.read()) if row["key"] in order)
    ordered = sorted(valid, key=lambda row: order[row["key"]])
    path = _write(options, complete, ordered) if complete else None
    if failures:
        folder, reason = next(iter(failures.items()))
        rest = f"; {path} has the others" if path else ""
        raise UserError(f"{len(failures)} of the coresets could not be made: {folder.name}: {reason}{rest}", code=1)
    assert path is not None
    return path, ordered


def _describe(options: Options, chains: list[Task], unmade: list[Task], log: Log) -> None:
    """Log the missing coresets, and the estimated time of them and of `chains`, a task for each missing row."""
    kind, base, num_cores = TABLES[options.table].kind, options.request.base, cores.available()
    if kind != "cost" and (chains or unmade):
        device = local_device(base)
        extra_images = options.request.scale.extra_images * (2 if options.ood else 1) if kind == "grid" else 0
        at_once = num_cores if device == "cpu" and base.workers.backend == "ray" else 1
        seconds = [part / at_once for part in estimate(unmade, chains, kind, extra_images, device)]
        parts = ", ".join(
            f"{name} {describe_seconds(part)}" for name, part in zip(Seconds._fields, seconds, strict=True)
        )
        where = describe_device(device, at_once)
        log(f"time: about {describe_seconds(sum(seconds))} on {where} ({parts}), by a rough formula")
    log(f"{len(unmade)} coresets to distil; dry run: nothing was written")


def _fill(
    options: Options, missing: list[tuple[Task, int]], unmade: list[Task], columns: ExtraColumns | None, rows: Rows,
    log: Log,
) -> dict[Path, str]:  # fmt: skip
    """Make coresets and rows; return why coresets failed, by folder."""
    with open_backend(options.request.base, Interruption(), log) as workers:
        provenance = capture(workers.describe())
        if TABLES[options.table].kind == "cost":
            cells = list({task.key: task for task, _ in missing}.values())
            _measure(options, cells, rows, workers, provenance, log)
            return {}
        failures = _make_coresets(unmade, workers, provenance.commit, log)
        possible = [(task, seed) for task, seed in missing if task.coreset not in failures]
        _evaluate(options, possible, columns, rows, workers, provenance, log)
        return failures


def _extra_columns(options: Options, dataset: Dataset, log: Log) -> ExtraColumns | None:
    """Describe the columns that a grid has beside the scores; None for other tables."""
    if TABLES[options.table].kind != "grid":
        return None
    base = options.request.base
    other = load_ood(base, options.ood, dataset, options.ood_resize, log) if options.ood else None
    return extra_columns(dataset, other, options.ood_resize, options.corruptions, options.request.scale.extra_images)


def _of_these_images(
    options: Options, columns: ExtraColumns | None, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows that were scored on the images that `options` name; rows of earlier code don't say theirs."""
    if columns:
        return [row for row in rows if columns.describes(row)]
    own = _described(options, columns)
    return [row for row in rows if all(row[name] in (None, value) for name, value in own.items())]


def _described(options: Options, columns: ExtraColumns | None) -> dict[str, Any]:
    """Describe the images other than the test split that rows are scored on, as columns of a row."""
    if columns:
        return columns.row()
    corrupted = TABLES[options.table].kind == "corruptions"
    return {"corruptions": notes(options.corruptions, 0)[0]} if corrupted else {}


def _make_coresets(tasks: list[Task], workers: TaskRunner, commit: str, log: Log) -> dict[Path, str]:
    """Train missing experts, then distil each coreset; return why coresets failed, by folder."""
    failures = {}
    for task in tasks:
        if task.outside:
            task.outside.copy_to(task.coreset)
    for dataset, group in by_data(task for task in tasks if not task.outside):
        _train_experts([task.cell.config for task in group], dataset, workers, log)
        items = [work.CoresetTask(task.cell.config, task.coreset, commit) for task in group]
        with progress("distil", len(items), "coreset", log=log) as bar:
            for index, reason in workers.map(work.make_coreset, dataset, items):
                bar.update()
                log(f"coreset {items[index].folder.name}" + (f" FAILED: {reason}" if reason else ""))
                if reason:
                    failures[items[index].folder] = reason
    return failures


def _train_experts(configs: list[Config], dataset: Dataset, workers: TaskRunner, log: Log) -> None:
    """Train the missing experts of all configurations, each store once."""
    stores: dict[Place, tuple[ExpertStore, Spec]] = {}
    count = 0
    for config in configs:
        if uses_experts(config):
            for spec in network_specs(config, dataset):
                store = expert_store(config, dataset, spec)
                stores[store.folder] = (store, spec)
            count = max(count, config.experts.expert_count)
    if stores:
        all_stores, specs = zip(*stores.values(), strict=True)
        train_missing_experts(all_stores, specs, count, dataset, workers, log)


def _evaluate(
    options: Options, missing: list[tuple[Task, int]], columns: ExtraColumns | None, rows: Rows, workers: TaskRunner,
    provenance: Provenance, log: Log,
) -> None:  # fmt: skip
    """Run a chain for each missing row; write a row as its chain ends."""
    extras = columns.images() if columns and missing else Extras()
    described = _described(options, columns)
    groups: dict[str, list[tuple[Task, int]]] = {}
    for task, seed in missing:  # chains of one evaluation, data set and augmentation share what travels to the workers
        config = task.cell.config
        own = task.coreset.name if task.outside else ""  # its images have a normalisation of their own
        shared_by = repr((task.dataset.name, config.evaluation, config.networks.augment, own))
        groups.setdefault(shared_by, []).append((task, seed))
    with progress("evaluate", len(missing), "chain", log=log) as bar:
        for group in groups.values():
            shared, items = _shared_context(options, group, workers.device, log)
            shared = shared._replace(extras=extras)
            for index, findings in workers.map(work.run_row_task, shared, items):
                task, seed = group[index]
                rows.write([_row(options, task, seed, described | finding, provenance) for finding in findings])
                if not findings[0].keys() - {"column"}:
                    log(f"warning: a chain diverged ({task.cell.row}, {task.cell.column}): its row is empty")
                bar.update()


def _shared_context(
    options: Options, group: list[tuple[Task, int]], device: str, log: Log
) -> tuple[work.SharedContext, list[work.RowTask]]:
    """Return what the chains of a group share, coresets included, and a task for each of its rows."""
    task, _ = group[0]
    config, dataset = task.cell.config, task.dataset
    coresets = {}
    for folder in {task.coreset for task, _ in group}:
        pseudocoreset = coreset.load(RunDirectory(folder).coreset_path)
        coresets[folder.name] = arrays_of(pseudocoreset)
        if task.outside:
            dataset = dataset._replace(mean=pseudocoreset.mean, std=pseudocoreset.std)
    context = evaluation_context(
        dataset,
        "test",
        config.evaluation,
        config.networks.augment,
        coresets,
        compiled=config.workers.compiled_chains,
        chunk_images=config.networks.chunk_images,
    )
    kind = TABLES[options.table].kind
    more = len(PAIRS) * len(dataset.test.labels) if kind == "corruptions" else 0
    context = context._replace(whitening=whitening_of(task.coreset, dataset.image_shape), more_images=more)
    items = [_row_task(task, seed, kind, options.corruptions) for task, seed in group]
    context = without_impossible_compilation(context, [item.chain for item in items], device, log)
    return work.SharedContext(context, dataset), items


def _row_task(task: Task, seed: int, kind: str, corruptions: Path | None) -> work.RowTask:
    cell, n = task.cell, task.cell.config.networks
    spec = specify(cell.judged_on, task.dataset.image_shape, len(task.dataset.classes), n.width, n.depth)
    return work.RowTask(Chain(task.coreset.name, spec, seed), kind, corruptions, home() / "corruptions")


def _measure(
    options: Options, tasks: list[Task], rows: Rows, workers: TaskRunner, provenance: Provenance, log: Log
) -> None:
    """Measure one cell after the other, so that no measurement disturbs another."""
    with progress("measure", len(tasks), "cell", log=log) as bar:
        for task in tasks:
            item = work.CostTask(task.cell.config, options.cost_steps)
            for _, cost in workers.map(work.run_cost_task, None, [item]):
                for number, seconds in enumerate(cost.seconds):
                    finding = {"peak_gb": cost.peak_gb, "seconds": seconds, "parameters": float(cost.parameters)}
                    rows.write([_row(options, task, number, finding, provenance)])
            bar.update()


def _row(options: Options, task: Task, seed: int, finding: work.Finding, provenance: Provenance) -> dict[str, Any]:
    folder = None if TABLES[options.table].kind == "cost" else task.coreset  # a cost doesn't depend on the images
    facts = coreset.metadata(RunDirectory(folder).coreset_path) if folder else {}
    return {
        "table": options.table, "key": task.key, "row": task.cell.row, "column": task.cell.column,
        "scale": options.scale, "judged_on": task.cell.judged_on, "config": json.dumps(task.cell.config.flat()),
        "commit": provenance.commit, "versions": json.dumps(provenance.versions), "device": provenance.device,
        "coreset": folder and folder.name, "coreset_commit": facts.get("commit"),
        "make_seconds": float(facts["cpu_seconds"]) if "cpu_seconds" in facts else None,
        "distill_seed": task.cell.config.distillation.seed, "eval_seed": seed, **finding,
    }  # fmt: skip


def _write(options: Options, tasks: list[Task], rows: list[dict[str, Any]]) -> Path:
    """Write the table as Markdown, and its pictures; return the path of the Markdown."""
    configs = [task.cell.config for task in tasks]
    kind = TABLES[options.table].kind
    footnotes = notes(options.corruptions, 0) if kind == "corruptions" else ()
    if kind == "grid":
        footnotes = extra_notes(rows)
    path, image = options.out / f"{options.table}.md", options.out / f"{options.table}.png"
    sizes = image.with_name(f"{options.table}-by-ipc.png")
    images = [image.name]
    if TABLES[options.table].kind == "picture":
        task = tasks[0]
        pseudocoreset = coreset.load(RunDirectory(task.coreset).coreset_path)
        pixels = denormalise(pseudocoreset.images, pseudocoreset.mean, pseudocoreset.std).numpy()
        title = f"{task.cell.row}, {task.dataset.name}, {task.cell.config.distillation.ipc} per class"
        image_grids.coreset_grid(pixels, pseudocoreset.labels.numpy(), pseudocoreset.classes, image, title)
    else:
        scale = scale_of(options.scale, options.request)
        if not picture(options.table, scale, rows, image):
            images.remove(image.name)
        if over_ipc(options.table, scale, rows, sizes):
            images.append(sizes.name)
        seconds = image.with_name(f"{options.table}-seconds.png")
        if kind == "grid" and picture_of_seconds(options.table, scale, rows, seconds):
            images.append(seconds.name)
    files.write_text(path, markdown(options.table, options.scale, options.request, configs, rows, images, footnotes))
    return path
