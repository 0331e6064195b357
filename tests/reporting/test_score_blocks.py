"""Scores of runs in words, tables and charts: by hand."""

from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer
from support.ended_runs import ended_run
from support.figures import saved_figures

from fbpc_ray.evaluation.diagnostics import Mixing
from fbpc_ray.reporting import score_blocks
from fbpc_ray.reporting.document import Picture, Table, Text


def test_the_headline_is_the_score_beside_that_of_random_images():
    assert score_blocks.headline(ended_run("", [0.5, 0.6])) == (
        "The coreset: 55.0 % accuracy, NLL 0.450; as many random real images: 25.0 % accuracy, NLL 0.750 "
        "(360 test images)."
    )
    assert score_blocks.headline(ended_run("", [0.5, None])).startswith("The coreset: a chain diverged; as many")


def test_how_runs_were_scored_is_said_of_what_they_use():
    """The number of chains is that of every run; a setting of another inference makes no difference."""
    first = ended_run("A", [0.5, 0.5])
    cases: list[tuple[dict[str, Any], int, bool]] = [
        ({}, 2, True), ({"num_chains": 3}, 3, True), ({"net_steps": 7, "ensemble_size": 7}, 2, True),
        ({"chain_d": 7.0}, 2, False), ({"width": 8}, 2, False), ({"inference": "mse"}, 2, False),
    ]  # fmt: skip
    for changes, chains, alike in cases:
        text = score_blocks.describe_scoring([first, ended_run("B", [0.5] * chains, **changes)])
        assert f"standard deviation over {'2' if chains == 2 else '2 or 3'} chains" in text
        assert ("were not scored alike" in text) == (not alike)


def test_the_columns_of_mixing_are_those_of_their_names():
    mixing = [Mixing("fbpc", "a", 30, 1.25, 12.4, 1.04, 28.6), Mixing("random", "a", 20, 1.5, 7.0, 2.5, 9.0)]
    text, table = score_blocks.mixing_blocks(mixing)
    assert isinstance(text, Text) and "of what the 20 to 30 samples predict" in text.text
    assert isinstance(table, Table)
    assert table.lines == [
        ["network", "coreset", "R-hat, NLL", "R-hat, image", "ESS, NLL", "ESS, image"],
        ["a", "fbpc", "1.25", "1.04", "12", "29"],
        ["a", "random", "1.50", "2.50", "7", "9"],
    ]


def test_points_of_one_size_are_one_point_of_a_curve():
    points = [("f", 10, (0.9, 0.2)), ("f", 1, (0.5, 0.1)), ("g", 1, (0.1, 0.0)), ("f", 1, (0.7, 0.3)), ("f", 50, None)]
    (curve,) = score_blocks._lines(points)
    assert curve.label == "f"
    assert [tuple(round(value, 9) for value in point) for point in curve.points] == [(1, 0.6, 0.2), (10, 0.9, 0.2)]


def test_how_a_run_was_scored():
    text = score_blocks.describe_scoring([ended_run("A", [0.5, 0.6], chain_epochs=1500, chain_every=150)])
    assert "1,500 epochs per chain" in text and "scored on 360 test images" in text and "over 2 chains." in text
    text = score_blocks.describe_scoring([ended_run("A", [0.5, 0.6], inference="mse", net_steps=1500)])
    assert "1,500 steps, with --inference mse" in text and "over 2 seeds." in text


def test_charts_of_scores_and_costs(monkeypatch):
    """Of run A of one network and one image per class, and run B of two networks and ten."""
    drawn = saved_figures(monkeypatch)
    one, two = ended_run("A", [0.4, 0.6], ("a",)), ended_run("B", [0.7, 0.9], ("a", "b"), ipc=10)
    two.scores[:2] = [score._replace(values={"accuracy": 0.6, "nll": 0.4}) for score in two.scores[:2]]
    one = one._replace(result=one.result | {"seconds_per_step": 2.0})
    two = two._replace(result=two.result | {"seconds_per_step": 5.0})
    two = two._replace(config=two.config.updated(architectures=("convnet-in", "convnet-bn")))
    accuracy, nll = score_blocks.bar_charts(score_blocks.series_of(two.scores[:4]))
    assert isinstance(accuracy, Picture) and accuracy.caption.startswith("accuracy %, higher is better")
    assert isinstance(nll, Picture) and nll.caption.startswith("NLL, lower is better")
    for figure, heights in zip(drawn, ([60, 80], [0.4, 0.2]), strict=True):
        (bars,) = (each for each in figure.axes[0].containers if isinstance(each, BarContainer))
        assert [bar.get_height() for bar in bars] == pytest.approx(heights)
    score_blocks.curve_charts([two, one])
    lines = [axes.containers[0].lines[0].get_xydata() for figure in drawn[2:] for axes in figure.axes]  # type: ignore
    expected = [[[1, 50], [10, 70]], [[1, 0.5], [10, 0.3]], [[1, 2], [10, 5]], [[1, 2], [2, 5]]]
    for points, values in zip(lines, expected, strict=True):
        assert points == pytest.approx(np.array(values, float))
