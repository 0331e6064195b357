"""Which cells a reproduction makes: one of each seed, with a key and a coreset of its own, and each coreset once."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.exports import write_export
from support.runs import silent

from fbpc_ray.core import sizes
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.sizes import Facts, Rung
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reproduction import run
from fbpc_ray.reproduction.estimate import estimate
from fbpc_ray.reproduction.plan import Options, Task, tasks_of, without_coreset
from fbpc_ray.reproduction.rows import cell_key
from fbpc_ray.reproduction.tables import SCALES, TABLES, Request, cells_of


def request(seeds: int = 2, **base: Any) -> Request:
    scale = SCALES["small"]._replace(distill_seeds=seeds)
    sources: dict[str, str] = dict.fromkeys(("cifar10", "cifar100", "tiny-imagenet"), "digits")
    return Request(scale, sources, (1,), {}, Config().updated(**base))


def tasks(table: str, out: Path, *only: str, seeds: int = 2) -> list[Task]:
    return tasks_of(Options(table, "small", request(seeds), out, only, None, 3, False), silent)


def test_each_seed_has_its_own_key_and_coreset(tmp_path):
    """With a key in common, the rows of the first seed would count as those of the second."""
    made = tasks("table1", tmp_path, "FBPC/", "Random/", seeds=3)
    assert [(task.cell.row, task.cell.config.distillation.seed) for task in made] == [
        (row, seed) for row in ("Random", "FBPC") for seed in (0, 1, 2)
    ]
    assert len({task.key for task in made}) == len({task.coreset for task in made}) == 6


def test_keys_depend_on_what_the_initial_coreset_holds(digits, tmp_path):
    """Not on where its file lies, nor on its format; keys of cells without one are what they were."""
    images = torch.zeros(10, 1, 8, 8)
    first = Coreset(images, torch.arange(10), digits.mean, digits.std, digits.classes, facts={"method": "vbpc"})

    def made(overrides: dict[str, Any]) -> list[Task]:
        own = request(2)._replace(overrides=overrides)
        return tasks_of(Options("table1", "small", own, tmp_path / "out", ("FBPC/",), None, 3, False), silent)

    def keys(path: str) -> list[tuple[str, Path]]:
        these = made({"initial_coreset": str(tmp_path / path)})
        assert {task.cell.config.distillation.initial_coreset for task in these} == {str(tmp_path / path)}
        return [(task.key, task.coreset) for task in these]

    for name in ("a", "sub/b"):
        coreset.save(first, tmp_path / f"{name}.safetensors")
    write_export(first, "npz", tmp_path / "c.npz")
    before = keys("a.safetensors")
    assert len(set(before)) == 2
    assert before == keys("sub/b.safetensors") == keys("c.npz")
    cells = [(task.cell, task.key) for task in made({})]
    assert all(key == cell_key("table1", *cell[:2], cell.judged_on, cell.config) for cell, key in cells)
    without = [(task.key, task.coreset) for task in made({})]
    coreset.save(first._replace(images=images + 1), tmp_path / "a.safetensors")
    after = keys("a.safetensors")
    coreset.save(first._replace(soft_labels=torch.eye(10)), tmp_path / "a.safetensors")
    every = [*without, *before, *after, *keys("a.safetensors")]
    assert len({key for key, _ in every}) == len({folder for _, folder in every}) == 8
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError, match="coreset not found"):
        keys("a.safetensors")


def test_costs_of_another_machine_are_measured_again(tmp_path):
    """Their seconds and bytes depend on device and threads; scores, whose last bits do, keep their rows."""
    for table, again in (("table9", True), ("table1", False)):
        keys = [
            {
                task.key
                for task in tasks_of(
                    Options(table, "small", request(1, **machine), tmp_path, (), None, 3, False), silent
                )
            }
            for machine in ({}, {"threads": 2}, {"device": "cuda"}, {"compiled": "off"})
        ]
        assert len(set.union(*keys)) == (len(keys) if again else 1) * len(keys[0])


def test_cells_on_several_networks_share_a_coreset_which_is_made_once(tmp_path):
    made = tasks("table5", tmp_path)
    assert len(made) == 10 and len({task.key for task in made}) == 10
    one, other = without_coreset(made)
    assert (one, other) == (made[0], made[1]), "the first cell of each seed"
    assert {task.coreset for task in made} == {one.coreset, other.coreset}
    path = RunDirectory(one.coreset).coreset_path
    path.parent.mkdir(parents=True)
    path.touch()
    assert without_coreset(made) == [other]


def test_the_estimate_counts_each_expert_coreset_and_chain_once(tmp_path, monkeypatch):
    """Two seeds share 5 experts of 6 epochs. A chain of table3 predicts each test image clean and under 10 corruptions
    at 5 severities; one network trained 100 steps costs less than a chain of 1,000 epochs."""
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    fbpc, wide = tasks("table1", tmp_path, "FBPC/ipc 1", seeds=2), tasks("table5", tmp_path, "ipc 1/", seeds=1)
    one, two = (estimate(fbpc[:count], fbpc[:count], "scores", 0, "cpu") for count in (1, 2))
    assert two == pytest.approx((one.experts, 2 * one.distillation, 2 * one.chains))
    facts = Facts(1437, 10, (1, 8, 8), 360, cores=1, overrides=fbpc[0].cell.config.flat())
    rung = Rung(32, 5, 0, 64, 300, 1, 1000)
    whole = sizes.estimate(facts, rung, "cpu")
    assert one == pytest.approx((whole.experts, whole.distillation, whole.chains / 2))
    corrupted = estimate([], fbpc[:1], "corruptions", 0, "cpu").chains
    one_prediction = sizes._images(facts, rung, "cpu", 1) / 3
    assert corrupted - one.chains == pytest.approx(10 * 360 * 50 * one_prediction)
    grid = estimate([], fbpc[:1], "grid", 36, "cpu").chains
    assert grid - one.chains == pytest.approx(10 * 36 * one_prediction)
    logits = estimate([], fbpc[:1], "logits", 0, "cpu").chains
    assert one.chains - logits == pytest.approx(10 * 359 * one_prediction), "of one image"
    given: Any = SimpleNamespace(name="theirs")
    assert estimate([fbpc[0]._replace(outside=given)], [], "grid", 0, "cpu") == (0, 0, 0), "others made it"
    judged = {task.cell.judged_on: estimate([], [task], "scores", 0, "cpu").chains for task in wide}
    assert judged["resnet18-in"] > 2 * judged["convnet-in"]
    trained = fbpc[0]._replace(cell=fbpc[0].cell._replace(config=fbpc[0].cell.config.updated(inference="mse")))
    assert estimate([], [trained], "scores", 0, "cpu").chains < one.chains / 5


def test_a_dry_run_estimates_the_time_of_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    lines: list[str] = []
    options = Options("table1", "small", request(1, backend="serial"), tmp_path, ("FBPC/",), None, 3, True)
    run.reproduce(options, lines.append)
    assert lines[0] == "table1: 1 cells, 3 of 3 rows to make"
    assert re.fullmatch(
        r"time: about .* on 1 CPU core \(experts .*, distillation .*, chains .*\), by a rough formula", lines[1]
    )
    assert lines[2:] == ["1 coresets to distil; dry run: nothing was written"]
    lines.clear()
    run.reproduce(options._replace(table="table9", only=()), lines.append)
    assert [line.split(":")[0] for line in lines] == ["table9", "0 coresets to distil; dry run"], "costs are measured"


def test_folders_and_downloads_of_the_command_hold_for_every_cell():
    places = {"data_root": "mine", "download": True, "experts": "theirs", "threads": 3}
    for table in TABLES:
        for cell in cells_of(table, request(**places)):
            flat = cell.config.flat()
            assert {name: flat[name] for name in places} == places
