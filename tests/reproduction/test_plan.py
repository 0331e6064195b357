"""Which cells a reproduction makes: one of each seed, with a key and a coreset of its own, and each coreset once."""

from pathlib import Path
from typing import Any

from support.runs import silent

from fbpc_ray.core.config import Config
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reproduction.plan import Options, Task, tasks_of, without_coreset
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


def test_folders_and_downloads_of_the_command_hold_for_every_cell():
    places = {"data_root": "mine", "download": True, "experts": "theirs", "threads": 3}
    for table in TABLES:
        for cell in cells_of(table, request(**places)):
            flat = cell.config.flat()
            assert {name: flat[name] for name in places} == places
