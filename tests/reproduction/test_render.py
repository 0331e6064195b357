"""The figures and the cells of a reproduction are the means of its rows, beside the paper's values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer
from support.figures import saved_figures

from fbpc_ray.reproduction.paper import PAPER
from fbpc_ray.reproduction.render import cell_means, over_ipc, picture, picture_of_seconds

ROWS: list[dict[str, Any]] = [
    {"row": "FBPC", "column": f"ipc {ipc}", "distill_seed": 0, "accuracy": accuracy, "nll": nll}
    for ipc, accuracy, nll in ((10, 0.5, 1.5), (1, 0.28, 2.4), (1, 0.32, 2.8))
]
"""Of two chains at one image per class; their standard deviation is the square root of 8 points."""


@pytest.fixture
def drawn(monkeypatch):
    return saved_figures(monkeypatch)


def papers(column: str) -> float:
    return PAPER["table1"]["FBPC", column]["accuracy"][0]


def test_means_of_cells_are_in_the_printed_unit():
    assert cell_means("table1", ROWS) == pytest.approx(
        {"accuracy/FBPC/ipc 10": 50, "accuracy/FBPC/ipc 1": 30, "nll/FBPC/ipc 10": 1.5, "nll/FBPC/ipc 1": 2.6}
    )


def test_bars_are_the_first_quantity(drawn, tmp_path: Path):
    assert picture("table1", "small", ROWS, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert papers("ipc 1") == 35.45
    (bars,) = (container for container in axes.containers if isinstance(container, BarContainer))
    assert [bar.get_height() for bar in bars] == pytest.approx([50, 30])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["ipc 10", "ipc 1"]
    spreads = [np.ptp(line[:, 1]) / 2 for group in axes.collections for line in group.get_segments()]  # type: ignore[attr-defined]
    assert spreads == pytest.approx([0, 8**0.5])
    marks = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert marks == [[0, papers("ipc 10")], [1, papers("ipc 1")]]


def test_curves_over_the_images_per_class(drawn, tmp_path: Path):
    assert over_ipc("table1", "small", ROWS, tmp_path / "a.png")
    accuracy, nll = drawn[0].axes
    assert accuracy.containers[0].lines[0].get_xydata() == pytest.approx(np.array([[1, 30], [10, 50]]))
    assert nll.containers[0].lines[0].get_xydata() == pytest.approx(np.array([[1, 2.6], [10, 1.5]]))
    (marks,) = (line for line in accuracy.lines if line.get_marker() == "D")
    assert marks.get_xydata().tolist() == [[1, papers("ipc 1")], [10, papers("ipc 10")]]
    assert not over_ipc("table1", "small", ROWS[1:], tmp_path / "b.png"), "one number of images per class"
    assert not (tmp_path / "b.png").exists()


def test_the_seconds_of_a_grid_are_those_to_make_and_to_judge(drawn, tmp_path: Path):
    row = ROWS[0] | {"column": "ipc 10, last layer", "make_seconds": 10.0, "judge_seconds": 2.5}
    assert picture_of_seconds("grid", "small", [row], tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[12.5, 1.5]]]
    assert axes.get_xscale() == "log"
    assert not picture_of_seconds("grid", "small", [row | {"make_seconds": None}], tmp_path / "b.png")
