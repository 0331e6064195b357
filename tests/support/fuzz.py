"""Damage each kind of file at random, read it, and count what comes of it."""

import io
import json
import random
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from support.experts import RECIPE, trajectory

from fbpc_ray.core import files, tensor_files
from fbpc_ray.core.config import Config, Sweep, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset, to_preset
from fbpc_ray.core.rng import generator
from fbpc_ray.data import coreset, coreset_formats, coreset_reader, readers
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation import trajectory_cache
from fbpc_ray.distillation.expert_store import ExpertStore
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import State
from fbpc_ray.distillation.trajectory_cache import TrajectoryCache
from fbpc_ray.evaluation import ensemble
from fbpc_ray.evaluation.ensemble import Ensemble
from fbpc_ray.models.functional import Network, specify
from fbpc_ray.tracking import run_reference
from fbpc_ray.tracking.run_reference import RunReference
from fbpc_ray.tuning import trial
from fbpc_ray.tuning.plan import Plan, read_plan
from fbpc_ray.tuning.trial import Record, ValidationResult

SECONDS, MEMORY = 10.0, 2**30
"""A reading may take so much CPU time, and this many bytes more than the process had at its largest."""
CLASSES = ("ant", "bee", "cat")
SHAPE = (3, 8, 8)


class Reader(NamedTuple):
    """A reader of files, and a whole file for it."""

    name: str
    path: Path
    """The file that is damaged."""
    read: Callable[[], Any]
    checked: bool
    """Whether the format tells a changed value; else another value is right, too."""


@dataclass
class Counts:
    """What came of the damaged files of one reader."""

    tried: int = 0
    refused: int = 0
    """A UserError of one line."""
    equal: int = 0
    """The value of the whole file."""
    changed: int = 0
    """Another value, of a format that can't tell."""
    wrong: int = 0
    """Another value, of a format with a checksum."""
    traceback: int = 0
    """Another exception, or an error of several lines."""
    slow: int = 0
    large: int = 0
    examples: list[str] = field(default_factory=list)
    """The first faults."""

    @property
    def faults(self) -> int:
        return self.wrong + self.traceback + self.slow + self.large

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value or name != "examples"}


def damage(data: bytes, source: random.Random) -> bytes:
    """Return `data` with one to four faults: flipped bits, cuts, inserted, repeated and overwritten bytes."""
    damaged = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        at, length = source.randrange(len(damaged) + 1), source.choice((1, 2, 8, 64))
        kind = source.randrange(8)
        if kind < 4 and damaged:
            damaged[at % len(damaged)] ^= 1 << source.randrange(8)
        elif kind == 4:
            del damaged[at : source.choice((at + length, len(damaged)))]
        elif kind == 5:
            damaged[at:at] = source.randbytes(length)
        elif kind == 6:
            damaged[at:at] = damaged[at : at + length]
        else:
            damaged[at : at + length] = source.choice((source.randbytes(length), b"\0" * length, b"\xff" * length))
    return bytes(damaged)


def fuzz(reader: Reader, count: int, seed: int = 0) -> Counts:
    """Damage the file of `reader` `count` times, and put it back."""
    content, counts = reader.path.read_bytes(), Counts()
    expected, start = plain(reader.read()), peak()
    for number in range(count):
        damaged = damage(content, random.Random(f"{seed}/{reader.name}/{number}"))
        reader.path.write_bytes(damaged)
        forget()
        began, fault = time.process_time(), ""
        try:
            value = plain(reader.read())
        except UserError as error:
            counts.refused += 1
            if "\n" in str(error) or not str(error):
                fault, counts.traceback = "several lines", counts.traceback + 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            fault, counts.traceback = f"{error!r:.200} at {where.name}:{where.lineno}", counts.traceback + 1
        else:
            if value == expected:
                counts.equal += 1
            elif reader.checked:
                fault, counts.wrong = "another value", counts.wrong + 1
            else:
                counts.changed += 1
        if time.process_time() - began > SECONDS:
            fault, counts.slow = "slow", counts.slow + 1
        if peak() - start > MEMORY:
            fault, counts.large, start = "large", counts.large + 1, peak()
        counts.tried += 1
        if fault and len(counts.examples) < 5:
            counts.examples.append(f"{number}: {fault}")
    reader.path.write_bytes(content)
    forget()
    return counts


