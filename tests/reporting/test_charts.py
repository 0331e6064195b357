"""What the charts show is what the numbers say, and no text lies on another or over the edge."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.text import Text
from PIL import Image
from support.figures import saved_figures

from fbpc_ray.inference.metrics import BINS, log_mixture, log_probabilities, predictive_stats, scores
from fbpc_ray.reporting.charts import comparison, histograms, reliability, scatter, steps, style


def stats(scale=3.0, n=400, seed=0):
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=source)
    logits = scale * (torch.nn.functional.one_hot(labels, 10) + torch.randn(1, n, 10, generator=source))
    return predictive_stats(log_mixture(log_probabilities(logits)), labels)


@pytest.fixture
def drawn(monkeypatch):
    return saved_figures(monkeypatch)


def texts(figure):
    """Every text that is seen, with its box in pixels, of a figure that was saved: that draws and lays it out."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    beyond = [  # ticks that matplotlib keeps but does not draw
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) - 1e-9 <= tick.get_loc() <= max(axis.get_view_interval()) + 1e-9
        for label in (tick.label1, tick.label2)
    ]
    items = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]
    boxes = [(text, text.get_window_extent(canvas.get_renderer())) for text in items]
    return [(text.get_text(), box) for text, box in boxes if box.width]


def assert_readable(figure):
    """No box of text meets another's, none leaves the sheet, none is below 8 points."""
    width, height = figure.canvas.get_width_height()
    boxes = texts(figure)
    assert len(boxes) > 10
    for text, box in boxes:
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, text
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
        assert apart, f"{one!r} lies on {other!r}"
    assert min(text.get_fontsize() for text in figure.findobj(Text)) >= 8


def test_bars_gaps_and_counts_are_the_bins(drawn, tmp_path):
    """Bars stand in their bins as high as its accuracy, dots at its mean confidence, counts below; ECE as `scores`."""
    sums = stats(0.3) + stats(6.0)  # too modest where it is unsure, too sure where it is sure: gaps of both signs
    assert (
        abs((sums.bin_correct - sums.bin_confidence).sum()) < 0.5 * (sums.bin_correct - sums.bin_confidence).abs().sum()
    )
    reliability.reliability_diagram({"fbpc": sums}, tmp_path / "r.png")
    upper, lower = drawn[0].axes
    full = (sums.bin_count > 0).nonzero().flatten()
    bars = [patch for patch in upper.patches if patch.get_width()]
    accuracy, confidence = sums.bin_correct / sums.bin_count, sums.bin_confidence / sums.bin_count
    assert [bar.get_x() for bar in bars] == pytest.approx((full / BINS).tolist())
    assert [bar.get_width() for bar in bars] == pytest.approx([1 / BINS] * len(full))
    assert [bar.get_height() for bar in bars] == pytest.approx(accuracy[full].tolist())
    (gaps,) = upper.collections
    for (low, high), bin_number in zip(gaps.get_segments(), full.tolist(), strict=True):
        assert low[0] == high[0] == pytest.approx(confidence[bin_number].item())
        ends = sorted([accuracy[bin_number].item(), confidence[bin_number].item()])
        assert [low[1], high[1]] == pytest.approx(ends)
    assert [bar.get_height() for bar in lower.patches] == sums.bin_count[full].tolist()
    result = scores(sums)
    assert upper.get_title() == f"fbpc\nECE {100 * result.ece:.1f} %, accuracy {100 * result.accuracy:.1f} %"
    assert lower.get_xlabel() == "confidence (n = 800 images)"


