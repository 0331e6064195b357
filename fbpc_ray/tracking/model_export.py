"""Save posterior samples as an MLflow model, which any of MLflow's tools load and serve."""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fbpc_ray.core import files
from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import Provenance, without_folders
from fbpc_ray.core.storage import local_folder
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.expert_store import slug
from fbpc_ray.evaluation import ensemble, last_layer
from fbpc_ray.evaluation.chains import flags_to_lower
from fbpc_ray.evaluation.ensemble import Ensemble
from fbpc_ray.evaluation.evaluate import EvaluationResult
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.models import custom
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.tracking.uri import serve_command

REQUIRED = ("mlflow", "numpy", "pandas", "pillow", "pyarrow", "safetensors", "torch")
"""What the model needs where it is loaded, beside the code that it brings."""
SCRIPT = Path(__file__).with_name("pyfunc_model.py")


def target(path: str) -> Path:
    """Return the folder of a model to write. Raises UserError where it exists or MLflow is missing."""
    folder = local_folder(path, "--save-model").absolute()
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already: choose another folder for the model")
    files.check_folder(folder.parent)
    _mlflow_model()
    return folder


def optional_target(path: str, specs: Sequence[Spec]) -> Path | None:
    """Return the folder of --save-model, None where it isn't given. Raises UserError for several networks."""
    if path and len(specs) > 1:
        raise UserError("--save-model keeps the samples of one network: name it with --architectures")
    return target(path) if path else None


def ensemble_of(
    verdict: EvaluationResult, pseudocoreset: Coreset, name: str, spec: Spec, settings: Evaluation
) -> Ensemble:
    """Return what an evaluation kept of the coreset called `name`. Raises UserError for a chain that diverged."""
    samples = verdict.samples.get((name, spec.architecture))
    if samples is None:
        flags = flags_to_lower(settings, len(pseudocoreset.labels))
        raise UserError(f"no model was saved: the chain of seed 0 diverged; lower {flags}", code=1)
    if settings.inference == "sghmc":
        return ensemble.gathered(Network(spec), samples, pseudocoreset)
    return last_layer.gathered(Network(spec), samples, pseudocoreset, settings)


def facts(config: Config, split: str, score: ChainScore, provenance: Provenance) -> dict[str, Any]:
    """Return a model's metadata: what it was sampled on, and the scores of its chain on `split`."""
    return {
        "data": without_folders(config.data.data), "method": config.distillation.method,
        "ipc": config.distillation.ipc, "inference": config.evaluation.inference, "seed": 0,
        "split": split, "commit": provenance.commit,
        "scores": score.values,
    }  # fmt: skip


def save(samples: Ensemble, folder: Path, facts: dict[str, Any], example: np.ndarray) -> str:
    """Write an MLflow model to `folder`, which must not be there, and give the command that serves it. `facts` are
    its metadata, `example` (n, c, h, w) uint8 is an input. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="fbpc-model-") as near:
        _mlflow_model().save_model(folder, _parts(samples, Path(near), facts, example))
    return serve_command(folder)


def log_to_run(
    samples: Ensemble, uri: str, run_id: str, facts: dict[str, Any], example: np.ndarray, log: Callable[[str], None]
) -> str | None:
    """Log the same model to an MLflow run; return its address, or None, with a line to `log`, on failure."""
    name = f"posterior-{slug(samples.spec.architecture).replace('.', '-')}"
    with tempfile.TemporaryDirectory(prefix="fbpc-model-") as near:
        return _mlflow_model().log_model(uri, run_id, name, _parts(samples, Path(near), facts, example), log)


def _parts(samples: Ensemble, near: Path, facts: dict[str, Any], example: np.ndarray) -> Any:
    name, own_network = samples.spec.architecture, ":" in samples.spec.architecture
    if own_network and not custom.importable(name):
        raise UserError(
            f"{name} is defined in this process alone: move it to a module, whose file the model then contains"
        )
    path = near / "samples.safetensors"
    ensemble.save(samples, path)
    shape = samples.spec.image_shape
    return _mlflow_model().ModelParts(
        script=SCRIPT,
        artifacts={"samples": path},
        config={"network": name} if own_network else {},
        example=np.ascontiguousarray(example),
        code=[SCRIPT.parents[1], *([_code_of(name)] if own_network else [])],
        requirements=[f"{package}=={metadata.version(package).partition('+')[0]}" for package in REQUIRED],
        metadata={
            "architecture": name, "width": samples.spec.width, "samples": len(samples.samples),
            "image_shape": list(shape), "classes": list(samples.classes), **facts,
        },
    )  # fmt: skip


def _code_of(name: str) -> Path:
    """Return the file, or the folder of the package, that the import path `name` begins with."""
    custom.search_current_folder()
    top = name.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(top)
    where = spec and ((spec.submodule_search_locations or [None])[0] or spec.origin)
    if not where:
        raise UserError(f"{name}: the module {top} has no file to put into the model; move the network to one that has")
    return Path(where)


def _mlflow_model() -> Any:
    try:
        from fbpc_ray.tracking import mlflow_model
    except ImportError as error:
        raise UserError(f"MLflow is not installed ({error}): pip install mlflow") from None
    return mlflow_model
