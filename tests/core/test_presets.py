"""Presets: Table 4 from the paper itself, the paper's other constants, and the settings of each method."""

from pathlib import Path

import pytest

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import PRESETS, default, preset, start_of, with_method
from fbpc_ray.distillation.worker import METHODS
from fbpc_ray.evaluation.chains import default_step_size
from fbpc_ray.execution.validation import check

PAPER = Path(__file__).parents[3] / "shared" / "paper" / "fbpc.txt"

TABLE_4 = """
| CIFAR10       | 1   | 1   | 0.01     | 0.05        | 0.01        | 1000 | 100      | 10   |
|               | 10  | 2   | 0.1      | 0.05        | 0.01        | 1000 | 1000     | 100  |
|               | 50  | 10  | 0.2      | 0.05        | 0.01        | 1000 | 1000     | 500  |
| CIFAR100      | 1   | 2   | 0.1      | 0.1         | 0.1         | 5000 | 1000     | 100  |
|               | 10  | 40  | 0.1      | 0.1         | 0.1         | 5000 | 1000     | 1000 |
|               | 50  | 20  | 0.2      | 0.01        | 0.01        | 300  | 1000     | 5000 |
| Tiny-ImageNet | 1   | 2   | 0.1      | 0.1         | 3           | 5000 | 1000     | 100  |
|               | 10  | 40  | 1        | 0.1         | 3           | 500  | 1000     | 100  |
|               | 50  | 40  | 1        | 0.1         | 3           | 500  | 1000     | 100  |
"""
"""The rows of the paper's Table 4 as printed: ipc, T, gamma, lambda_x, lambda_u, N, alpha, B."""

FIELDS = ("ipc", "start_epoch", "gamma", "lambda_x", "lambda_u", "steps", "alpha", "batch_size")


def rows(text: str) -> dict[str, dict[str, float]]:
    """{preset name: values} of a table's text; an empty first cell repeats the data set above it."""
    result, data = {}, ""
    for line in text.strip().splitlines():
        name, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        data = name.lower() or data
        result[f"{data}-ipc{cells[0]}"] = {"data": data} | dict(zip(FIELDS, map(float, cells), strict=True))
    return result


def printed() -> str:
    """Table 4 in the paper's text: what follows its caption's header and rule, up to the empty line."""
    header, body = PAPER.read_text().split("**Table 4:**")[1].split("\n|", 1)[1].split("|\n|--", 1)
    symbols = [r"ipc", r"$T$", r"$\gamma$", r"$\lambda_x$", r"$\lambda_u$", r"$N$", r"$\alpha$", r"$B$"]
    assert [cell.strip() for cell in header.split("|") if cell.strip()] == symbols
    return body.split("\n", 1)[1].split("\n\n")[0]


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not beside the repository")
def test_the_copy_of_table_4_is_the_papers():
    """So that the presets are held against the paper's numbers where its text is not at hand, too."""
    assert rows(printed()) == rows(TABLE_4)


def test_presets_are_table_4():
    """All nine rows and all eight columns, from the paper's text where it is at hand, else from the copy above."""
    table = rows(printed() if PAPER.exists() else TABLE_4)
    assert len(table) == 9
    assert set(PRESETS) == {*table, "digits"}
    for name, values in table.items():
        flat = preset(name).flat()
        assert {field: flat[field] for field in values} == values, name
        changed = {field for field, value in Config().flat().items() if flat[field] != value}
        assert changed <= set(values), name  # a row of Table 4 changes nothing else


@pytest.mark.parametrize(
    ("ipc", "row"), [(None, 1), ("1", 1), ("9", 1), ("10", 10), ("20", 10), ("49", 10), ("50", 50), ("200", 50)]
)
def test_images_per_class_between_the_rows_of_table_4_take_the_row_below(ipc, row):
    """A batch of 10 images, as of ipc 1, would be a twentieth of the 200 of ipc 20."""
    expected = preset(f"cifar10-ipc{row}")
    assert default("cifar10", ipc, "", None) == default("cifar10", ipc, "paper", None) == expected
    if ipc:
        assert start_of(expected.updated(ipc=int(ipc))) == (f"cifar10-ipc{row}", expected)
    assert default("parquet:PATH", ipc, "paper", None) == Config()