def forget() -> None:
    """Forget which files were compared: a damaged one may look like the one before, to the inode."""
    tensor_files._checked.clear()
    trajectory_cache._checked.clear()


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def plain(value: Any) -> Any:
    """Return `value` in a form that == compares to the bit."""
    if isinstance(value, torch.Tensor):
        return plain(value.numpy())
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(name, plain(member)) for name, member in value.items()]
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    if isinstance(value, float):
        return repr(value)
    return value


def small_coreset() -> Coreset:
    images = torch.randn(6, *SHAPE, generator=generator(0, "fuzz"))
    return Coreset(images, torch.tensor([0, 0, 1, 1, 2, 2]), (0.5, 0.4, 0.3), (0.25, 0.5, 1.0), CLASSES)


def all_readers(folder: Path) -> list[Reader]:
    """Write a whole file for each reader below `folder`."""
    return [
        *_run_readers(folder / "run"), *sweep_readers(folder / "sweep"), *_store_readers(folder),
        *_coreset_readers(folder / "coresets"), *_data_readers(folder / "data"),
    ]  # fmt: skip


def _run_readers(folder: Path) -> list[Reader]:
    folder.mkdir(parents=True)
    run, saved = RunDirectory(folder), small_coreset()
    config = Config().updated(width=8, steps=7, architectures=("convnet-in", "convnet-bn"))
    run.write_config(config)
    solutions = {"0/0/0": torch.randn(20, generator=generator(1, "fuzz"))}
    run.save(State(7, saved.images, saved.images * 2, 0.01, 0.0, solutions), [])
    coreset.save(saved, run.coreset_path, {"step": "7", "method": "fbpc"})
    scores = {"accuracy": [0.5, 0.25], "nll": [1.5, None], "ece": [0.1, 0.2], "brier": [0.3, 0.4]}
    run.write_result({
        "method": "fbpc", "data": "digits", "steps": 7, "split": "test", "commit": "0123", "device": "cpu",
        "seconds_per_step": 0.25, "coresets": {"fbpc": {"convnet-in": scores}, "random": {"convnet-in": scores}},
    })  # fmt: skip
    run_reference.write(run, RunReference("sqlite:///mlflow.db", "0" * 32, "1" * 32, True))
    preset_path = folder / "preset.json"
    preset_path.write_text(to_preset(config))

    def restore() -> list[Any]:
        restored = run.restore(saved.labels, SHAPE)
        assert restored is not None
        return [*restored[0]]

    return [
        Reader("config.json", run.config_path, lambda: read_config(folder).flat(), True),
        Reader("checkpoint", run.state_path, restore, True),
        Reader("coreset", run.coreset_path, lambda: tuple(coreset.load(run.coreset_path)), True),
        Reader("result.json", run.result_path, run.read_result, True),
        Reader("mlflow.json", folder / "mlflow.json", lambda: tuple(run_reference.read(run) or ()), True),
        Reader("preset", preset_path, lambda: preset(str(preset_path)).flat(), False),
    ]


def sweep_readers(folder: Path) -> list[Reader]:
    """Write the files of a sweep and of its trials, and the posterior samples of a network."""
    folder.mkdir(parents=True)
    config = Config().updated(width=8, steps=7, out=str(folder / "ended"))
    files.write_checked_json(folder / "best.json", json.loads(to_preset(config)))
    plan = {"name": "first", "id": "0" * 32, "settings": asdict(Sweep(grid=("alpha=1,2",))), "trials": [{"alpha": 1.0}]}
    files.write_checked_json(folder / "sweep.json", plan)
    validation = ValidationResult(3, 1.5, 0.5, 0.125, 0.25, [[1, 2.5], [2, 2.25]])
    trial.write_record(folder, Record([0], [validation]))
    trial.write_end(folder / "ended", "stopped", "by the scheduler at step 3")
    spec = specify("convnet-none", (1, 8, 8), 3, 4, 0)
    params = Network(spec).init(generator(4, "fuzz"))
    samples = Ensemble(spec, [params], [{}], (0.5,), (0.25,), CLASSES)
    ensemble.save(samples, folder / "samples.safetensors")

    def loaded() -> list[Any]:
        read = ensemble.load(folder / "samples.safetensors")
        return [*read.spec, *read.samples, *read.mean, *read.std, *read.classes]

    return [
        Reader("best.json", folder / "best.json", lambda: preset(str(folder / "best.json")).flat(), True),
        Reader("sweep.json", folder / "sweep.json", lambda: asdict_plan(read_plan(folder)), True),
        Reader("trial.json", folder / "trial.json", lambda: asdict(trial.read_record(folder)), True),
        Reader("ended.json", folder / "ended" / "ended.json", lambda: tuple(trial.read_outcome(config, 0)[:3]), True),
        Reader("posterior samples", folder / "samples.safetensors", loaded, True),
    ]


