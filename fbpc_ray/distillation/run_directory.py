"""Files of a run, written in an order such that a crash at any moment leaves a resumable run.

    config.json  checkpoint/state.safetensors  metrics.parquet  coreset/over-time.safetensors
    coreset/{coreset,random}.safetensors  before.png  coreset.png  over-time.png  course.png  reliability.png
    result.json

Within a checkpoint the metrics come first and the state last; rows of steps that the state has not seen are dropped.
"""

import io
import shlex
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from torch import Tensor

from fbpc_ray.core import config, files, inputs, storage, tensor_files
from fbpc_ray.core.config import MAY_CHANGE_ON_RESUME, Config
from fbpc_ray.core.errors import UserError, reason_of, undamaged
from fbpc_ray.core.storage import Place
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.worker import State
from fbpc_ray.evaluation import results

Where = TypeVar("Where", bound=Place)
REMEMBERED = 16
"""Steps whose images a run keeps, for a picture."""


_SOLUTION = "solution/"
"""How the names of MAP solutions, and of the networks of a pool, begin in a checkpoint."""
_MOMENT = "moment/"
"""How the names of Adam's other moments begin, and that of the average of the images."""


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
        """Raise UserError unless the folder is empty, or holds only files of a process killed before config.json."""
        if not self.folder.exists():
            return
        if isinstance(self.folder, Path) and self.folder.is_file():
            raise UserError(f"{self.folder} is a file: give a folder as --out")
        leftovers = (".config.json.*.tmp", ".sweep.json.*.tmp", "sweep.json", files.LOCK)
        with suppress(FileNotFoundError):  # removed meanwhile, by the process that had it
            if any(not any(entry.match(name) for name in leftovers) for entry in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty: pass --resume to go on with it, or another --out")

    def refuse_sweep(self, fix: str = "") -> None:
        """Raise UserError, ending in `fix`, for the folder of a sweep, whose trials are the runs."""
        if (self.folder / "sweep.json").is_file() and not self.state_path.exists():
            fix = fix or f"give its best trial, {self.folder}/trials/NUMBER (trials.md lists them)"
            raise UserError(f"{self.folder} is a sweep: {fix}")

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed writers. The caller holds the lock of the folder."""
        if isinstance(self.folder, Path):
            for path in (self.folder, self.folder / "checkpoint", self.folder / "coreset"):
                for leftover in path.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)

    def write_config(self, settings: Config) -> None:
        files.write_checked_json(self.config_path, settings.flat())

    def save(self, state: State, rows: list[dict[str, Any]], fingerprint: str = "") -> None:
        """Write a checkpoint: metrics first, state last, each atomically. An OSError leaves the last one intact.

        Args:
            fingerprint: of the data set that the last step has seen.
        """
        if rows:
            files.write_bytes(self.metrics_path, _parquet(rows))
        inner = torch.tensor([state.inner_lr, state.inner_velocity], dtype=torch.float64)
        tensors = {"images": state.images, "velocity": state.velocity, "inner": inner}
        tensors |= {f"{_SOLUTION}{name}": value for name, value in state.solutions.items()}
        tensors |= {f"{_MOMENT}{name}": value for name, value in state.moments.items()}
        if state.soft_labels is not None:
            tensors["soft_labels"] = state.soft_labels
        facts = {"step": str(state.step), **({"fingerprint": fingerprint} if fingerprint else {})}
        files.write_bytes(self.state_path, tensor_files.dumps(tensors, facts))

    def restore(self, labels: Tensor, image_shape: tuple[int, int, int]) -> tuple[State, list[dict[str, Any]]] | None:
        """Read the last checkpoint and the metrics up to it; None before the first one. Raises UserError for damage."""
        if not self.state_path.exists():
            return None
        fix = "start again in another --out"
        try:
            with undamaged(self.state_path, fix), storage.local(self.state_path) as path:
                state = _read_state(path, (len(labels), *image_shape))
                self._check_inner_lr(state)
            with undamaged(self.metrics_path, fix):
                rows = [row for row in _rows(self.metrics_path) if row["step"] <= state.step]
        except (safetensors.SafetensorError, pa.ArrowException, OSError) as error:
            raise UserError(f"the checkpoint in {self.folder} is damaged ({reason_of(error)}): {fix}") from None
        return state, rows

    def read_fingerprint(self) -> str:
        """Read the fingerprint that `save` wrote; empty without one, and for damage, which `restore` names."""
        if not self.state_path.exists():
            return ""
        try:
            with storage.local(self.state_path) as path, tensor_files.open_checked(path) as file:
                return (file.metadata() or {}).get("fingerprint", "")
        except (safetensors.SafetensorError, ValueError, OSError, UserError):
            return ""

    def read_metrics(self, fix: str = "run it again in another --out") -> list[dict[str, Any]]:
        """Read the rows of metrics.parquet; none where the run has no steps. Raises UserError, ending in `fix`."""
        try:
            with undamaged(self.metrics_path, fix):
                return _rows(self.metrics_path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.metrics_path} is damaged ({reason_of(error)}): {fix}") from None

    def _check_inner_lr(self, state: State) -> None:
        """Raise ValueError if the inner learning rate is not the configuration's, in a run that doesn't learn it."""
        if not self.config_path.exists():
            return
        settings = config.read_config(self.folder).distillation
        if settings.method != "bpc-w" and (state.inner_lr, state.inner_velocity) != (settings.inner_lr, 0.0):
            raise ValueError(f"inner learning rate {state.inner_lr:g}, config.json has {settings.inner_lr:g}")

    def remember(self, step: int, images: Tensor) -> None:
        """Add `images` (k, c, h, w) uint8, those after `step`, to those of earlier steps; later ones are dropped.

        Of more than `REMEMBERED` steps every other one is dropped, the first never.
        """
        images_by_step = {
            number: old for number, old in self.history().items() if number < step and old.shape == images.shape
        }
        images_by_step[step] = images
        if len(images_by_step) > REMEMBERED:
            images_by_step = {number: images_by_step[number] for number in sorted(images_by_step)[::2]}
        tensors = {str(number): value.contiguous() for number, value in images_by_step.items()}
        files.write_bytes(self.history_path, tensor_files.dumps(tensors, {}))

    def history(self) -> dict[int, Tensor]:
        """Return {step: images (k, c, h, w) uint8} by step; empty if the file is damaged: it only makes a picture."""
        if not self.history_path.exists():
            return {}
        try:
            with storage.local(self.history_path) as path, tensor_files.open_checked(path) as file:
                return {step: file.get_tensor(str(step)).clone() for step in sorted(map(int, file.keys()))}
        except (safetensors.SafetensorError, ValueError, OSError, UserError):
            return {}

    def read_coreset(self, settings: Config) -> Coreset:
        """Read the pseudocoreset. Raises UserError where there is none yet, for damage, and for one of another run."""
        if not self.coreset_path.exists():
            self.refuse_sweep()
            words = shlex.join(["fbpc", "distill", "--out", str(self.folder), "--resume"])
            raise UserError(
                f"{self.coreset_path}: coreset not found; if the run has not ended, resume it with `{words}`"
            )
        learned, fix = coreset.load(self.coreset_path), "restore it, or score it by `fbpc evaluate --coreset`"
        m = settings.distillation.ipc * len(learned.classes)
        if len(learned.images) != m:
            raise UserError(
                f"{self.coreset_path}: expected {m} images ({settings.distillation.ipc} per class, "
                f"{len(learned.classes)} classes), got {len(learned.images)}; {fix}"
            )
        if self.random_path.exists():
            first = coreset.load(self.random_path)
            if first.images.shape != learned.images.shape or first.classes != learned.classes:
                raise UserError(
                    f"{self.coreset_path}: expected the classes and the shape {tuple(first.images.shape)} of "
                    f"random.safetensors, got {tuple(learned.images.shape)}; {fix}"
                )
        return learned

    def write_result(self, result: dict[str, Any]) -> None:
        files.write_checked_json(self.result_path, result)

    def read_result(self) -> dict[str, Any] | None:
        """Read the result; None before the run has ended. Raises UserError for damage."""
        if not self.result_path.exists():
            return None
        with undamaged(self.result_path, "delete it and run again"):
            result = inputs.read_checked_json(self.result_path)
            if not isinstance(result["steps"], int) or result["steps"] < 0:
                raise ValueError(f"steps is {result['steps']!r}, expected 0 or more")
            for name in ("method", "data", "split", "commit", "device"):
                if not isinstance(result.get(name, ""), str):
                    raise ValueError(f"{name} is {result[name]!r}, expected text")
            if not isinstance(result.get("versions", {}), dict):
                raise ValueError(f"versions is {result['versions']!r}, expected an object")
            if not results.from_json(result["coresets"]):
                raise ValueError("it has no scores")
            coresets = {
                name: {network: config.current_names(scores) for network, scores in by_network.items()}
                for name, by_network in result["coresets"].items()
            }
            return result | {"coresets": coresets}


def check_resume(stored: Config, config: Config, may_change: Set[str] = MAY_CHANGE_ON_RESUME) -> None:
    """Raise UserError, with both values, for a changed flag on which the steps already taken depend."""
    before, now = stored.flat(), config.flat()
    differing = [name for name in before if before[name] != now[name] and name not in may_change]
    if differing:
        differences = ", ".join(
            f"--{name.replace('_', '-')} was {before[name]!r}, now {now[name]!r}" for name in differing
        )
        raise UserError(
            f"--resume with another configuration: {differences}; repeat the old value or start another --out"
        )


def _read_state(path: Path, shape: tuple[int, int, int, int]) -> State:
    """Read a checkpoint of a run whose images are of `shape`. Raises ValueError, KeyError, TypeError or UserError."""
    with tensor_files.open_checked(path) as file:
        images, velocity, inner = (file.get_tensor(name) for name in ("images", "velocity", "inner"))
        names = list(file.keys())
        solutions, moments = (
            {name.removeprefix(start): file.get_tensor(name) for name in names if name.startswith(start)}
            for start in (_SOLUTION, _MOMENT)
        )
        soft_labels = file.get_tensor("soft_labels") if "soft_labels" in names else None
        step = int((file.metadata() or {})["step"])
    expected = {
        "images": (images, shape, torch.float32), "velocity": (velocity, shape, torch.float32),
        "inner": (inner, (2,), torch.float64),
        **{name: (vector, (vector.numel(),), torch.float32) for name, vector in solutions.items()},
        **{name: (moment, (len(images), *moment.shape[1:]), torch.float32) for name, moment in moments.items()},
    }  # fmt: skip
    if soft_labels is not None:
        expected["soft_labels"] = (soft_labels, (len(images), soft_labels.shape[-1]), torch.float32)
    for name, (tensor, size, dtype) in expected.items():
        if tensor.shape != size or tensor.dtype != dtype:
            raise ValueError(f"{name} of {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(size)} {dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    if step < 0 or inner[0] < 0:
        raise ValueError(f"step {step} and inner learning rate {float(inner[0]):g}, expected 0 or more")
    inner_lr, inner_velocity = inner.tolist()
    return State(step, images, velocity, inner_lr, inner_velocity, solutions, soft_labels, moments)


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(names) | row for row in rows]), buffer, write_page_checksum=True)
    return buffer.getvalue()


def _rows(path: Place) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with storage.local(path) as file:
        rows = pq.read_table(file, page_checksum_verification=True).to_pylist()
    if not all(isinstance(row["step"], int) and isinstance(row["architecture"], str) for row in rows):
        raise ValueError("its rows have no step or no architecture")
    return rows
