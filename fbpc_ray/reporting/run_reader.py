"""Read an ended run for a report, and validate it: the files may be foreign."""

import shlex
from typing import Any, NamedTuple

from fbpc_ray.core import inputs
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.storage import Place
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import diagnostics, protocols
from fbpc_ray.evaluation.diagnostics import Mixing
from fbpc_ray.evaluation.results import MAIN_QUANTITIES, ChainScore, from_json, is_of_step
from fbpc_ray.reporting.document import is_png

NOT_NEEDED = "delete it; the report needs no such file"


class LaterEvaluation(NamedTuple):
    """An evaluation by `fbpc evaluate`, after the run."""

    name: str
    split: str
    ood: str
    scores: list[ChainScore]
    mixing: list[Mixing]
    pictures: list[tuple[str, bytes]]
    protocol: str
    """Name of the protocol of the chains; empty without chains, and in evaluations of earlier code."""
    calibrated: list[ChainScore]
    """Scores under the protocol `calibrated`, if that was asked for."""
    calibrated_flags: str
    """The settings that the validation split chose."""


class EndedRun(NamedTuple):
    """Content of the files of an ended run."""

    label: str
    """A, B, ... if the report compares several runs, else empty."""
    run: RunDirectory
    config: Config
    result: dict[str, Any]
    scores: list[ChainScore]
    coreset: Coreset
    rows: list[dict[str, Any]]
    """Rows of metrics.parquet."""
    later: list[LaterEvaluation]
    mixing: list[Mixing]
    """How well the chains have mixed; empty in runs of earlier code."""

    @property
    def method(self) -> str:
        return self.config.distillation.method

    @property
    def name(self) -> str:
        return f"{self.label}: {self.run.folder.name}" if self.label else self.run.folder.name


def read(folder: Place, label: str) -> EndedRun:
    """Read the run in `folder`. Raises UserError for no run, a run that has not ended, and a damaged file."""
    run = RunDirectory(folder)
    run.refuse_sweep()
    config = read_config(folder)
    result = run.read_result()
    if result is None and (folder / "trial.json").is_file():
        raise UserError(f"{folder} is a trial that was not evaluated on test: give the best trial of the sweep")
    words = shlex.join(["fbpc", "distill", "--out", str(folder), "--resume"])
    if result is None:
        raise UserError(f"the run in {folder} has not ended (no result.json): resume it with `{words}`")
    scores, mixing = _checked(result, str(run.result_path))
    images, step = run.read_coreset(config), coreset.metadata(run.coreset_path).get("step")
    if not is_of_step(result, step):
        steps = f"its result is of step {result['steps']}, its coreset of step {step}"
        raise UserError(f"the run in {folder} has not ended ({steps}): resume it with `{words}`")
    rows, later = run.read_metrics(NOT_NEEDED), _read_later(folder / "evaluations")
    return EndedRun(label, run, config, result, scores, images, rows, later, mixing)


def _checked(result: dict[str, Any], source: str) -> tuple[list[ChainScore], list[Mixing]]:
    """Return scores and diagnostics. Raises UserError where the report misses something that it shows."""
    try:
        for name in ("data", "split", "device", "commit"):
            if not isinstance(result[name], str):
                raise ValueError(f"{name} must be text")
        if not isinstance(result["versions"], dict) or not isinstance(result.get("map_endings", {}), dict):
            raise ValueError("versions and map_endings must be objects")
        int(result["images_scored"])
        for by_architecture in result["coresets"].values():
            if any(not set(MAIN_QUANTITIES) <= set(by_quantity) for by_quantity in by_architecture.values()):
                raise ValueError("scores are missing")
        scores = from_json(result["coresets"])
        if not scores:
            raise ValueError("scores are missing")
        mixing = diagnostics.from_json(result.get("mixing", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} is not the result of a run ({error!r:.80}): restore it") from None
    return scores, mixing


def _read_later(folder: Place) -> list[LaterEvaluation]:
    """Read the evaluations in `folder`, in the order of their numbers."""
    evaluations = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name):
        with undamaged(path, NOT_NEEDED):
            result = inputs.read_checked_json(path)
        stem = path.name.removesuffix(".json")
        beside = sorted(
            (picture for picture in folder.glob("*.png") if picture.name.startswith(f"{stem}.")), key=lambda p: p.name
        )
        pictures = [(picture.name[len(stem) + 1 : -4], image(picture)) for picture in beside]
        scores, mixing = _checked(result, str(path))
        ood = str(result.get("ood", ""))
        calibrated = _calibrated(result.get("calibrated"), str(path))
        protocol = protocols.of_result(result)
        evaluations.append(
            LaterEvaluation(path.name, result["split"], ood, scores, mixing, pictures, protocol, *calibrated)
        )
    return evaluations


def _calibrated(value: Any, source: str) -> tuple[list[ChainScore], str]:
    """Return the scores of the key `calibrated` of a result and their flags. Raises UserError."""
    if value is None:
        return [], ""
    try:
        flags = f"--chain-d {float(value['chain_d']):g} --chain-weight-decay {float(value['chain_weight_decay']):g}"
        return from_json(value["coresets"]), flags
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: 'calibrated' holds no scores ({error!r:.80}); restore it") from None


def image(path: Place) -> bytes:
    data = path.read_bytes()
    if not is_png(data):
        raise UserError(f"{path} is not a PNG: {NOT_NEEDED}")
    return data
