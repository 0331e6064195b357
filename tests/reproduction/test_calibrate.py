"""The search on the Random rows: what it runs, that it goes on where it stopped, and how it ranks."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.chains import context_of

from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import chains
from fbpc_ray.reproduction.calibration import distance, name_of, report, settings_of, value_of

FILE = Path(__file__).parents[2] / "jobs" / "calibrate_sghmc.py"
FLAGS = {
    "data": "digits", "width": "8", "backend": "serial", "device": "cpu", "ipc": "1 10", "chain-epochs": "20 10",
    "test-images": "50", "grid": "prior=0,0.1 dsa=on,off", "coresets": "1",
}  # fmt: skip


def words(out: Path, **changes: str) -> list[str]:
    """The command line of a small search."""
    flags = {**FLAGS, "out": str(out), **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [word for name, value in flags.items() for word in (f"--{name}", *value.split())]


@pytest.fixture(scope="module")
def job() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("calibrate_sghmc", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # tyro reads the fields' docstrings from it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def out(job, tmp_path_factory) -> Path:
    """The file of a search that is done."""
    path = tmp_path_factory.mktemp("calibration") / "rows.jsonl"
    job.calibrate(words(path))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_the_chain_that_it_names(job, out, digits):
    """Eight chains, each with its settings, numbers and cause; one of them again by hand."""
    rows = rows_of(out)
    settings = {(row["ipc"], row["prior"], row["dsa"]) for row in rows}
    assert settings == {(ipc, prior, dsa) for ipc in (1, 10) for prior in ("0", "0.1") for dsa in ("on", "off")}
    assert {(row["ipc"], row["chain_epochs"], row["chain_every"]) for row in rows} == {(1, 20, 2), (10, 10, 1)}
    assert {(row["d"], row["eta"], row["init"], row["lineage_batch"]) for row in rows} == {
        ("1e-05", "auto", "own", 128)
    }
    assert all(row["torch"] and row["device"] and row["commit"] for row in rows)

    (row,) = (row for row in rows if (row["ipc"], row["prior"], row["dsa"]) == (10, "0.1", "off"))
    config = job.Config().updated(data="digits", width=8, architectures=("convnet-in",))
    (spec,) = job.session.network_specs(config, digits)
    state, labels = initial_state(digits, 10, 0)
    own = job.Evaluation(chain_epochs=10, chain_every=1, chain_weight_decay=0.1, chain_augment=False)
    shared = context_of(digits, "test", own, state.images.numpy(), labels.numpy())._replace(
        split=job.some(digits.test, 50, digits, 0)
    )
    chain = chains.Chain("x", spec, 0)
    expected = chains.values(chains.run_chain(shared, chain, "cpu"))
    names = ("accuracy", "nll", "batch_nll", "mean_sample_nll", "ece", "brier")
    assert {name: row[name] for name in names} == {name: expected[name] for name in names}


def test_it_goes_on_where_it_stopped(job, out, tmp_path, capsys, monkeypatch):
    """Nothing is run twice; missing rows are added, after a line that a kill cut off too; another length is new."""
    ran = []
    monkeypatch.setattr(job, "run_chain", lambda *each: ran.append(each) or chains.run_chain(*each))
    path = tmp_path / "rows.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])
    job.calibrate(words(path))
    assert len(ran) == 3
    assert [{**row, "seconds": 0} for row in rows_of(path)] == [{**row, "seconds": 0} for row in rows_of(out)]
    before = path.read_bytes()
    job.calibrate([*words(path, coresets="2"), "--dry-run"])
    assert "8 of 16 chains" in capsys.readouterr().out
    assert path.read_bytes() == before
    job.calibrate(words(path, chain_epochs="10", ipc="1"))
    assert len(ran) == 3 + 4
    assert len(rows_of(path)) == 12
    path.write_text('["no row"]\n')
    with pytest.raises(UserError, match="expected one JSON object a line"):
        job.calibrate(words(path))


def settings(*grid: str, search: str = "product") -> list[str]:
    return [name_of(setting) for setting in settings_of(grid, search)]


def test_the_grid_is_a_product_or_one_at_a_time():
    """The first value of a knob is the base; equal values are one; names leave out defaults."""
    grid = ("d=0.00001,0,1e-5", "eta=auto,9e-4m", "init=own,1e-1")
    assert settings(*grid) == [
        "default", "init=0.1", "eta=0.0009m", "eta=0.0009m init=0.1",
        "d=0", "d=0 init=0.1", "d=0 eta=0.0009m", "d=0 eta=0.0009m init=0.1",
    ]  # fmt: skip
    assert settings(*grid, search="one-at-a-time") == ["default", "d=0", "eta=0.0009m", "init=0.1"]


def test_a_value_followed_by_m_grows_with_the_coreset():
    """The lineage's step size is eps^2 m with eps .03: .009, .09 and .45 at ipc 1, 10 and 50."""
    assert [value_of("eta", "0.0009m", m) for m in (10, 100, 500)] == pytest.approx([0.009, 0.09, 0.45])
    assert value_of("prior", "0.05", 100) == 0.05
    assert value_of("init", "own", 10) == value_of("eta", "auto", 10) == 0.0
    assert value_of("dsa", "off", 10) is False
    assert value_of("noise", "gradient", 10) == "gradient"


