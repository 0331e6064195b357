"""Write an ensemble as an MLflow model, in a folder or as an output of a run."""

import contextlib
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fbpc_ray.core.addresses import redacted
from fbpc_ray.tracking.mlflow_client import reason, silence_warnings
from fbpc_ray.tracking.uri import absolute


class ModelParts(NamedTuple):
    """Parts of an MLflow model of posterior samples."""

    script: Path
    """Run by MLflow as it loads the model (models from code)."""
    artifacts: dict[str, Path]
    config: dict[str, str]
    example: np.ndarray
    """Images (n, c, h, w) uint8."""
    code: Sequence[Path]
    """Files and folders that `script` imports."""
    requirements: Sequence[str]
    metadata: dict[str, object]


def save_model(folder: Path, parts: ModelParts) -> None:
    """Write the model to `folder`, which must not be there: whole or not at all."""
    from mlflow import pyfunc  # not above: half a second that only models need

    silence_warnings()
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            pyfunc.save_model(temporary, **_model_arguments(parts))
        for compiled in temporary.rglob("__pycache__"):
            shutil.rmtree(compiled, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def log_model(uri: str, run_id: str, name: str, parts: ModelParts, log: Callable[[str], None]) -> str | None:
    """Log the model as an output of a run; return its models:/ address, or None, with a line to `log`."""
    from mlflow import pyfunc
    from mlflow.models import Model

    silence_warnings()
    try:
        with default_store(uri), warnings.catch_warnings(action="ignore"):
            model = Model.log(None, pyfunc, name=name, run_id=run_id, **_model_arguments(parts))
        return model.model_uri
    except Exception as error:  # noqa: BLE001  whatever MLflow, SQL or the network raises
        log(f"MLflow: {redacted(uri)} does not take the model ({reason(error)}).")
        return None


@contextlib.contextmanager
def default_store(uri: str) -> Iterator[None]:
    """Set MLflow's default store inside the block, and restore the previous one, which MLflow also keeps in the
    environment, after it."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(absolute(uri))
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # pyright: ignore[reportArgumentType]  None unsets it


def _model_arguments(parts: ModelParts) -> dict[str, Any]:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    images = TensorSpec(np.dtype("uint8"), (-1, *parts.example.shape[1:]))
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec("string", "class"), ColSpec(Array("double"), "probabilities"), ColSpec("double", "entropy"),
        ColSpec("double", "mutual_information"),
    ]  # fmt: skip
    return {
        "python_model": str(parts.script),
        "artifacts": {key: str(path) for key, path in parts.artifacts.items()},
        "model_config": parts.config,
        "input_example": parts.example,
        "signature": ModelSignature(Schema([images]), Schema(outputs)),
        "code_paths": [str(path) for path in parts.code],
        "pip_requirements": list(parts.requirements),
        "metadata": parts.metadata,
    }
