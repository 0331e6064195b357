"""Names of earlier code: read in files, taken on the command line, and part of no key of a stored result."""

import json

import pyarrow.parquet as pq
import pytest

from fbpc_ray.commands.arguments import KINDS
from fbpc_ray.commands.parsing import current_words
from fbpc_ray.core.config import Config, Evaluation, current_names, from_json, from_word, original_names
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.reproduction.rows import SCHEMA, Rows, cell_key, coreset_key

OLD = {
    "chain_steps": 50,
    "chain_every": 10,
    "eval_seeds": 7,
    "x_cache": 0.0,
    "map": "pool",
    "map_pool": 4,
    "map_pool_uses": 2,
}
NEW = {
    "chain_epochs": 50, "chain_every": 10, "num_chains": 7, "trajectory_cache_gb": 0.0, "map_init": "warm",
    "warm_pool_size": 4, "warm_pool_uses": 2,
}  # fmt: skip


def test_both_spellings_give_one_configuration():
    """Of a file, of Python, of FLAG=VALUE words."""
    assert current_names(OLD) == NEW
    assert original_names(NEW) == OLD
    assert Config().updated(**OLD) == Config().updated(**NEW) == from_json(json.dumps(OLD), "config.json")
    assert from_word("map=fresh,pool", "--grid") == ("map_init", "prior,warm")
    assert from_word("--chain-steps=5", "--override") == ("chain_epochs", "5")
    with pytest.raises(UserError, match=r"'chain_steps' is the old name of 'chain_epochs', and both are given"):
        Config().updated(chain_steps=5, chain_epochs=5)
    with pytest.raises(UserError, match="--map-init: got 'sideways'"):
        Config().updated(map="sideways")


@pytest.mark.parametrize(
    ("settings", "coreset", "cell"),
    [
        ({}, "d69b924c7e3e139c", "e1dd27087c008de7"),
        ({"map_init": "warm"}, "a55b4b19e3101680", "44c5c78e9bf4ff0b"),
        (NEW, "a678eee12f72e987", "d455a7ffe9299f9c"),
        ({"method": "random"}, "3e84b09e0e068f35", "60c62f8b814062c8"),
    ],
    ids=["digits", "warm", "all renamed", "random"],
)
def test_keys_of_results_are_those_of_the_code_before_the_rename(settings, coreset, cell):
    """Computed by commit d3ba60b. Else `fbpc reproduce` would make every stored coreset and row again."""
    config = preset("digits").updated(chain_eta=0.03, chain_d=0.01, chain_weight_decay=0.05, **settings)
    assert coreset_key(config) == coreset
    assert cell_key("table1", "FBPC", "ipc 1", "convnet-in", config) == cell


def test_rows_with_old_columns_are_read(tmp_path):
    numbers = dict.fromkeys(SCHEMA.names) | {"key": "k", "table": "table1", "eval_seed": 0, "nll": 1.0}
    row = numbers | {"batch_nll": 3.0, "mean_sample_nll": 2.0}
    rows = Rows(tmp_path)
    rows.write([row])
    (path,) = tmp_path.glob("*.parquet")
    table = pq.read_table(path)
    old = {"batch_nll": "nll_of_batches", "mean_sample_nll": "nll_of_samples"}
    pq.write_table(table.rename_columns([old.get(name, name) for name in table.column_names]), path)
    assert rows.read() == [row]


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("distill", "--chain-steps 5 --x-cache 0", "--chain-epochs 5 --trajectory-cache-gb 0"),
        ("distill", "--chain_steps=5 --map=pool", "--chain-epochs=5 --map-init=warm"),
        (
            "distill",
            "--map pool --map-pool 3 --map-pool-uses 1",
            "--map-init warm --warm-pool-size 3 --warm-pool-uses 1",
        ),
        ("distill", "--again --out x", "--resume auto --out x"),
        ("evaluate", "runs/map --eval-seeds 2", "runs/map --num-chains 2"),
        ("evaluate", "runs/map --tune-chain", "runs/map --protocol calibrated"),
        ("evaluate", "runs/map --no-tune-chain", "runs/map --protocol paper"),
        ("reproduce", "table1 --eval-seeds 2", "table1 --num-chains 2"),
        (
            "tune",
            "--samples 3 --evaluate-every 2 --judge-chain-steps 4 --judge-seeds 2",
            "--num-trials 3 --val-every 2 --val-chain-epochs 4 --val-chains 2",
        ),
    ],
)
def test_an_old_flag_is_taken_with_a_note(command, old, new, capsys):
    assert current_words(old.split(), KINDS[command]) == new.split()
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == sum(word.startswith("--") and word not in new.split() for word in old.split())
    assert all(note.startswith("note: --") and "is now --" in note for note in notes)


def test_words_without_an_old_flag_stay(capsys):
    words = [
        "--map-init",
        "warm",
        "--resume",
        "auto",
        "--architectures",
        "map",
        "pool",
        "--out",
        "fresh",
        "--samples",
        "3",
    ]
    assert current_words(words, KINDS["distill"]) == words, "--samples was no flag of distill"
    assert current_words(["--resume", "--out", "x"], KINDS["distill"]) == ["--resume", "yes", "--out", "x"]
    assert current_words(["--no-resume"], KINDS["tune"]) == ["--resume", "no"]
    assert current_words(["--chain-steps", "3"], [Evaluation]) == ["--chain-epochs", "3"]
    assert capsys.readouterr().err.count("\n") == 1