def test_a_row_is_on_disk_as_soon_as_its_chain_ends(job, tmp_path, monkeypatch):
    """The third chain fails: two rows are there, and the file is whole."""
    real, calls = chains.run_chain, []

    def failing(*each):
        calls.append(each)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*each)

    monkeypatch.setattr(job, "run_chain", failing)
    with pytest.raises(KeyboardInterrupt):
        job.calibrate(words(tmp_path / "rows.jsonl"))
    assert len(rows_of(tmp_path / "rows.jsonl")) == 2


def test_the_folder_of_the_data_is_not_written(job, digits, tmp_path):
    """The name of the data is kept, where it lies is not."""
    arrays = {
        f"{kind}_{part}": getattr(getattr(digits, part), name)[:200]
        for part in ("train", "test")
        for kind, name in (("x", "images"), ("y", "labels"))
    }
    np.savez(tmp_path / "few.npz", **arrays)
    path = tmp_path / "out" / "rows.jsonl"
    few = words(path, data=f"npz:{tmp_path / 'few.npz'}", ipc="1", chain_epochs="2", grid="dsa=off")
    job.calibrate(few)
    text = path.read_text().replace(str(path), "")
    assert str(tmp_path) not in text
    assert "npz:few.npz" in text


def row(ipc: int = 1, coreset: int = 0, **changes: Any) -> dict[str, Any]:
    setting = {"d": "1e-05", "eta": "auto", "prior": "0.005", "init": "own", "dsa": "on", "noise": "consistent"}
    numbers = {"accuracy": 0.163, "nll": 4.66, "batch_nll": 4.66, "mean_sample_nll": 5.0, "ece": 0.2}
    return {"ipc": ipc, "coreset": coreset, **setting, "friction": "0.1", **numbers, "seconds": 1.0, **changes}


def test_the_distance_is_its_formula():
    """Means over coresets in tolerances of 1.5 points and .15 nats, by hand; infinite where a chain diverged."""
    cells = {
        1: [row(accuracy=0.15, nll=4.0), row(coreset=1, accuracy=0.17, nll=5.0)],
        10: [row(10, accuracy=0.3098, nll=3.28, batch_nll=2.98)],
    }
    terms = [(0.16 - 0.163) / 0.015, (4.5 - 4.66) / 0.15, -1.0, 2.0]
    assert distance(cells, "nll") == pytest.approx(math.sqrt(sum(term**2 for term in terms) / 4))
    terms[1], terms[3] = 0.0, 0.0
    assert distance(cells, "batch_nll") == pytest.approx(math.sqrt(sum(term**2 for term in terms) / 4))
    diverged = row(accuracy=None, nll=None, batch_nll=None, mean_sample_nll=None, ece=None)
    assert distance({1: [row(), diverged]}, "nll") == math.inf
    assert "| 1 of 2 |" in report([row(), diverged])


def test_the_table_has_the_nearest_setting_first():
    """By either NLL, settings with more ipc before others; the paper's numbers beside ours."""
    rows = [row(accuracy=0.13), row(10, accuracy=0.31, nll=3.05, batch_nll=3.1)]
    rows += [row(d="0", nll=9.0), row(10, d="0", accuracy=0.3248, nll=9.0, batch_nll=2.98)]
    rows += [row(d="0.001")]
    header, _, *lines = report(rows).strip().splitlines()
    assert "accuracy % (paper 16.30)" in header
    assert "NLL (paper 2.98)" in header
    assert [line.split(" | ")[0] for line in lines] == ["| d=0", "| default", "| d=0.001"]
    assert "| 1 | 32.5 | 9.00 | 2.98 | 5.00 | 0.200 |" in lines[0]


def test_the_images_are_drawn_by_class_and_keep_their_order(job, digits):
    few = job.some(digits.test, 50, digits, 0)
    assert np.bincount(few.labels).tolist() == [5] * 10
    assert len(np.unique(few.images.reshape(50, -1), axis=0)) == 50
    places = [np.flatnonzero((digits.test.images == image).all((1, 2, 3)))[0] for image in few.images]
    assert places == sorted(places)
    assert not np.array_equal(few.images, job.some(digits.test, 50, digits, 1).images)
    assert job.some(digits.test, 0, digits, 0) is digits.test


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("chain_epochs", "1 2 3", "--chain-epochs has 3 values"),
        ("coresets", "0", "--coresets is 0"),
        ("architectures", "convnet-in convnet-bn", "one network"),
        ("test_images", "-1", "0 or more"),
        ("grid", "eta=0", "--grid eta=0: expected auto or a number above 0"),
        ("grid", "prior=-1", "--grid prior=-1: expected a number of 0 or more"),
        ("grid", "noise=loud", "consistent, gradient or literal"),
        ("grid", "temperature=1", "--grid temperature=1: "),
    ],
)
def test_bad_flags_are_one_line(job, tmp_path, flag, value, message):
    with pytest.raises(UserError, match=message) as error:
        job.calibrate(words(tmp_path / "rows.jsonl", **{flag: value}))
    assert "\n" not in str(error.value)
