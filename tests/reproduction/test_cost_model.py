"""jobs/cost_model.py: its arithmetic by hand, and the tables of docs/scaling.md."""

import json
from pathlib import Path

import cost_model
import pytest
from cost_model import Arguments

from fbpc_ray.models.functional import specify

ROOT = Path(__file__).parents[2]


def test_the_operations_of_a_gradient_by_hand():
    """2 images, 5 MAP steps, K = 3, 4 real images: 3 passes of each step, 6 forwards for each Psi, 4 x 3 of Eq. 17."""
    passes = 3 * 2 * 5 + 3 * 2 * 3 + 3 * 4 * 3
    assert cost_model.unit_flops(7.0, batch=2, real=4, map_steps=5, posterior_steps=3) == 7 * (
        passes + 2 * 2 * 3 + 2 * 3 * 2
    )


def test_constants_are_those_of_the_files(tmp_path):
    def row(seconds: float) -> dict:
        return {"actors": 64, "cpu_seconds_a_unit": {"median": seconds}}

    small, large = [row(9.0), row(0.002)], [row(9.0), row(0.005)]
    actors = {"rows": {"10x1x8x8": small, "100x3x32x32": large}}
    memory = {
        "image_shape": [1, 8, 8], "classes": 10, "images": 2, "real_images": 4, "map_steps": 5, "seconds": 2.0,
        "peak_gb": 3.0, "budget_gb": 6.0, "settings": {"network": "convnet-in", "width": 8, "posterior_steps": 3},
    }  # fmt: skip
    for name, report in ((cost_model.ACTORS, actors), (cost_model.MEMORY, memory)):
        (tmp_path / name).write_text(json.dumps(report))
    constants = cost_model.measured(tmp_path)
    macs = 64 * 8 * 9 + 16 * 8 * 9 * 8 + 32 * 10
    assert constants.unit_seconds == 0.002
    assert constants.byte_seconds == pytest.approx(0.003 / (4 * (307_200 - 640)))
    assert constants.actors == 64
    assert constants.core_flops == pytest.approx(2 * macs * (30 + 18 + 36 + 12 + 12) / 2)
    assert constants.peak_ratio == 0.5


def test_bytes_by_hand():
    args = Arguments(images=100, classes=10, image_size=8, width=8, ipc=3, batch_size=20, expert_count=2)
    rows = cost_model.byte_rows(args, specify("convnet-in", (3, 8, 8), 10, 8, 0)).splitlines()
    values = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in rows[2:]}
    assert values["training images, uint8"] == "19.2 kB"
    assert values["u"] == "23 kB"
    assert values["gradient of a task"] == "15.4 kB"


def test_the_page_has_the_tables_of_the_program():
    """docs/scaling.md is written from the committed measurements; it names what is assumed."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in cost_model.tables(Arguments()).split("\n\n"):
        assert table in page
    assert page.count("**assumed**") == 4