def asdict_plan(plan: Plan) -> dict[str, Any]:
    return {**plan._asdict(), "settings": asdict(plan.settings)}


def _store_readers(folder: Path) -> list[Reader]:
    place, snapshots = folder / "experts", [*trajectory(0)]
    ExpertStore(place, RECIPE).write(0, snapshots)

    def expert() -> list[Any]:
        return [ExpertStore(place, RECIPE).read(0, epoch) for epoch in range(RECIPE.epochs + 1)]

    rows = torch.randn(4, 30, generator=generator(2, "fuzz"))

    def block() -> Any:
        return TrajectoryCache(folder / "cache", 1e6).block("a", (4, 30), lambda: rows)

    block()
    return [
        Reader("expert", place / "00000.arrow", expert, True),
        Reader("expert's manifest", place / "00000.json", expert, True),
        Reader("store.json", place / "store.json", expert, True),
        Reader("cached trajectory", folder / "cache" / "a.npy", block, True),
    ]


def _coreset_readers(folder: Path) -> list[Reader]:
    """Exports, which others may have written too."""
    saved = small_coreset()
    dataset: Dataset = SimpleNamespace(  # type: ignore[assignment]
        name="pets", classes=CLASSES, image_shape=SHAPE, mean=saved.mean, std=saved.std
    )
    exports = []
    for kind, file in (("npz", ""), ("pt", "images_best.pt"), ("hf", coreset_formats.SHARD), ("png", "coreset.json")):
        out = folder / f"export-{kind}{coreset_formats.SINGLE.get(kind, '')}"
        coreset_formats.write(coreset_formats.files(saved, kind, {}, ""), out)
        at = out / file if file else out

        def read(out: Path = out) -> Any:
            return tuple(coreset_reader.load(out, dataset).coreset)

        exports.append(Reader(f"export {kind} {file}".strip(), at, read, False))
    return exports


def _data_readers(folder: Path) -> list[Reader]:
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    images, labels = source.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), np.arange(8) % 2
    archive = folder / "data.npz"
    np.savez(archive, x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    shard = folder / "data.parquet"
    _write_parquet(shard, images, labels)
    datasets = [
        Reader("data npz", archive, lambda: _parts(f"npz:{archive}"), False),
        Reader("data parquet", shard, lambda: _parts(f"parquet:{shard}"), False),
    ]
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm"):
        root = folder / suffix
        for label, name in enumerate(("ant", "bee")):
            (root / name).mkdir(parents=True)
            Image.fromarray(images[label]).save(root / name / f"0.{suffix}")
        at = root / "ant" / f"0.{suffix}"
        datasets.append(Reader(f"image {suffix}", at, lambda root=root: _parts(f"folder:{root}"), False))
    return datasets


def _parts(name: str) -> Any:
    raw = readers.read(name, Path(), False)
    return raw.classes, {split: (part.images, part.labels) for split, part in raw.parts.items()}


def _write_parquet(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    blobs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        blobs.append(buffer.getvalue())
    features = {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": pa.array(blobs), "label": pa.array(labels)}).replace_schema_metadata(metadata)
    pq.write_table(table, path)


def write_report(
    path: Path, seed: int, counts: dict[str, Counts], provenance: dict[str, Any], *, keep: bool = False
) -> None:
    """Write the counts of each reader with the commit of its code, and seed, versions and device for each commit.

    Args:
        keep: take over the counts of the readers that `path` has and `counts` lacks.
    """
    earlier = json.loads(path.read_text()) if keep and path.exists() else {"runs": {}, "readers": {}}
    commit = provenance["commit"]
    readers_of = {**earlier["readers"], **{name: {**each.as_json(), "commit": commit} for name, each in counts.items()}}
    runs = {**earlier["runs"], commit: {"seed": seed, **provenance}}
    used = {each["commit"] for each in readers_of.values()}
    files.write_json(path, {"runs": {name: runs[name] for name in runs if name in used}, "readers": readers_of})
