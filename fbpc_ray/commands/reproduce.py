"""`fbpc reproduce`: make a table or figure of the paper, print it, and log it to MLflow."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fbpc_ray.commands.arguments import ReproduceArguments
from fbpc_ray.commands.parsing import flags_of
from fbpc_ray.core.argument_names import with_overrides
from fbpc_ray.core.config import Config, from_text, from_word
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.progress import log, resume_hint
from fbpc_ray.core.provenance import home
from fbpc_ray.core.storage import local_folder
from fbpc_ray.reproduction import run
from fbpc_ray.reproduction.outside_coresets import parse
from fbpc_ray.reproduction.plan import Options
from fbpc_ray.reproduction.render import cell_means
from fbpc_ray.reproduction.tables import SCALES, TABLES, Request, set_by_table
from fbpc_ray.tracking.run_logging import mlflow_module
from fbpc_ray.tracking.uri import default_uri


def reproduce(args: ReproduceArguments) -> None:
    """Make the missing rows of a table or figure of the paper, and print it."""
    if args.table not in TABLES:
        raise UserError(f"unknown table '{args.table}': {closest(args.table, list(TABLES))}")
    try:
        _reproduce(args)
    except UserError as error:
        raise UserError(_in_own_flags(str(error), args.table), error.code) from error.__cause__


def _in_own_flags(message: str, table: str) -> str:
    """Replace the flags that `reproduce` lacks, which its settings have elsewhere."""
    fixed = {name: name for name in set_by_table(table)} | {"data": "--cifar10, --cifar100 or --tiny-imagenet"}
    return with_overrides(message, flags_of(ReproduceArguments), fixed)


def _reproduce(args: ReproduceArguments) -> None:
    if args.num_chains < 0:
        raise UserError(f"--num-chains: must be 0 or more, got {args.num_chains}")
    if any(count < 1 for count in args.ipc):
        raise UserError(f"--ipc: must be 1 or more, got {' '.join(map(str, args.ipc))}")
    overrides = _overrides(args.override)
    machines = {name: overrides[name] for name in asdict(args.workers).keys() & overrides.keys()}
    base = Config(workers=args.workers).updated(
        data_root=args.data_root, download=args.download and not args.dry_run, experts=args.experts,
        tracking=args.tracking, experiment=args.experiment, **machines,
    )  # fmt: skip
    sources = {"cifar10": args.cifar10, "cifar100": args.cifar100, "tiny-imagenet": args.tiny_imagenet}
    scale, folder = SCALES[args.scale], local_folder(args.out, "--out").absolute()
    scale = scale._replace(
        distill_seeds=args.distill_seeds or scale.distill_seeds, num_chains=args.num_chains or scale.num_chains
    )
    options = Options(
        args.table, args.scale, Request(scale, sources, args.ipc, overrides, base), folder, args.only,
        Path(args.corruptions) if args.corruptions else None, args.cost_steps, args.dry_run,
        args.ood, args.ood_resize, parse(args.coreset_row, "--coreset-row"), parse(args.whitening, "--whitening"),
    )  # fmt: skip
    with resume_hint("run the same command again to continue"):
        path, rows = run.reproduce(options, lambda line: log(_in_own_flags(line, args.table)))
    if args.dry_run:
        return
    if args.tracking and rows:
        _track_table(options, path, rows)
    log(f"\n{path.read_text()}\n{path}")


def _track_table(options: Options, path: Path, rows: list[dict[str, Any]]) -> None:
    """Log the table to MLflow as a run: its cells as metrics; its Markdown, picture and rows as artifacts."""
    tracking = mlflow_module(f"everything is in {options.out}", log)
    if not tracking:
        return
    first, settings, request = rows[0], options.request.base, options.request
    sizes = {"ipc": request.ipc, "only": options.only}
    counts = {"distill_seeds": request.scale.distill_seeds, "num_chains": request.scale.num_chains}
    tracker = tracking.MlflowTracker(
        default_uri(home()),
        settings.output.experiment,
        run_name=f"{options.table}-{options.scale}",
        run_id=None,
        tags={
            "table": options.table, "scale": options.scale, "commit": first["commit"], "device": first["device"],
            **{f"version.{name}": version for name, version in json.loads(first["versions"]).items()},
        },
        params={
            **request.sources, **counts, **request.overrides, "folder": str(options.out),
            **{name: " ".join(map(str, values)) for name, values in sizes.items() if values},
        },
        log=log,
    )  # fmt: skip
    tracker.log_metrics(cell_means(options.table, rows), 0)
    more = (path.with_name(f"{options.table}-{kind}.png") for kind in ("by-ipc", "seconds"))
    for file in (path, path.with_suffix(".png"), *more):
        if file.exists():
            tracker.log_artifact(file)
    for file in sorted((options.out / "rows" / options.table).glob("*.parquet")):
        tracker.log_artifact(file, "rows")
    tracker.finish("FINISHED")


def _overrides(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse FLAG=VALUE words into {flag: value}. Raises UserError."""
    pairs = [(word, *from_word(word, "--override")) for word in words]
    return {name: from_text(name, text, f"--override {word}") for word, name, text in pairs}
