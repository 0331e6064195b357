"""Every table and figure of the paper at a tiny size on real digits, from experts to Markdown; and what a cell is."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.errors import refusal
from support.runs import foreign_flags, refused

from fbpc_ray.commands import main
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.data.corruptions import CORRUPTIONS
from fbpc_ray.reproduction import run
from fbpc_ray.reproduction.cost import measure
from fbpc_ray.reproduction.paper import PAPER
from fbpc_ray.reproduction.plan import Options, tasks_of
from fbpc_ray.reproduction.render import _points, _title, markdown, picture, scale_of
from fbpc_ray.reproduction.rows import SCHEMA, cell_key, coreset_key
from fbpc_ray.reproduction.run import _described, _of_these_images
from fbpc_ray.reproduction.tables import SCALES, TABLES, Request, cells_of

TINY = [
    "steps=2", "width=8", "expert_count=1", "expert_epochs=2", "expert_batch_size=256", "syn_steps=2", "gamma=1.5",
    "posterior_steps=2", "map_lr=0.02", "chain_epochs=4", "chain_every=2", "alpha=1", "mc_samples=2", "threads=1",
]  # fmt: skip
SOURCES = {"cifar10": "cifar10", "cifar100": "cifar100", "tiny-imagenet": "tiny-imagenet"}


def words(table, out, *more):
    data = f"npz:{out.parent / 'digits16.npz'}"
    return [
        table, "--backend", "serial", "--cifar10", data, "--cifar100", data, "--tiny-imagenet", data,
        "--ipc", "1", "10", "--distill-seeds", "1", "--num-chains", "1", "--cost-steps", "1", "--out", str(out),
        "--no-tracking", *more, "--override", *TINY,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory, digits):
    """Where all tables go, so that they share experts and coresets; beside it 500 digits at 16x16, for LeNet."""
    folder = tmp_path_factory.mktemp("reproduction")
    arrays = {}
    for part, split, count in (("train", digits.train, 400), ("test", digits.test, 100)):
        arrays[f"x_{part}"] = split.images[:count, 0].repeat(2, axis=1).repeat(2, axis=2)
        arrays[f"y_{part}"] = split.labels[:count]
    np.savez(folder / "digits16.npz", **arrays)
    before = os.environ.get("FBPC_HOME")
    os.environ["FBPC_HOME"] = str(folder)
    yield folder / "out"
    os.environ.pop("FBPC_HOME") if before is None else os.environ.update(FBPC_HOME=before)


def rows_of(out, table):
    return [row for path in (out / "rows" / table).glob("*.parquet") for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("table", [table for table in TABLES if table != "grid-cifar100"])  # as grid
def test_each_table_is_made_from_scratch(table, out, capsys):
    """All rows and columns are there, with finite numbers, their cause, the paper's values, and a picture."""
    ood = ["--ood", f"npz:{out.parent / 'digits16.npz'}"]
    chosen = ["--only", "Random/ipc 1,", "VBPC/ipc 1,", *ood] if table == "grid" else []
    main.main(["reproduce", *words(table, out, *chosen)])
    text, shape = (out / f"{table}.md").read_text(), TABLES[table]
    assert text in capsys.readouterr().out
    assert "small scale" in text
    assert (out / f"{table}.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(out, table)
    for row in rows:
        assert row["table"] == table
        assert row["commit"]
        assert row["coreset_commit"] == (None if shape.kind == "cost" else row["commit"])
        assert json.loads(row["versions"])["torch"]
        assert json.loads(row["config"])["width"] == 8
        for quantity in shape.quantities:
            assert math.isfinite(row[quantity]), (table, row["row"], row["column"], quantity)
    cells = {(row["row"], row["column"]) for row in rows}
    for key in PAPER.get(table, {}):
        if not any(part.endswith("ipc 50") for part in key):  # the small scale has 1 and 10
            assert key in cells
    for name, column in cells:
        assert f"| {name} |" in text
        assert f"| {column or '-'} |" in text
    for name, digits in {"table1": "35.45 ± 0.31", "table3": "degradation %", "table7": "2.56"}.items():
        assert (digits in text) or table != name
    assert ("frost is made with procedural textures" in text) == (table in ("table3", "grid"))
    if table == "grid":
        by_column = {}
        for row in rows:
            by_column.setdefault((row["row"], row["column"]), []).append(row["nll"])
        assert len({tuple(values) for values in by_column.values()}) == 2 * 5, "every inference has its own scores"
        assert "](grid-seconds.png)" in text
        assert (out / "grid-seconds.png").read_bytes().startswith(b"\x89PNG")
        assert "OOD AUROC" in text and "CPU seconds to judge" in text


@pytest.mark.slow
def test_what_is_there_is_not_made_again(out, capsys):
    """A row that is lost is made again alone, from the coreset that is there; tables share coresets."""
    main.main(["reproduce", *words("table1", out)])
    folder = out / "rows" / "table1"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    coresets = {path: path.stat().st_mtime_ns for path in (out / "coresets").rglob("*.safetensors")}
    lost = next(path for path in folder.iterdir() if pq.read_table(path)["row"][0].as_py() == "FBPC")
    old = pq.read_table(lost).drop_columns(["judge_seconds"])
    lost.unlink()
    capsys.readouterr()
    main.main(["reproduce", *words("table1", out)])
    assert "12 cells, 1 of 12 rows to make" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {lost.name}
    assert pq.read_table(lost).drop_columns(["judge_seconds"]) == old
    main.main(["reproduce", *words("table10", out, "--only", "FBPC (DSA)")])
    assert {path: path.stat().st_mtime_ns for path in coresets} == coresets
    used = {row["coreset"] for row in rows_of(out, "table10") if row["row"] == "FBPC (DSA)"}
    assert used == {row["coreset"] for row in rows_of(out, "table1") if row["row"] == "FBPC"}


@pytest.mark.ray
@pytest.mark.slow
def test_ray_makes_the_same_rows(out):
    """Cells as Ray tasks: another folder, two workers, the same numbers to the bit."""
    main.main(["reproduce", *words("table10", out)])
    elsewhere = out.parent / "elsewhere"
    command = [word if word != "serial" else "ray" for word in words("table10", elsewhere, "--address", "local")]
    process = subprocess.run(
        [sys.executable, "-m", "fbpc_ray", "reproduce", *command], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    columns = ("row", "column", "accuracy", "nll", "ece", "brier")
    serial, on_ray = (
        [[row[name] for name in columns] for row in rows_of(folder, "table10")] for folder in (out, elsewhere)
    )
    assert sorted(serial) == sorted(on_ray) != []


def paper_request(scale="paper", **overrides):
    return Request(SCALES[scale], SOURCES, (), overrides, Config())


@pytest.mark.slow
def test_a_cell_that_fails_leaves_the_others(out, capsys):
    """An absurd alpha ends every distillation; the random cell is judged, and the exit status is not zero."""
    elsewhere = out.parent / "failing"
    with pytest.raises(SystemExit) as stop:
        main.main(["reproduce", *words("table10", elsewhere, "--only", "FBPC"), "alpha=1e30"])
    assert stop.value.code == 1
    assert re.search(r"4 of the coresets could not be made.*non-finite", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main.main(["reproduce", *words("table1", elsewhere, "--only", "Random", "FBPC/"), "alpha=1e30"])
    assert {row["row"] for row in rows_of(elsewhere, "table1")} == {"Random"}
    assert "| Random |" in (elsewhere / "table1.md").read_text()


@pytest.mark.parametrize("table", PAPER)
def test_every_number_of_the_paper_has_its_cell(table):
    """At the paper's scale: the cells are the table's, and BPC-W, which we add to Table 1."""
    cells = {(cell.row, cell.column) for cell in cells_of(table, paper_request())}
    if table == "table3":  # one chain fills the columns
        columns = [corruption.abbreviation for corruption in CORRUPTIONS.values()] + ["Avg."]
        cells = {(row, column) for row, _ in cells for column in columns}
    added = {"table1": {("BPC-W", f"ipc {ipc}") for ipc in (1, 10, 50)}, "table6": {("ResNet18", "on ConvNet")}}
    assert cells - set(PAPER[table]) == added.get(table, set())
    assert set(PAPER[table]) <= cells


def test_at_the_papers_scale_settings_are_table_4s():
    for cell in cells_of("table1", paper_request()):
        if cell.row == "FBPC":
            name = f"cifar10-{cell.column.replace(' ', '')}"
            assert cell.config == preset(name)
    resnet = next(cell for cell in cells_of("table6", paper_request()) if cell.row == "ResNet18 + ConvNet")
    assert resnet.config.networks.architectures == ("resnet18-in", "convnet-in")
    assert resnet.config.distillation.ipc == 10
    none = {cell.config.networks.augment for cell in cells_of("table10", paper_request()) if "no DSA" in cell.row}
    assert none == {"none"}


def test_the_small_scale_bounds_what_it_says():
    for table in ("table1", "table2", "fig2a"):
        for cell in cells_of(table, paper_request("small")):
            flat = cell.config.flat()
            assert (flat["width"], flat["expert_count"], flat["expert_epochs"]) == (32, 5, 6)
            assert flat["steps"] <= 300
            assert flat["start_epoch"] <= 5
    assert cells_of("table1", paper_request("small", steps=7))[3].config.distillation.steps == 7
    (tiny,) = (c for c in cells_of("table2", paper_request("small", expert_epochs=2)) if c.row == "FBPC" and
               c.column == "Tiny-ImageNet ipc 10")  # fmt: skip
    assert tiny.config.distillation.start_epoch == 1


def test_the_grid_is_every_method_by_every_inference():
    cells = cells_of("grid", paper_request("small"))
    assert len({(cell.row, cell.column) for cell in cells}) == len(cells) == 9 * 5 * 2
    by_name = {(cell.row, cell.column): cell.config for cell in cells}
    assert by_name["FBPC", "ipc 10, SGHMC, strong prior"].evaluation.chain_weight_decay == 3
    assert by_name["FBPC", "ipc 1, SGHMC"] == preset("cifar10-ipc1").updated(**SCALES["small"].changes, steps=300)
    assert by_name["FBPC improved", "ipc 1, ensemble"].distillation.views == 8
    vbpc = by_name["VBPC", "ipc 1, SGHMC"]
    assert (vbpc.distillation.steps, vbpc.distillation.real_batch_size, vbpc.networks.width) == (3000, 256, 32)
    assert len({coreset_key(cell.config) for cell in cells}) == 9 * 2, "a coreset is made once for all inferences"
    assert [name for name, table in TABLES.items() if table.figure == "scatter"] == ["grid", "grid-cifar100"]
    assert {cell.config.distillation.ipc for cell in cells_of("grid-cifar100", paper_request("small"))} == {1}


def test_keys_hold_what_a_number_depends_on():
    """A coreset does not depend on how it is judged or where it is made; a random one only on data, ipc and seed."""
    fbpc, random = preset("cifar10-ipc1"), preset("cifar10-ipc1").updated(method="random")
    for other in ({"chain_eta": 0.01}, {"device": "cpu"}, {"experts": "/x"}, {"out": "/y"}, {"num_chains": 9}):
        assert coreset_key(fbpc.updated(**other)) == coreset_key(fbpc)
    for other in ({"alpha": 1.0}, {"seed": 1}, {"steps": 5}, {"width": 8}, {"augment": "none"}, {"data": "digits"}):
        assert coreset_key(fbpc.updated(**other)) != coreset_key(fbpc)
    for other in ({"alpha": 1.0}, {"steps": 5}, {"width": 8}, {"augment": "none"}, {"expert_count": 3}):
        assert coreset_key(random.updated(**other)) == coreset_key(random)
    for other in ({"seed": 1}, {"data": "digits"}, {"ipc": 2}):
        assert coreset_key(random.updated(**other)) != coreset_key(random)
    key = cell_key("table1", "FBPC", "ipc 1", "convnet-in", fbpc)
    assert key != cell_key("table1", "FBPC", "ipc 1", "convnet-in", fbpc.updated(chain_eta=0.01))
    assert key != cell_key("table1", "FBPC", "ipc 1", "convnet-bn", fbpc)
    assert key == cell_key("table1", "FBPC", "ipc 1", "convnet-in", fbpc.updated(gpus_per_actor=0.5))


@pytest.mark.slow
def test_the_figure_of_the_grid_has_accuracy_against_ece_by_ipc():
    same = {"distill_seed": 0, "row": "VBPC"}
    rows = [
        {**same, "column": "ipc 1, ensemble", "accuracy": 0.25, "ece": 0.5},
        {**same, "column": "ipc 1, ensemble", "accuracy": 0.75, "ece": 0.25},
        {**same, "column": "ipc 10, last layer", "accuracy": 0.5, "ece": 0.125},
        {**same, "column": "ipc 10, SGHMC", "accuracy": None, "ece": None},
    ]
    assert _points(rows, ("accuracy",), "ece") == {
        "ipc 1": {("VBPC", "ensemble"): (50.0, 0.375)}, "ipc 10": {("VBPC", "last layer"): (50.0, 0.125)}
    }  # fmt: skip


@pytest.mark.slow
def test_cost_is_measured_in_its_own_process(tmp_path):
    """A hundred times the images take more memory and time; parameters are the network's.

    Four times K and S, or three networks, would take so many times the memory if all of it were kept; two leaves room
    for the allocator's moods.
    """
    config = preset("digits").updated(
        width=16, gamma=1.0, posterior_steps=5, mc_samples=5, architectures=("convnet-in",)
    )
    one, many = (measure(config.updated(ipc=ipc, batch_size=1000), "cpu", 2) for ipc in (1, 100))
    assert len(one.seconds) == 2
    assert one.parameters == 16 * 9 + 16 * 3 + 16 * 16 * 9 + 16 * 3 + 16 * 4 * 10 + 10
    assert many.peak_gb > 3 * max(one.peak_gb, 0.001)
    assert min(many.seconds) > min(one.seconds)  # what else the machine does makes single steps slow
    longer = config.updated(ipc=100, batch_size=1000, posterior_steps=20, mc_samples=20)
    assert measure(longer, "cpu", 2).peak_gb < 2 * many.peak_gb
    three = config.updated(ipc=100, batch_size=1000, architectures=("convnet-in", "convnet-gn", "convnet-none"))
    assert measure(three, "cpu", 2).peak_gb < 2 * many.peak_gb  # one after the other on one device
    with pytest.raises(UserError, match=r"measurement failed: .*nowhere"):
        measure(config.updated(data="npz:/nowhere.npz"), "cpu", 1)


@pytest.mark.slow
def test_a_killed_measurement_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dying.py").write_text(
        "import os, signal, sys\n\n\ndef build(shape, classes):\n    print('a warning', file=sys.stderr, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    line = refusal(measure, preset("digits").updated(architectures=("dying:build",)), "cpu", 1)
    assert line.startswith(
        "the measurement failed: signal 9 ended its process, as it does when memory runs out; free memory"
    )


@pytest.mark.parametrize(
    "more, message",
    [
        (["table4"], "unknown table 'table4'"),
        (["table1", "--only", "nothing"], "--only 'nothing': no such cell in table1; .*'Random/ipc 1', .* or parts"),
        (["table1", "--only", "Random", "FBCP/"], "--only 'FBCP/': no such cell"),
        (["table1", "--override", "stepz=3"], "FLAG=VALUE.*steps"),
        (["table1", "--override", "steps=many"], "must be of type int, got 'many'"),
        (["table1", "--override", "ipc=3"], "the table sets ipc"),
        (["table1", "--ipc", "0"], "--ipc: must be 1 or more, got 0"),
        (["table1", "--num-chains", "-1"], "--num-chains: must be 0 or more, got -1"),
        (["table1", "--cifar10", "npz:/nowhere.npz"], "nowhere"),
        (["table3", "--corruptions", "/nowhere", "--cifar10", "digits"], "nowhere"),
        (
            ["table1", "--corruptions", "/nowhere"],
            "table1 has no use for it; .* choose table3 or grid or grid-cifar100",
        ),
        (["table3", "--ood", "digits"], "--ood: table3 has no use for it; leave it out, or choose grid"),
        (["table1", "--distill-seeds", "-1"], "--distill-seeds: must be 0 or more, got -1"),
        (["table7", "--cost-steps", "0"], "--cost-steps: must be 1 or more, got 0"),
        (["table1", "--cifar10", "digits", "--override", "learn-labels=true"], "Random/ipc 1: .*; --only makes other"),
        (["grid", "--ood-resize"], "there is no --ood to resize"),
        (["table1", "--override", "num-chains=9"], "num_chains=...: changes no cell; give --num-chains itself"),
        (["table1", "--override", "experts=/x"], "give --experts itself"),
        (["grid", "--override", "inference=mse"], "the table sets inference"),
        (
            ["table1", "--download", "--dry-run", "--data-root", "/nowhere"],
            "cifar10 is missing .* in /nowhere: download",
        ),
    ],
)
def test_bad_input_is_one_line(more, message, tmp_path, capsys):
    error = refused(capsys, *more, "--out", str(tmp_path / "out"), "--backend", "serial", command="reproduce")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (["start_epoch=9", "expert_epochs=2"], "start_epoch=9 (from) .* or raise --override expert_epochs=...; --only"),
        (["width=4.5"], "error: --override width=...: must be of type int, got 4.5"),
        (["depth=5"], "lower --override depth=..."),
        (["method=foo"], "error: method: got 'foo'; did you mean frepo?"),
        (
            ["draws_per_step=9", "pool_size=3"],
            "--override draws_per_step=9: vbpc .*; raise --override pool_size=... to",
        ),
        (["precision=bf16"], "--override precision=bf16: method vbpc supports fp32 alone; use --override precision="),
        (["memory_budget=1GB"], "--override memory_budget=1GB: the gradient of method vbpc can't be computed in"),
        (["threads=-3"], "--threads: must be 0 or more, got -3"),
    ],
)
def test_errors_name_flags_of_the_command_and_overrides(more, advice, tmp_path, capsys):
    chosen = ["--only", "VBPC/"] if "vbpc" in advice else []
    table = ["grid" if chosen else "table1", "--cifar10", "digits", "--out", str(tmp_path / "out"), *chosen]
    error = refused(capsys, *table, "--backend", "serial", "--override", *more, command="reproduce")
    assert re.search(advice.replace("(", r"\(").replace(")", r"\)").replace("...", r"\.\.\."), error), error


def test_the_log_names_overrides(tmp_path, capsys):
    """Experts of two epochs on few batches are too short: the note says what to give."""
    data = ["--cifar10", "digits", "--backend", "serial", "--distill-seeds", "1", "--no-tracking"]
    main.main([
        "reproduce", "fig3", *data, "--out", str(tmp_path / "out"), "--experts", str(tmp_path / "experts"),
        "--override", *TINY,
    ])  # fmt: skip
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "too few to learn" in line]
    assert "try --override expert_batch_size=32 expert_lr=0.05, or more --override expert_epochs=..." in note
    assert not foreign_flags(note, "reproduce", ["--override"])


