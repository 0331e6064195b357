"""Rows of a reproduction as Parquet: one for each (cell, seed), with everything it depends on."""

import hashlib
import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core import files
from fbpc_ray.core.config import ELSEWHERE, OLD_NAMES, Config, Distillation, Evaluation, original_names
from fbpc_ray.core.errors import UserError, reason_of
from fbpc_ray.core.settings import Workers
from fbpc_ray.core.storage import Place
from fbpc_ray.distillation import network_pool

QUANTITIES = (
    "accuracy", "nll", "ece", "brier", "batch_nll", "mean_sample_nll", "degradation",
    "peak_gb", "seconds", "parameters", "logit", "ood_auroc_entropy", "ood_auroc_mutual_information",
    "corruption_accuracy", "make_seconds", "judge_seconds",
)  # fmt: skip
_TEXT = (
    "table",
    "key",
    "row",
    "column",
    "scale",
    "judged_on",
    "config",
    "commit",
    "versions",
    "device",
    "coreset",
    "coreset_commit",
    "ood",
    "corruptions",
)
SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXT]
    + [(name, pa.int64()) for name in ("distill_seed", "eval_seed")]
    + [(name, pa.float64()) for name in QUANTITIES]
)
"""Columns of a row; null is a quantity that the cell doesn't have, or that diverged. Accuracies are in 0..1."""

_ELSEWHERE = ELSEWHERE | {"num_chains"}
_OF_POOL = {"map_init", "warm_pool_size", "warm_pool_uses"}
_OF_VBPC = {
    "image_lr", "label_lr", "lr_decay", "label_scale", "ridge", "prior_precision", "kl_weight", "mirror", "pool_size",
    "pool_steps", "pool_lr",
}  # fmt: skip
_OF_LABELS = {"label_lr", "lr_decay"}
_OF_NETWORKS = {
    "inference", "net_steps", "net_lr", "net_label_scale", "net_mirror", "net_ridge", "net_precision", "ensemble_size",
}  # fmt: skip
_OF_BATCHES = {"chain_batch_size", "chain_full_batch"}
_OF_CHAINS = {name for name in (f.name for f in fields(Evaluation)) if name.startswith("chain_")} - _OF_BATCHES
_JUDGED = {f.name for f in fields(Evaluation)}
_EXPERTS = {"width", "depth", "architectures", "precision"}


def coreset_key(config: Config) -> str:
    """Hash everything that a coreset depends on: cells of any table with equal keys share the coreset."""
    flat = _settings(config)
    left_out = _ELSEWHERE | _JUDGED
    if flat["method"] == "random":  # real images: they depend on data, ipc and seed alone
        left_out |= {f.name for f in fields(Distillation)} - {"method", "ipc", "seed"}
        left_out |= _EXPERTS | {name for name in flat if name.startswith("expert_")} | {"augment"}
    return _digest({name: value for name, value in flat.items() if name not in left_out})


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that keys hash: flags of later versions only where used, so that earlier keys stay valid."""
    flat = config.flat()
    later = (
        (_OF_POOL, flat["map_init"] == "warm"),
        (_OF_VBPC - _OF_LABELS, flat["method"] in network_pool.METHODS),
        (_OF_LABELS, flat["method"] in network_pool.METHODS or flat["learn_labels"]),
        ({"learn_labels", "label_confidence"}, flat["learn_labels"]),
        (_OF_NETWORKS, flat["inference"] != "sghmc"),
        (_OF_CHAINS, flat["inference"] == "sghmc"),
        *(({name}, flat["inference"] == "sghmc" or flat[name] != getattr(Evaluation, name)) for name in _OF_BATCHES),
        ({"net_target_scale"}, flat["inference"] != "sghmc" and flat["net_target_scale"] != 1),
        ({"chain_init"}, flat["chain_init"] != 0),
        ({"label_column"}, flat["label_column"] != ""),
        ({"image_column"}, flat["image_column"] != ""),
        ({"image_size", "resize"}, flat["image_size"] != 0),
        ({"test"}, flat["test"] != 0),
        ({"initial_coreset"}, flat["initial_coreset"] != ""),
        ({"views"}, flat["views"] != 0),
        ({"gamma_window"}, flat["gamma_window"] != 1),
        ({"alpha_decay"}, flat["alpha_decay"] != 0),
        ({"image_average"}, flat["image_average"] != 0),
        ({"precision"}, flat["precision"] != "fp32"),
        ({"memory_budget"}, flat["memory_budget"] != ""),
        ({"chunk_images"}, flat["chunk_images"] != 0),
        ({"rkl_estimator"}, flat["rkl_estimator"] != "scaled"),
    )
    unused = {name for names, used in later if not used for name in names}
    return {name: value for name, value in flat.items() if name not in unused}


_OF_COSTS = ("device", "threads", "compiled")
"""Settings of the machine on which the seconds and the memory of a step depend."""


def cell_key(table: str, row: str, column: str, judged_on: str, config: Config, *, cost: bool = False) -> str:
    """Hash everything that a cell's numbers depend on, except the seed of the evaluation.

    Args:
        cost: whether the cell is measured seconds and memory.
    """
    settings = {name: value for name, value in _settings(config).items() if name not in _ELSEWHERE}
    if config.evaluation.inference != "sghmc":
        settings["judged_by"] = 2  # rows without it hold the scores of SGHMC
    if cost:
        values, usual = config.flat(), asdict(Workers())
        settings |= {name: values[name] for name in _OF_COSTS if values[name] != usual[name]}
    return _digest({"table": table, "row": row, "column": column, "judged_on": judged_on, **settings})


def _digest(values: dict[str, Any]) -> str:
    """Hash `values` under the flags' original names, so that a rename changes no key."""
    return hashlib.sha256(json.dumps(original_names(values), sort_keys=True).encode()).hexdigest()[:16]


class Rows:
    """Rows in a folder, a file for each chain or measurement, so that a crash loses no finished one."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of one cell and evaluation seed, all or none."""
        write_rows(self.folder / f"{rows[0]['key']}-{rows[0]['eval_seed']}.parquet", rows)

    def read(self) -> list[dict[str, Any]]:
        """Read all rows, in no order. Raises UserError for a damaged or foreign file."""
        rows = []
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                file_rows = _read(path).to_pylist()
                if any(row["key"] is None for row in file_rows):
                    raise ValueError("it has no rows of a table")
                rows += file_rows
            except (pa.ArrowException, OSError, ValueError) as error:
                raise UserError(
                    f"{path} cannot be read ({reason_of(error)}): delete it, and run again to compute its cell"
                ) from None
        return rows


def write_rows(path: Place, rows: list[dict[str, Any]]) -> None:
    """Write rows to one Parquet file, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
    files.write_bytes(path, buffer.getvalue())


def _read(path: Path) -> pa.Table:
    """Read the rows of one file under the present names. Raises pa.ArrowException or OSError."""
    old = {OLD_NAMES[name]: name for name in SCHEMA.names if name in OLD_NAMES}
    names = {old.get(name, name): name for name in pq.read_schema(path).names}
    schema = pa.schema([field.with_name(names.get(field.name, field.name)) for field in SCHEMA])
    return pq.read_table(path, schema=schema).rename_columns(SCHEMA.names)
