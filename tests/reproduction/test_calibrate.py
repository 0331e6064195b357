"""The search on the Random rows: what it runs, that it goes on where it stopped, and how it ranks."""

import importlib.util
import json
import math
import statistics
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

FILE = Path(__file__).parents[2] / "jobs" / "calibrate_sghmc.py"
FLAGS = {
    "data": "digits", "width": "8", "backend": "serial", "device": "cpu", "ipc": "1 10", "chain-epochs": "20 10",
    "test-images": "50", "weight-decay": "0 0.1", "noise": "consistent", "dsa": "on off", "coresets": "1",
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
    path = tmp_path_factory.mktemp("calibration") / "rows.json"
    job.calibrate(words(path))
    return path


def test_every_row_is_the_chain_that_it_names(job, out, digits):
    """Eight chains, each with its settings, numbers and cause; one of them again by hand."""
    found = json.loads(out.read_text())
    rows = found["rows"]
    settings = {(row["ipc"], row["weight_decay"], row["dsa"]) for row in rows}
    assert settings == {(ipc, decay, dsa) for ipc in (1, 10) for decay in (0.0, 0.1) for dsa in ("on", "off")}
    assert {(row["ipc"], row["chain_epochs"], row["chain_every"]) for row in rows} == {(1, 20, 2), (10, 10, 1)}
    (run,) = found["runs"]
    assert run["versions"]["torch"]
    assert run["device"]
    assert run["commit"]
    assert run["command"].startswith("jobs/calibrate_sghmc.py --data digits --width 8")

    (row,) = (row for row in rows if (row["ipc"], row["weight_decay"], row["dsa"]) == (10, 0.1, "off"))
    config = job.Config().updated(data="digits", width=8, architectures=("convnet-in",))
    (spec,) = job.session.network_specs(config, digits)
    state, labels = initial_state(digits, 10, 0)
    own = job.Evaluation(chain_epochs=10, chain_every=1, chain_weight_decay=0.1, chain_augment=False)
    shared = context_of(digits, "test", own, state.images.numpy(), labels.numpy())._replace(
        split=job.some(digits.test, 50, digits, 0)
    )
    chain = chains.Chain("x", spec, 0)
    expected = chains.values(chains.run_chain(shared, chain, "cpu"))
    assert {name: row[name] for name in expected} == expected


def test_it_goes_on_where_it_stopped(job, out, tmp_path, capsys, monkeypatch):
    """Nothing is run twice; what is missing is added, with what made it; another length is another row."""
    ran = []
    monkeypatch.setattr(job, "run_chain", lambda *each: ran.append(each) or chains.run_chain(*each))
    path = tmp_path / "rows.json"
    done = json.loads(out.read_text())
    path.write_text(json.dumps({**done, "rows": done["rows"][:5]}))
    job.calibrate(words(path))
    assert len(ran) == 3
    again = json.loads(path.read_text())
    assert [row["run"] for row in again["rows"]] == [0] * 5 + [1] * 3
    forget = ("seconds", "run")
    assert [{k: v for k, v in row.items() if k not in forget} for row in again["rows"]] == [
        {k: v for k, v in row.items() if k not in forget} for row in done["rows"]
    ]
    before = path.read_bytes()
    job.calibrate([*words(path, coresets="2"), "--dry-run"])
    assert "8 of 16 chains" in capsys.readouterr().out
    assert path.read_bytes() == before
    job.calibrate(words(path, chain_epochs="10", ipc="1"))
    assert len(ran) == 3 + 4
    assert len(json.loads(path.read_text())["rows"]) == 12


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
        job.calibrate(words(tmp_path / "rows.json"))
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2


def test_the_folder_of_the_data_is_not_written(job, digits, tmp_path):
    """The name of the data is kept, where it lies is not."""
    arrays = {
        f"{kind}_{part}": getattr(getattr(digits, part), name)[:200]
        for part in ("train", "test")
        for kind, name in (("x", "images"), ("y", "labels"))
    }
    np.savez(tmp_path / "few.npz", **arrays)
    path = tmp_path / "out" / "rows.json"
    few = words(path, data=f"npz:{tmp_path / 'few.npz'}", ipc="1", chain_epochs="2", dsa="off")
    job.calibrate(few)
    text = path.read_text().replace(str(path), "")
    assert str(tmp_path) not in text
    assert "npz:few.npz" in text


def row(setting=("consistent", 0.0, "on"), ipc=1, coreset=0, **numbers: Any) -> dict[str, Any]:
    noise, decay, dsa = setting
    accuracy, nll = numbers.pop("accuracy", 0.163), numbers.pop("nll", 4.66)
    return {
        "noise": noise, "weight_decay": decay, "dsa": dsa, "ipc": ipc, "coreset": coreset, "chain_epochs": 1000,
        "accuracy": accuracy, "nll": nll, "batch_nll": nll, "mean_sample_nll": nll, **numbers,
    }  # fmt: skip


def test_the_misfit_is_its_formula(job):
    """Two settings, two coresets, one ipc, by hand: log NLL and accuracy, the spread pooled over both settings."""
    a, b = ("consistent", 0.005, "on"), ("gradient", 0.005, "on")
    rows = [
        row(a, accuracy=0.15, nll=4.0), row(a, coreset=1, accuracy=0.17, nll=5.0),
        row(b, accuracy=0.13, nll=6.0), row(b, coreset=1, accuracy=0.19, nll=9.0),
    ]  # fmt: skip
    log_spread = (statistics.variance([math.log(4), math.log(5)]) + statistics.variance([math.log(6), math.log(9)])) / 2
    spread = (statistics.variance([0.15, 0.17]) + statistics.variance([0.13, 0.19])) / 2
    expected = {}
    for setting, accuracy, nll in ((a, 0.16, math.sqrt(20)), (b, 0.16, math.sqrt(54))):
        expected[setting] = (math.log(nll) - math.log(4.66)) ** 2 / (1.5 * log_spread + (0.03 / 4.66) ** 2)
        expected[setting] += (accuracy - 0.163) ** 2 / (1.5 * spread + 0.0074**2)
    found = {fit.setting[1:]: fit.misfit for fit in job.fits(rows, "nll")}
    assert found == pytest.approx(expected)
    assert [fit.setting for fit in job.fits(rows, "nll")] == [("sum", *a), ("sum", *b)]


def test_one_prior_on_the_mean_loss_is_a_weight_decay_that_grows_with_the_ipc(job):
    """Rows of 0.05 at ipc 1 and of 0.5 at ipc 10 fit, each bad at the other: no setting of the sum does, the mean's
    does, and the winner says both numbers. A row without prior is in one setting."""
    rows = [
        row(("gradient", decay, "on"), ipc, accuracy=job.PAPER[ipc].accuracy, nll=job.PAPER[ipc].nll * factor)
        for ipc, decay, factor in ((1, 0.05, 1.0), (1, 0.5, 0.5), (10, 0.05, 2.0), (10, 0.5, 1.0))
    ] + [row(("gradient", 0.0, "on"), ipc) for ipc in (1, 10)]
    found = {fit.setting: fit.misfit for fit in job.fits(rows, "nll")}
    assert next(iter(found)) == ("mean", "gradient", 0.05, "on")
    assert found["mean", "gradient", 0.05, "on"] == pytest.approx(0)
    assert {setting[:3] for setting in found} == {
        ("mean", "gradient", 0.05), ("sum", "gradient", 0.05), ("sum", "gradient", 0.5), ("sum", "gradient", 0.0),
    }  # fmt: skip
    assert "winner: --chain-noise gradient --chain-weight-decay 0.05 / 0.5 (" in job.report(rows)


def test_the_definition_that_fits_wins_and_a_setting_needs_every_ipc(job):
    """By the NLL setting a is best, by the lineage's b is, and better, however bad by the other: b is named, with its
    definition."""
    a, b, c = ("consistent", 0.0, "on"), ("gradient", 0.005, "off"), ("gradient", 0.02, "on")
    rows = []
    for ipc, paper in ((1, 4.66), (10, 2.98)):
        accuracy = job.PAPER[ipc].accuracy
        rows += [row(a, ipc, accuracy=accuracy, nll=1.1 * paper, batch_nll=1.5 * paper)]
        rows += [row(b, ipc, accuracy=accuracy, nll=0.5 * paper, batch_nll=paper)]
    rows += [row(c, 1)]
    assert [fit.setting for fit in job.fits(rows, "nll")] == [("sum", *a), ("sum", *b)]
    text = job.report(rows)
    assert "winner: --chain-noise gradient --chain-weight-decay 0.005 --no-chain-augment" in text
    assert "by batch_nll" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| sum | gradient"))
    assert "| 32.5 |" in line
    assert "| 1.49 | 2.98 |" in line
    assert "16.30" in text
    assert "2.98" in text
    assert job.report([row(c, 1), row(b, 10)]) == "no setting has rows at every ipc yet"


def test_a_chain_that_diverged_is_last_and_said(job):
    rows = [row(), row(coreset=1), row(("literal", 0.0, "on")), row(("literal", 0.0, "on"), coreset=1)]
    rows[3] |= {"accuracy": None, "nll": None, "batch_nll": None, "mean_sample_nll": None}
    assert [fit.misfit for fit in job.fits(rows, "nll")] == [pytest.approx(0), math.inf]
    assert "| 1 of 2 |" in job.report(rows)


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
        ("weight_decay", "-1", "0 or more"),
    ],
)
def test_bad_flags_are_one_line(job, tmp_path, flag, value, message):
    with pytest.raises(UserError, match=message) as error:
        job.calibrate(words(tmp_path / "rows.json", **{flag: value}))
    assert "\n" not in str(error.value)