def test_rows_of_other_corrupted_images_are_made_again(tmp_path):
    """Those of table 3 say which images they were scored on; rows of earlier code don't."""
    request = paper_request("small")
    generated = Options("table3", "small", request, tmp_path, (), None, 1, False)
    official = generated._replace(corruptions=Path("/cifar-10-c"))
    rows = [_described(generated, None), _described(official, None), {"corruptions": None}]
    assert "generated with seed 0" in rows[0]["corruptions"] and "/cifar-10-c" in rows[1]["corruptions"]
    assert _of_these_images(generated, None, rows) == [rows[0], rows[2]]
    assert _of_these_images(official, None, rows) == [rows[1], rows[2]]
    assert _of_these_images(generated._replace(table="table1"), None, rows) == rows


def test_a_grid_of_diverged_chains_has_no_picture(tmp_path):
    empty = dict.fromkeys(SCHEMA.names) | {"row": "VBPC", "column": "ipc 1, SGHMC"}
    assert not picture("grid", "small", [empty], tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()
    options = Options("grid", "small", paper_request("small"), tmp_path, (), None, 1, False)
    made = empty | {"commit": "c", "device": "cpu", "versions": "{}", "distill_seed": 0, "eval_seed": 0}
    text = run._write(options, [], [made]).read_text()
    assert "grid.png" not in text and "| VBPC | - |" in text


def test_the_title_names_every_override():
    request = paper_request("small", alpha=300.0, views=8)
    text = markdown("table1", "small", request, [cell.config for cell in cells_of("table1", request)], [], [], ())
    assert "; every cell with alpha=300.0, views=8." in text
    assert "every cell" not in markdown("table1", "small", paper_request("small"), [Config()], [], [], ())


@pytest.mark.parametrize(
    ("scale", "overrides", "words", "of_picture"),
    [
        ("small", {"views": 8}, "**At small scale, not the paper's**: ", " (small\u00a0scale)"),
        ("paper", {}, "At the paper's scale: ", ""),
        ("paper", {"threads": 1}, "At the paper's scale: ", ""),
        (
            "paper",
            {"views": 8},
            "**At the paper's scale, but for overrides**: ",
            " (paper's\u00a0scale,\u00a0overridden)",
        ),
    ],
)
def test_the_scale_is_that_of_the_cells(scale, overrides, words, of_picture):
    request = paper_request(scale, **overrides)
    text = markdown("table1", scale, request, [cell.config for cell in cells_of("table1", request)], [], [], ())
    assert text.splitlines()[2].startswith(words)
    assert _title("table1", scale_of(scale, request)) == TABLES["table1"].title + of_picture


def test_an_override_of_the_machine_and_a_relative_path_reach_the_cells(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", images=digits.train.images[:10], labels=np.arange(10))
    seen: list[Options] = []
    monkeypatch.setattr(run, "reproduce", lambda options, log: (seen.append(options), []))
    words = ["fig3", "--cifar10", "digits", "--backend", "serial", "--dry-run"]
    main.main(["reproduce", *words, "--override", "threads=3", "compiled=off", "initial-coreset=a.npz"])
    (task,) = tasks_of(seen[0], print)[:1]
    workers = task.cell.config.workers
    assert (workers.backend, workers.threads, workers.compiled) == ("serial", 3, "off")
    assert task.cell.config.distillation.initial_coreset == str(tmp_path / "a.npz")


@pytest.mark.slow
def test_a_table_is_a_run_in_mlflow(out, tmp_path, monkeypatch):
    """Its cells are metrics, its Markdown, picture and rows artifacts, its commit and scale tags."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    command = [word for word in words("table10", out) if word != "--no-tracking"]
    main.main(["reproduce", *command])
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "table10-small"
    assert run.data.tags["table"] == "table10"
    assert run.data.tags["commit"]
    (row,) = (r for r in rows_of(out, "table10") if (r["row"], r["column"]) == ("FBPC (DSA)", "ipc 1"))
    assert run.data.metrics["accuracy/FBPC _DSA_/ipc 1"] == pytest.approx(100 * row["accuracy"])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "table10.md",
        "table10.png",
        "rows",
        "table10-by-ipc.png",
    }


def test_a_row_of_another_program_is_named(tmp_path, capsys):
    folder = tmp_path / "out" / "rows" / "table1"
    folder.mkdir(parents=True)
    (folder / "strange.parquet").write_text("no parquet")
    with pytest.raises(SystemExit):
        main.main(["reproduce", "table1", "--cifar10", "digits", "--out", str(tmp_path / "out"), "--backend", "serial"])
    assert re.search(r"strange.parquet cannot be read .*: delete it", capsys.readouterr().err)
    assert list(Path(folder).iterdir())