def test_images_that_several_chains_scored_count_once(drawn, tmp_path):
    """The title's scores are those of all chains together; the bars below are the mean over the chains."""
    sums = stats(0.3, n=400) + stats(6.0, n=400)
    reliability.reliability_diagram({"fbpc": sums}, tmp_path / "r.png", images=400)
    upper, lower = drawn[0].axes
    full = (sums.bin_count > 0).nonzero().flatten()
    assert lower.get_xlabel() == "confidence (n = 400 images, mean of 2 chains)"
    assert [bar.get_height() for bar in lower.patches] == (sums.bin_count[full] / 2).tolist()
    assert (
        upper.get_title() == f"fbpc\nECE {100 * scores(sums).ece:.1f} %, accuracy {100 * scores(sums).accuracy:.1f} %"
    )


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_reliability_is_readable_for_any_number_of_coresets(drawn, tmp_path, count):
    """One panel a coreset, four a row; long names are cut, `$` and `_` are no mathematics; counts share their scale."""
    names = ["random", "fbpc", "bpc-fkl_$1$ on convnet-in and resnet18-in and more", "d", "e", "f"]
    many = {name: stats(1 + i, n=300 + i, seed=i) for i, name in enumerate(names[:count])}
    reliability.reliability_diagram(many, tmp_path / "r.png", "CIFAR-10, 1 image per class, 3 chains of $m$")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 2 * count
    shown = [axes.get_title().split("\n")[0] for axes in drawn[0].axes if axes.get_title()]
    assert [name[:30] for name in shown] == [name[:30] for name in names[:count]]
    assert len({axes.get_ylim() for axes in drawn[0].axes if "confidence" in axes.get_xlabel()}) == 1
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.size[0] > 400
        assert len(picture.getcolors(1 << 24) or []) > 50


def test_entropies_are_shares_of_their_own_images(drawn, tmp_path):
    """Two outlines, each summing to 1 though one has ten times the images; every value is counted."""
    source = np.random.default_rng(0)
    inside, outside = source.uniform(0, 1, 2000), source.uniform(1, math.log(10), 200)
    histograms.entropy_histogram(inside, outside, tmp_path / "h.png", "fbpc", classes=10)
    (axes,) = drawn[0].axes
    outlines = [patch for patch in axes.patches if patch.get_label().startswith(("in", "out"))]
    for outline, values in zip(outlines, (inside, outside), strict=True):
        data = outline.get_data()
        assert data.values.sum() == pytest.approx(1)
        assert data.edges[[0, -1]].tolist() == pytest.approx([0, math.log(10)])
        assert (data.values * data.edges[1:]).sum() == pytest.approx(values.mean(), abs=0.08)
    assert [outline.get_label() for outline in outlines] == [
        "in distribution (n = 2,000)",
        "out of distribution (n = 200)",
    ]
    assert_readable(drawn[0])


def test_data_sets_in_deep_folders_have_short_names(drawn, tmp_path):
    """A path keeps its end, which tells it from another, and the legend stays on the sheet."""
    folder, values = "parquet:/a/folder/of/data/that/lies/deep/down", np.linspace(0, 2, 50)
    names = (f"{folder}/cifar10-jpeg", f"{folder}/tiny-imagenet-100")
    histograms.entropy_histogram(values, values[:9], tmp_path / "h.png", "fbpc", classes=10, names=names)
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[0].endswith("/cifar10-jpeg (n = 50)")
    assert labels[1].endswith("/tiny-imagenet-100 (n = 9)")
    assert_readable(drawn[0])


def test_the_largest_value_is_counted_and_one_value_is_enough(drawn, tmp_path):
    """Entropies of exactly log d, or above it by rounding, and all of them 0."""
    top = np.full(5, math.log(3) * (1 + 1e-15))
    histograms.entropy_histogram(top, np.zeros(1), tmp_path / "h.png", classes=3, quantity="mutual information")
    histograms.entropy_histogram(np.zeros(4), np.zeros(2), tmp_path / "z.png")
    for figure in drawn:
        for outline in figure.axes[0].patches:
            assert outline.get_data().values.sum() == pytest.approx(1)
    assert drawn[0].axes[0].get_xlabel() == "mutual information (nats)"


