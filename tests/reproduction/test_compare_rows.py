"""jobs/compare_rows.py: rows of several folders in one table and one file."""

import json

import compare_rows
import pyarrow.parquet as pq
import pytest

from fbpc_ray.commands import main
from fbpc_ray.core.presets import preset
from fbpc_ray.reproduction.rows import SCHEMA, Rows


def write(folder, accuracies, **settings):
    """A row named FBPC for each accuracy, of one distillation each."""
    config = json.dumps(preset("digits").updated(**settings).flat())
    for seed, accuracy in enumerate(accuracies):
        row = dict.fromkeys(SCHEMA.names) | {
            "key": f"k{seed}", "table": "table1", "row": "FBPC", "column": "ipc 1", "config": config,
            "distill_seed": seed, "eval_seed": 0, "accuracy": accuracy, "nll": 1.0, "ece": 0.1, "brier": 0.2,
        }  # fmt: skip
        Rows(folder).write([row])
    return str(folder)


def test_rows_of_another_folder_have_another_name_and_no_path(tmp_path, capsys):
    plain = write(tmp_path / "plain", (0.50, 0.54, 0.52), data="parquet:/home/me/cifar10", experts="/home/me/experts")
    other = write(tmp_path / "views", (0.55, 0.59, 0.57))
    file = tmp_path / "rows.parquet"
    compare_rows.compare([plain, f"{other}=FBPC, eight views", "--baseline", "FBPC", "--write", str(file)])
    printed = capsys.readouterr().out
    assert "| FBPC, eight views | 57.0 ± 2.0 |" in printed
    assert "| FBPC, eight views | +5.0 (+5.0 to +5.0; 3 pairs) |" in printed
    rows = pq.read_table(file).to_pylist()
    assert [row["row"] for row in rows] == 3 * ["FBPC"] + 3 * ["FBPC, eight views"]
    assert "/home/me" not in str(rows)
    settings = json.loads(rows[0]["config"])
    assert (settings["data"], settings["experts"]) == ("parquet:cifar10", "experts")
    assert json.loads(rows[3]["config"])["data"] == "digits"
    compare_rows.compare([str(tmp_path), "--quantities", "accuracy"])  # the written file is read as folders are
    assert "minus" not in capsys.readouterr().out


def test_rows_and_columns_come_in_the_order_of_the_table(tmp_path, capsys):
    for number, (row, norm) in enumerate([("FBPC-multi", "BN"), ("FBPC-single", "LN"), ("WBPC-single", "IN")]):
        facts = {"table": "fig2a", "row": row, "column": norm, "distill_seed": 0, "accuracy": 0.1 * number}
        Rows(tmp_path).write([dict.fromkeys(SCHEMA.names) | facts | {"key": f"k{number}", "eval_seed": 0}])
    compare_rows.compare([str(tmp_path), "--quantities", "accuracy"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:5]] == ["WBPC-single", "FBPC-single", "FBPC-multi"]
    assert lines[0] == "| accuracy % | IN | LN | BN |"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--baseline", "BPC"], "--baseline BPC: choose from FBPC"),
        (["--quantities", "f1"], "--quantities f1: choose from accuracy"),
        (["EMPTY"], "holds no Parquet files of rows"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, more, message):
    folder, empty = write(tmp_path / "plain", (0.5,)), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit) as stopped:
        main.run(compare_rows.compare, [folder, *(str(empty) if word == "EMPTY" else word for word in more)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