def test_defaults_are_the_papers_constants():
    """App. C.1 and C.2, Eq. 27, and method.md sections 1, 4 and 6."""
    flat = Config().flat()
    paper = {
        "expert_count": 100, "expert_epochs": 50, "expert_lr": 0.01, "expert_batch_size": 256, "width": 128,
        "augment": "dsa", "map_lr": 0.001, "map_max_steps": 2000, "posterior_steps": 30, "real_batch_size": 256,
        "mc_samples": 30, "momentum": 0.5, "start_rule": "from", "method": "fbpc", "chain_epochs": 1000,
        "chain_every": 100, "chain_friction": 0.1, "chain_full_batch": 500,
        "chain_batch_size": 256, "chain_augment": True,
    }  # fmt: skip
    assert {name: flat[name] for name in paper} == paper
    assert [default_step_size(m) for m in (1, 10, 20, 100, 5000)] == pytest.approx([0.009, 0.009, 0.018, 0.03, 0.03])
    assert flat["chain_noise"] in ("consistent", "gradient")  # "literal" explodes


def test_an_unknown_preset_is_refused_with_the_nearest_names():
    """The nearest first, then all."""
    with pytest.raises(UserError, match="--preset: got 'cifar10-ipc5'; did you mean cifar10-ipc50") as caught:
        preset("cifar10-ipc5")
    assert all(name in str(caught.value) for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", [*METHODS, "random"])
def test_presets_pass_the_check(name, method):
    """Each preset can be run as it is, with every method."""
    config = preset(name)
    check(with_method(config, method, config.distillation.ipc))


def test_weight_space_baselines_bring_the_settings_of_their_own_paper():
    """Method section 5's table, by ipc; what is above 10 takes the row of 20; FBPC keeps Table 4's."""
    flat = {ipc: with_method(preset("cifar10-ipc1"), "bpc-fkl", ipc).flat() for ipc in (1, 10, 50)}
    names = ("start_epoch", "syn_steps", "inner_lr", "mc_samples", "alpha", "steps", "start_rule")
    assert [flat[1][name] for name in names] == [2, 50, 0.01, 30, 1000.0, 5000, "before"]
    assert [flat[10][name] for name in names[:4]] == [20, 30, 0.03, 30]
    assert [flat[50][name] for name in names[:4]] == [30, 30, 0.03, 30]
    rkl = [with_method(preset("cifar10-ipc1"), "bpc-rkl", ipc).distillation for ipc in (1, 10, 50)]
    assert [(d.mc_samples, d.alpha, d.syn_steps) for d in rkl] == [(10, 1.0, 50), (30, 1.0, 30), (10, 1.0, 30)]
    assert with_method(preset("cifar10-ipc1"), "fbpc-isotropic", 1) == preset("cifar10-ipc1").updated(
        method="fbpc-isotropic"
    )


def test_vbpc_and_frepo_bring_their_own_settings():
    """Labels and rates by ipc, judged by the last layer; frepo's ridge is a share."""
    one, ten = (with_method(preset(f"cifar10-ipc{ipc}"), "vbpc", ipc) for ipc in (1, 10))
    assert [(c.distillation.image_lr, c.distillation.label_scale) for c in (one, ten)] == [(0.1, 3.0), (0.03, 5.0)]
    assert {c.evaluation.inference for c in (one, ten)} == {"last-layer"}
    assert one.evaluation.net_label_scale == one.distillation.label_scale
    frepo = with_method(preset("cifar10-ipc10"), "frepo", 10)
    assert frepo.distillation.ridge == 1e-6
    assert [c.evaluation.net_target_scale for c in (one, ten, frepo)] == [1.0, 1.4, 1.0]
