"""The files of a run: what is written, in which order, so that a crash at any moment leaves a run that resumes.

    config.json  checkpoint/state.safetensors  metrics.parquet  coreset/over-time.safetensors
    coreset/{coreset,random}.safetensors  before.png  coreset.png  over-time.png  course.png  reliability.png
    result.json

Within a checkpoint the metrics come first and the state last; rows of steps that the state has not seen are dropped.
"""

import io
import json
from collections.abc import Set
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fbpc_ray.core import config, files, storage
from fbpc_ray.core.config import MAY_CHANGE_ON_RESUME, Config
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.storage import Place
from fbpc_ray.distillation.worker import State

Where = TypeVar("Where", bound=Place)
REMEMBERED = 16
"""Steps whose images a run keeps, for a picture."""


_SOLUTION = "solution/"
"""How the names of MAP solutions, and of the networks of a pool, begin in a checkpoint."""
_MOMENT = "moment/"
"""How the names of Adam's other moments begin."""


class RunDirectory(Generic[Where]):
    """A run's folder, or its prefix in an object store. Opening one writes nothing."""

    def __init__(self, folder: Where):
        self.folder = cast(Where, folder.absolute())
        self.config_path = self._of("config.json")
        self.state_path = self._of("checkpoint/state.safetensors")
        self.metrics_path = self._of("metrics.parquet")
        self.coreset_path = self._of("coreset/coreset.safetensors")
        self.random_path = self._of("coreset/random.safetensors")
        self.history_path = self._of("coreset/over-time.safetensors")
        self.before_path = self._of("before.png")
        self.picture_path = self._of("coreset.png")
        self.over_time_path = self._of("over-time.png")
        self.course_path = self._of("course.png")
        self.reliability_path = self._of("reliability.png")
        self.result_path = self._of("result.json")

    def _of(self, name: str) -> Where:
        return cast(Where, self.folder / name)

    def refuse_if_taken(self) -> None:
        """Raise UserError where the folder holds something already, but for what a kill left before a config.json."""
        if not self.folder.exists():
            return
        leftovers = (".config.json.*.tmp", ".sweep.json.*.tmp", "sweep.json", files.LOCK)
        with suppress(FileNotFoundError):  # removed meanwhile, by the process that had it
            if not self.folder.is_dir() or any(
                not any(each.match(name) for name in leftovers) for each in self.folder.iterdir()
            ):
                raise UserError(f"{self.folder} is not empty: pass --resume to go on with it, or another --out")

    def write_config(self, settings: Config) -> None:
        files.write_text(self.config_path, config.to_json(settings))

    def save(self, state: State, rows: list[dict[str, Any]]) -> None:
        """Checkpoint: metrics first, state last, each atomically. Raises OSError with the last checkpoint intact."""
        if rows:
            files.write_bytes(self.metrics_path, _parquet(rows))
        inner = torch.tensor([state.inner_lr, state.inner_velocity], dtype=torch.float64)
        tensors = {"images": state.images, "velocity": state.velocity, "inner": inner}
        tensors |= {f"{_SOLUTION}{name}": value for name, value in state.solutions.items()}
        tensors |= {f"{_MOMENT}{name}": value for name, value in state.moments.items()}
        if state.soft_labels is not None:
            tensors["soft_labels"] = state.soft_labels
        files.write_bytes(self.state_path, safetensors.torch.save(tensors, {"step": str(state.step)}))

    def restore(self, labels: Tensor, image_shape: tuple[int, int, int]) -> tuple[State, list[dict[str, Any]]] | None:
        """The last checkpoint and the metrics up to it; None where there is none. Raises UserError for damage."""
        if not self.state_path.exists():
            return None
        try:
            with storage.local(self.state_path) as path, safetensors.safe_open(path, "pt") as file:
                images, velocity, inner = (file.get_tensor(name) for name in ("images", "velocity", "inner"))
                names = list(file.keys())
                solutions, moments = (
                    {name.removeprefix(start): file.get_tensor(name) for name in names if name.startswith(start)}
                    for start in (_SOLUTION, _MOMENT)
                )
                soft_labels = file.get_tensor("soft_labels") if "soft_labels" in names else None
                step = int(file.metadata()["step"])
            shape = (len(labels), *image_shape)
            if images.shape != shape or velocity.shape != shape or images.dtype != torch.float32:
                raise ValueError(f"images of {tuple(images.shape)}, not {shape}")
            rows = [row for row in _rows(self.metrics_path) if row["step"] <= step]
        except (safetensors.SafetensorError, pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {self.folder} is damaged ({error}): start again in another --out"
            ) from None
        inner_lr, inner_velocity = inner.tolist()
        state = State(step, images, velocity, inner_lr, inner_velocity, solutions, soft_labels, moments)
        return state, rows

    def remember(self, step: int, images: Tensor) -> None:
        """Add `images` (k, c, h, w) uint8, as they are after `step`, to those of earlier steps; what is there of this
        step or later is replaced. Of more than `REMEMBERED` every other one is dropped, the first never."""
        kept = {each: old for each, old in self.history().items() if each < step and old.shape == images.shape}
        kept[step] = images
        if len(kept) > REMEMBERED:
            kept = {each: kept[each] for each in sorted(kept)[::2]}
        tensors = {str(each): value.contiguous() for each, value in kept.items()}
        files.write_bytes(self.history_path, safetensors.torch.save(tensors))

    def history(self) -> dict[int, Tensor]:
        """{step: images (k, c, h, w) uint8} by step, as far as they were remembered; none where the file is damaged:
        only a picture is made of it."""
        if not self.history_path.exists():
            return {}
        try:
            found = safetensors.torch.load(self.history_path.read_bytes())
            return {int(step): found[step] for step in sorted(found, key=int)}
        except (safetensors.SafetensorError, ValueError):
            return {}

    def write_result(self, result: dict[str, Any]) -> None:
        files.write_json(self.result_path, result)

    def read_result(self) -> dict[str, Any] | None:
        """The result; None where there is none yet. Raises UserError for damage."""
        if not self.result_path.exists():
            return None
        with undamaged(self.result_path, "delete it and run again"):
            result = json.loads(self.result_path.read_bytes())
            coresets = {
                coreset: {network: config.current_names(scores) for network, scores in by_network.items()}
                for coreset, by_network in result["coresets"].items()
            }
            return dict(result) | {"steps": int(result["steps"]), "coresets": coresets}


def check_resume(stored: Config, wanted: Config, may_change: Set[str] = MAY_CHANGE_ON_RESUME) -> None:
    """Raise UserError where a flag differs that the steps already taken depend on; name the flags with both sides."""
    before, now = stored.flat(), wanted.flat()
    differing = [name for name in before if before[name] != now[name] and name not in may_change]
    if differing:
        told = ", ".join(f"--{name.replace('_', '-')} was {before[name]!r}, now {now[name]!r}" for name in differing)
        raise UserError(f"--resume with another configuration: {told}; repeat the old value or start another --out")


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(names) | row for row in rows]), buffer)
    return buffer.getvalue()


def _rows(path: Place) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with storage.local(path) as file:
        return pq.read_table(file).to_pylist()
