"""docs/formats.md names what a run, experts, tables, exports and sweeps leave: compared with real files."""

import contextlib
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from support.docs import (
    ROOT,
    run_here,
)

from fbpc_ray.core import config
from fbpc_ray.core.config import Sweep
from fbpc_ray.core.presets import preset
from fbpc_ray.data import coreset_formats
from fbpc_ray.distillation.expert_format import Recipe
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import (
    State,
    SummedGradient,
    average_images,
    update,
    update_by_adam,
    with_soft_labels,
)
from fbpc_ray.reproduction.rows import SCHEMA
from fbpc_ray.tuning import sweep
from fbpc_ray.tuning.plan import write_plan

pytestmark = pytest.mark.usefixtures("offline")


def first_columns(section: str) -> list[str]:
    """The names in the first columns of the tables below a heading of docs/formats.md."""
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", (ROOT / "docs/formats.md").read_text(), re.M | re.S
    )
    rows = [line.split("|")[1] for line in text.splitlines() if re.match(r"\| `", line)]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def second_column(section: str, row: str) -> list[str]:
    """The names in the second column of one row there."""
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", (ROOT / "docs/formats.md").read_text(), re.M | re.S
    )
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{row}`")]
    return re.findall(r"`([^`]+)`", line.split("|")[2])


def test_formats_names_what_was_renamed():
    assert set(first_columns("Names of earlier code")) - {"--again"} >= set(config.RENAMED)
    text = (ROOT / "docs/formats.md").read_text().partition("## Names of earlier code")[2]
    assert all(f"| `{old}`" in text and f"| `{new}`" in text for old, new in config.RENAMED.items())


def test_formats_says_what_a_run_leaves(desk):
    run = desk / "runs" / "first"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert set(first_columns("A run")) <= files
    extra = {
        name for name in files - set(first_columns("A run")) if not name.endswith(".png") and name != "mlflow.json"
    }
    assert not extra, "docs/formats.md does not name them"
    for name in ("coreset", "random"):
        with safe_open(run / "coreset" / f"{name}.safetensors", "pt") as file:
            assert {*file.keys()} | {*file.metadata()} == set(first_columns("coreset.safetensors"))
    with safe_open(run / "checkpoint" / "state.safetensors", "pt") as file:
        assert {*file.keys()} == set(first_columns("state.safetensors"))
        assert {*file.metadata()} == {"step", "fingerprint", "checksum"}
    assert pq.read_schema(run / "metrics.parquet").names == first_columns("metrics.parquet")
    result = json.loads((run / "result.json").read_text())
    scores = next(iter(next(iter(result["coresets"].values())).values()))
    assert sorted([*result, *scores]) == sorted(first_columns("result.json"))


def test_formats_names_the_tensors_that_settings_add_to_a_checkpoint(tmp_path):
    """After one step of --learn-labels with --image-average, and one of vbpc."""
    (text,) = re.findall(r"^## state.safetensors\n(.*?)(?=^## )", (ROOT / "docs/formats.md").read_text(), re.M | re.S)
    images = torch.zeros(4, 1, 8, 8)
    begin = with_soft_labels(State(0, images, images, 0.0), torch.tensor([0, 0, 1, 1]), 2, 1.0)
    gradients = [SummedGradient(torch.ones_like(images), soft_labels=torch.ones(4, 2))]
    learned = update(begin, gradients, alpha=1.0, momentum=0.5, inner_alpha=0.0, label_lr=0.1)
    states = (average_images(learned, begin, 0.9), update_by_adam(begin, gradients, image_lr=0.1, label_lr=0.1))
    added = set()
    for number, state in enumerate(states):
        RunDirectory(tmp_path / f"{number}").save(state, [])
        with safe_open(tmp_path / f"{number}" / "checkpoint" / "state.safetensors", "pt") as file:
            added |= {*file.keys()} - set(first_columns("state.safetensors"))
    moments = {"images/average", "images/second", "labels/first", "labels/second"}
    assert added == {"soft_labels", *(f"moment/{name}" for name in moments)}
    assert added == set(re.findall(r"`(soft_labels|moment/[\w/]+)`", text))


def test_formats_says_what_experts_and_tables_are_made_of(desk):
    (folder,) = (desk / "experts" / "digits").glob("convnet-in-*")
    store = json.loads((folder / "store.json").read_text())
    assert {*store["recipe"], "precision"} == {*Recipe._fields} == set(second_column("Experts", "store.json"))
    assert {*json.loads((folder / "00000.json").read_text())} == set(second_column("Experts", "00000.json"))
    assert first_columns("rows.parquet of a reproduction") == SCHEMA.names


def test_formats_says_what_exports_are_made_of(desk, tmp_path):
    assert set(first_columns("Exports")) - {"--format"} == set(coreset_formats.FORMATS)
    for kind in coreset_formats.FORMATS:
        out = tmp_path / f"as-{kind}{coreset_formats.SINGLE.get(kind, '')}"
        with contextlib.chdir(desk):
            run_here(["export", "runs/first", "--format", kind, "--out", str(out)])
        names = set(second_column("Exports", kind))
        if kind == "npz":
            with np.load(out) as archive:
                assert set(archive.files) == names
        elif kind != "safetensors":
            files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
            general = {re.sub(r"^\d+-[\w-]+/\d+\.png$", "LABEL-NAME/INDEX.png", name) for name in files}
            assert general == names
            assert {*json.loads((out / "coreset.json").read_text())} == {"mean", "std", "classes", "made_by"}
        if kind == "hf":
            assert set(pq.read_schema(out / coreset_formats.SHARD).names) == {"pixels", "label", "image"}


def test_formats_says_what_a_sweep_leaves(tmp_path):
    """Its plan; the rest is what a sweep of test_sweeps_on_ray.py is asked for."""
    base = preset("digits").updated(validation=0.1, out=str(tmp_path / "sweep"), width=8, tracking=False)
    outcome = sweep._prepare(base, Sweep(grid=("alpha=1,10",)), tmp_path / "sweep", False, False, False)
    write_plan(outcome.folder, outcome.plan, outcome.base)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} <= set(first_columns("A sweep"))