def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path):
    nobody = predictive_stats(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    one = np.ones(1)
    for draw, message in (
        (lambda path: reliability.reliability_diagram({}, path), "no coreset"),
        (lambda path: reliability.reliability_diagram({"fbpc": nobody}, path), "fbpc: no example"),
        (lambda path: histograms.entropy_histogram(one[:0], one, path), "in distribution: must be .*, got 0"),
        (lambda path: histograms.entropy_histogram(one, one * np.nan, path), "out of distribution: must be .*, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(tmp_path / "no.png")
    assert list(tmp_path.iterdir()) == []


def test_colours_are_told_apart_by_colour_blind_people():
    """Blue against vermilion under Machado's matrices of the three dichromacies: far apart in each."""
    matrices = (
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    )
    colours = [
        np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2 for code in (style.BLUE, style.ORANGE)
    ]
    for matrix in matrices:
        a, b = (np.clip(np.array(matrix) @ colour, 0, 1) ** (1 / 2.2) for colour in colours)
        assert np.linalg.norm(a - b) > 0.3


@pytest.mark.parametrize(("points", "networks"), [(1, 9), (30, 4), (1000, 1), (1000, 9)])
def test_the_course_of_a_run_is_readable(drawn, tmp_path, points, networks):
    """Whatever the number of steps, and with many networks of long names; the lines are the values."""
    at, rng = list(range(1, points + 1)), np.random.default_rng(0)
    names = [f"mypackage.networks:build_{index}" if networks > 4 else f"convnet-{index}" for index in range(networks)]
    values = {name: (1e3 * rng.random(points)).tolist() for name in names}
    lines = [(name, at, values[name], False) for name in names]
    courses = [steps.Course(f"quantity {i}", "nats per image", lines, counts=i == 2) for i in range(3)]
    steps.over_steps(courses, tmp_path / "c.png", "a title of some length, as runs have them, over the steps")
    assert_readable(drawn[0])
    first = drawn[0].axes[0].lines
    raw = [line for line in first if len(line.get_xdata()) == points]
    assert [list(np.asarray(line.get_ydata())) for line in raw][:networks] == list(values.values())
    window = steps.window_of(points)
    if window > 1:
        mean = next(line for line in first if len(line.get_xdata()) == points - window + 1)
        assert np.asarray(mean.get_ydata())[0] == pytest.approx(np.mean(values[names[0]][:window]))
        assert np.asarray(mean.get_xdata())[0] == pytest.approx(np.mean(at[:window]))
    colours = {line.get_color() for line in first}
    assert len(colours) == min(networks, 7)


def test_bars_are_the_values(drawn, tmp_path):
    """Of two names the bars are 0.4 wide, left and right of the tick of their group; one value is missing."""
    values = {("random", "a"): (20.0, 1.0), ("fbpc", "a"): (50.0, 2.0), ("fbpc", "b"): (60.0, 3.0)}
    marks = {("fbpc", "b"): 65.0}
    comparison.bars(["random", "fbpc"], ["a", "b"], values, marks, "accuracy %", "title", tmp_path / "b.png")
    (axes,) = drawn[0].axes
    shown = [container for container in axes.containers if isinstance(container, BarContainer)]
    places = {
        bars.get_label(): [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars] for bars in shown
    }
    assert places == {"random": [pytest.approx((-0.2, 20))], "fbpc": [pytest.approx(p) for p in ((0.2, 50), (1.2, 60))]}
    assert len({bars[0].get_facecolor() for bars in shown}) == 2
    lines = [line.tolist() for group in axes.collections for line in group.get_segments()]  # type: ignore[attr-defined]
    expected = [[[-0.2, 19], [-0.2, 21]], [[0.2, 48], [0.2, 52]], [[1.2, 57], [1.2, 63]]]
    assert np.array(lines) == pytest.approx(np.array(expected))
    (mark,) = (line.get_xydata() for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata()))
    assert mark == pytest.approx(np.array([[1.2, 65]]))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b"]


def test_points_are_the_values_in_the_colour_and_the_shape_of_the_legend(drawn, tmp_path):
    panels = {
        "ipc 1": {("vbpc", "ensemble"): (40.0, 0.1), ("fbpc", "SGHMC"): (30.0, 0.2)},
        "ipc 10": {("fbpc", "ensemble"): (50.0, 0.3)},
    }
    scatter.scatter(panels, "accuracy %", "ECE", "a title", tmp_path / "s.png")
    legend = {line.get_label(): line for line in drawn[0].legends[0].get_lines()}
    assert list(legend) == ["vbpc", "fbpc", "ensemble", "SGHMC"]
    assert legend["vbpc"].get_color() != legend["fbpc"].get_color()
    assert legend["ensemble"].get_marker() != legend["SGHMC"].get_marker()
    for axes, (title, points) in zip(drawn[0].axes, panels.items(), strict=True):
        assert (axes.get_title(), axes.get_xlabel()) == (title, "accuracy %")
        assert [
            (tuple(line.get_xydata()[0]), line.get_color(), line.get_marker()) for line in axes.lines
        ] == [
            (point, legend[coreset].get_color(), legend[inference].get_marker())
            for (coreset, inference), point in points.items()
        ]  # fmt: skip
    assert drawn[0].axes[0].get_ylabel() == "ECE"
    assert_readable(drawn[0])


@pytest.mark.parametrize(("names", "groups"), [(2, 8), (9, 1), (4, 4)])
def test_bars_have_room_for_their_names(drawn, tmp_path, names, groups):
    """Long names of many networks, and of many coresets in the legend."""
    labels = [f"fbpc-isotropic ({chr(65 + index)})" for index in range(names)]
    networks = [f"convnet-gn-{index}" for index in range(groups)]
    values = {(label, network): (50.0, 1.0) for label in labels for network in networks}
    comparison.bars(labels, networks, values, {}, "accuracy %", "accuracy % by network", tmp_path / "b.png")
    assert_readable(drawn[0])


@pytest.mark.parametrize(("panels", "lines"), [(1, 1), (2, 6), (3, 3)])
def test_curves_are_the_points_and_are_readable(drawn, tmp_path, panels, lines):
    """Against ipc 1, 10, 50; the paper's values as diamonds, long labels, a long title that is broken."""
    points = [(1.0, 20.0, 1.0), (10.0, 40.0, 2.0), (50.0, 60.0, 0.0)]
    curves = [
        comparison.Curve(
            f"FBPC-isotropic, Tiny-{index}", [(x, y + index, s) for x, y, s in points], [(10, 45.0 + index)]
        )
        for index in range(lines)
    ]
    shown = [(f"quantity {index}", curves) for index in range(panels)]
    title = "Table 2: test accuracy and NLL, CIFAR100 and Tiny-ImageNet, and more words (small\u00a0scale)"
    comparison.curves(shown, "images per class", tmp_path / "c.png", title)
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == panels
    for axes in drawn[0].axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "50"]
        ours = [container.lines[0] for container in axes.containers]
        assert [line.get_xydata().tolist() for line in ours] == [
            [[x, y] for x, y, _ in curve.points] for curve in curves
        ]
        assert len({(line.get_color(), line.get_marker()) for line in ours}) == lines
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert len(legend) == lines + 1 and legend[-1] == "the paper's"


def test_curves_of_many_sizes_leave_out_names_without_room(drawn, tmp_path):
    points = [(float(x), float(x), 0.0) for x in (1, 2, 9, 10, 49, 50)]
    comparison.curves([("accuracy %", [comparison.Curve("fbpc", points)])], "images per class", tmp_path / "c.png")
    assert_readable(drawn[0])
    names = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert names == ["1", "2", "10", "50"]
    with pytest.raises(ValueError, match="no values"):
        comparison.curves([("accuracy %", [])], "images per class", tmp_path / "no.png")
