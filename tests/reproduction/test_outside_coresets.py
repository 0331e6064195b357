"""Rows of a grid by path: coresets that others made, with soft labels and whitened images."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from fbpc_ray.commands import main
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.reproduction import grid
from fbpc_ray.reproduction.outside_coresets import parse, read
from fbpc_ray.reproduction.tables import SCALES, Request, cells_of


@pytest.fixture(scope="module")
def files(tmp_path_factory, digits):
    """20 whitened images with probabilities as labels, and the whitening: minus the mean, times 3."""
    folder = tmp_path_factory.mktemp("others")
    source = np.random.default_rng(0)
    probabilities = source.dirichlet(np.ones(10), 20).astype(np.float32)
    np.savez(folder / "set.npz", images=3 * source.normal(size=(20, 1, 8, 8)).astype(np.float32), labels=probabilities)
    np.savez(folder / "zca.npz", mean=np.full(64, 0.5), matrix=3 * np.eye(64))
    np.savez(folder / "data.npz", x_train=digits.train.images[:400, 0], y_train=digits.train.labels[:400],
             x_test=digits.test.images[:100, 0], y_test=digits.test.labels[:100])  # fmt: skip
    return folder


def test_a_row_has_a_cell_for_every_inference_at_its_own_size(files, digits):
    (one,), notes = read({"RCIG": str(files / "set.npz")}, {"RCIG": str(files / "zca.npz")}, digits)
    assert one.coreset.soft_labels is not None and one.whitening is not None
    assert notes[0].startswith("RCIG: ")
    sources: dict[str, str] = dict.fromkeys(["cifar10", "cifar100", "tiny-imagenet"], "digits")
    (first, *_) = cells_of("grid", Request(SCALES["small"], sources, (1,), {}, Config()))
    cells = {cell.column: cell.config for cell in one.cells(first)}
    assert list(cells) == [f"ipc 2, {column}" for column in grid.INFERENCES]
    assert cells["ipc 2, SGHMC, strong prior"].evaluation.chain_weight_decay == 3.0
    assert cells["ipc 2, last layer"].evaluation.inference == "last-layer"
    (other,), _ = read({"RCIG": str(files / "set.npz")}, {}, digits)
    assert other.folder_name != one.folder_name, "the same images without their whitening are another row"


def test_what_names_no_row_is_refused(files, digits):
    for words, line in (
        (("RCIG",), "--coreset-row RCIG: must be NAME=PATH"),
        (("a=x", "a=y"), "the name a is there twice"),
    ):
        with pytest.raises(UserError, match=line):
            parse(words, "--coreset-row")
    with pytest.raises(UserError, match=r"--whitening b=\.\.\.: no --coreset-row has this name"):
        read({"a": str(files / "set.npz")}, {"b": "zca.npz"}, digits)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["table1", "--coreset-row", "a=set.npz"], "table1 has no such rows"),
        (["grid", "--coreset-row", "VBPC=set.npz"], "the grid has a row of this name"),
        (["grid", "--coreset-row", "a=/nowhere.npz"], "/nowhere.npz: coreset not found"),
    ],
)
def test_bad_rows_are_one_line(words, line, files, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--backend", "serial", "--cifar10", f"npz:{files / 'data.npz'}"]
    with pytest.raises(SystemExit) as stop:
        main.main(["reproduce", *words, *out])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whitened_row_is_judged_on_whitened_images(files, tmp_path):
    """Beside the same images without their whitening, which score otherwise; no expert is trained."""
    command = [
        "reproduce", "grid", "--backend", "serial", "--cifar10", f"npz:{files / 'data.npz'}", "--ipc", "2",
        "--coreset-row", f"A={files / 'set.npz'}", f"B={files / 'set.npz'}", "--whitening", f"A={files / 'zca.npz'}",
        "--only", "A/", "B/", "--num-chains", "1", "--out", str(tmp_path / "out"), "--no-tracking",
        "--experts", str(tmp_path / "experts"),
        "--override", "width=8", "chain_epochs=4", "chain_every=2", "threads=1", "net_steps=5",
    ]  # fmt: skip
    main.main(command)
    rows = [row for path in (tmp_path / "out" / "rows" / "grid").glob("*") for row in pq.read_table(path).to_pylist()]
    nll = {(row["row"], row["column"]): row["nll"] for row in rows}
    assert len(nll) == len(rows) == 10
    for column in ("SGHMC", "last layer", "ensemble"):
        assert nll["A", f"ipc 2, {column}"] != nll["B", f"ipc 2, {column}"]
    assert all(row["coreset"].startswith(f"outside-{row['row']}-") for row in rows)
    assert all(row["make_seconds"] is None and row["judge_seconds"] > 0 for row in rows)
    assert not (tmp_path / "experts").exists()
    assert "| A |" in (tmp_path / "out" / "grid.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "rows").rglob("*.parquet")}
    main.main(command)
    assert {path: path.stat().st_mtime_ns for path in before} == before
