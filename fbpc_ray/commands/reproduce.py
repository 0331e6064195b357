"""`fbpc reproduce`: a table or figure of the paper, from its settings to its last printed line."""

import json
from pathlib import Path
from typing import Any

from fbpc_ray.commands.distill import log, says_how_to_resume
from fbpc_ray.core.config import Config, from_text, from_word
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.provenance import home
from fbpc_ray.core.storage import local_folder
from fbpc_ray.reproduction import run
from fbpc_ray.reproduction.render import cell_means
from fbpc_ray.reproduction.run import Options
from fbpc_ray.reproduction.tables import SCALES, TABLES, Request
from fbpc_ray.tracking.run_logging import mlflow_module
from fbpc_ray.tracking.uri import default_uri


def reproduce(
    table: str,
    base: Config,
    sources: dict[str, str],
    *,
    scale: str,
    ipc: tuple[int, ...],
    distill_seeds: int,
    num_chains: int,
    only: tuple[str, ...],
    override: tuple[str, ...],
    corruptions: str,
    cost_steps: int,
    out: str,
    dry_run: bool,
) -> None:
    """Make a table or figure of the paper, or what is missing of it, and print it."""
    if table not in TABLES:
        raise UserError(f"unknown table '{table}': {closest(table, list(TABLES))}")
    for name, value in (("--distill-seeds", distill_seeds), ("--num-chains", num_chains), ("--cost-steps", cost_steps)):
        if value < 0 or (value == 0 and name == "--cost-steps"):
            raise UserError(f"{name} is {value}: it must be 1 or more")
    if any(count < 1 for count in ipc):
        raise UserError(f"--ipc {' '.join(map(str, ipc))}: ask for at least 1 image a class")
    size, folder = SCALES[scale], local_folder(out, "--out").absolute()
    size = size._replace(distill_seeds=distill_seeds or size.distill_seeds, num_chains=num_chains or size.num_chains)
    options = Options(
        table, scale, Request(size, sources, ipc, _overrides(override), base), folder, only,
        Path(corruptions) if corruptions else None, cost_steps, dry_run,
    )  # fmt: skip
    with says_how_to_resume("the same command goes on"):
        path, found = run.reproduce(options, log)
    if dry_run:
        return
    if base.output.tracking and found:
        _track_table(options, path, found)
    log(f"\n{path.read_text()}\n{path}")


def _track_table(options: Options, path: Path, rows: list[dict[str, Any]]) -> None:
    """One MLflow run for the table as it stands: its cells as metrics, its Markdown, picture and rows as artifacts."""
    tracking = mlflow_module(f"everything is in {options.out}", log)
    if not tracking:
        return
    first, settings = rows[0], options.request.base
    tracker = tracking.MlflowTracker(
        default_uri(home()),
        settings.output.experiment,
        run_name=f"{options.table}-{options.scale}",
        run_id=None,
        tags={
            "table": options.table, "scale": options.scale, "commit": first["commit"], "device": first["device"],
            **{f"version.{name}": version for name, version in json.loads(first["versions"]).items()},
        },
        params={**options.request.sources, **options.request.overrides, "folder": str(options.out)},
        log=log,
    )  # fmt: skip
    tracker.log_metrics(cell_means(options.table, rows), 0)
    for file in (path, path.with_suffix(".png"), path.with_name(f"{options.table}-by-ipc.png")):
        if file.exists():
            tracker.log_artifact(file)
    for file in sorted((options.out / "rows" / options.table).glob("*.parquet")):
        tracker.log_artifact(file, "rows")
    tracker.finish("FINISHED")


def _overrides(words: tuple[str, ...]) -> dict[str, Any]:
    """FLAG=VALUE words as values of the flags' types. Raises UserError."""
    found = {}
    for word in words:
        name, text = from_word(word, "--override")
        found[name] = from_text(name, text, f"--override {word}")
    return found
