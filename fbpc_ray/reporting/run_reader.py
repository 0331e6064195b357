"""An ended run as its files tell of it, for a report. They may be somebody else's: what is shown is checked here."""

import json
import shlex
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fbpc_ray.core import storage
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.storage import Place
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation.results import MAIN_QUANTITIES, OOD_QUANTITIES, finite, is_of_step
from fbpc_ray.reporting.document import is_png

SHOWN = MAIN_QUANTITIES | {
    name: quantity._replace(label=f"AUROC {quantity.label}") for name, quantity in OOD_QUANTITIES.items()
}
"""Quantity -> its name, the factor to its unit, digits of a mean."""

Values = list[float | None]
"""One a seed; None where the chain diverged."""
Scores = dict[str, dict[str, dict[str, Values]]]
"""{coreset: {architecture: {quantity: values}}}."""


class LaterEvaluation(NamedTuple):
    """What `fbpc evaluate` found after the run."""

    name: str
    split: str
    ood: str
    scores: Scores
    pictures: list[tuple[str, bytes]]


class EndedRun(NamedTuple):
    """A run as its files tell of it."""

    label: str
    """A, B, ... of several; empty for one alone."""
    run: RunDirectory
    config: Config
    result: dict[str, Any]
    scores: Scores
    coreset: Coreset
    rows: list[dict[str, Any]]
    """Of metrics.parquet."""
    later: list[LaterEvaluation]

    @property
    def method(self) -> str:
        return self.config.distillation.method

    @property
    def name(self) -> str:
        return f"{self.label}: {self.run.folder.name}" if self.label else self.run.folder.name


def read(folder: Place, label: str) -> EndedRun:
    """The run in `folder`. Raises UserError where there is none, where it has not ended, and for a damaged file."""
    if (folder / "sweep.json").is_file():
        raise UserError(f"{folder} is a sweep: give its best trial, {folder}/trials/NUMBER (trials.md lists them)")
    run, config = RunDirectory(folder), read_config(folder)
    result = run.read_result()
    if result is None and (folder / "trial.json").is_file():
        raise UserError(f"{folder} is a trial that was not judged on the test split: give the best one of its sweep")
    words = shlex.join(["fbpc", "distill", "--out", str(folder), "--resume"])
    if result is None:
        raise UserError(f"the run in {folder} has not ended (no result.json): go on with it by `{words}`")
    scores = _checked(result, str(run.result_path))
    its, step = coreset.load(run.coreset_path), coreset.metadata(run.coreset_path).get("step")
    if not is_of_step(result, step):
        why = f"its result is of step {result['steps']}, its coreset of step {step}"
        raise UserError(f"the run in {folder} has not ended ({why}): go on with it by `{words}`")
    return EndedRun(
        label, run, config, result, scores, its, _rows(run.metrics_path), _read_later(folder / "evaluations")
    )


def _checked(result: dict[str, Any], source: str) -> Scores:
    """The scores of a result. Raises UserError where they, or what is shown of the rest, aren't there."""
    try:
        for name in ("data", "split", "device", "commit"):
            if not isinstance(result[name], str):
                raise ValueError(f"{name} is no text")
        if not isinstance(result["versions"], dict) or not isinstance(result.get("map_endings", {}), dict):
            raise ValueError("versions and map_endings must be objects")
        int(result["images_scored"])
        scores = {
            str(name): {
                str(architecture): {quantity: [finite(v) for v in s[quantity]] for quantity in SHOWN if quantity in s}
                for architecture, s in by_architecture.items()
            }
            for name, by_architecture in result["coresets"].items()
        }
        every = [s for by_architecture in scores.values() for s in by_architecture.values()]
        if not every or not all(set(MAIN_QUANTITIES) <= set(s) for s in every):
            raise ValueError("scores are missing")
        if any(len({len(values) for values in s.values()}) != 1 or not s["accuracy"] for s in every):
            raise ValueError("not one value for each seed")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} is not the result of a run ({error!r:.80}): restore it") from None
    return scores


def _read_later(folder: Place) -> list[LaterEvaluation]:
    """The evaluations in `folder`, by their numbers."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name):
        with undamaged(path, "delete it, and the report goes without"):
            result = json.loads(path.read_bytes())
        stem = path.name.removesuffix(".json")
        beside = sorted(
            (each for each in folder.glob("*.png") if each.name.startswith(f"{stem}.")), key=lambda p: p.name
        )
        pictures = [(each.name[len(stem) + 1 : -4], image(each)) for each in beside]
        scores = _checked(result, str(path))
        found.append(LaterEvaluation(path.name, result["split"], str(result.get("ood", "")), scores, pictures))
    return found


def image(path: Place) -> bytes:
    data = path.read_bytes()
    if not is_png(data):
        raise UserError(f"{path} is no PNG: delete it, and the report goes without")
    return data


def _rows(path: Place) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        with storage.local(path) as near:
            rows = pq.read_table(near).to_pylist()
        return [{**row, "step": int(row["step"]), "architecture": str(row["architecture"])} for row in rows]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason"])[0][:80]
        raise UserError(f"{path} is damaged ({reason}): delete it, and the report goes without") from None
