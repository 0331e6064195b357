"""docs/gallery.md: every coreset of the repository is there, with the scores of its result, and can be loaded."""

import json
import re
import statistics
from pathlib import Path

import pytest

from fbpc_ray.data import coreset

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks" / "coresets").glob("*.safetensors"))
TEXT = (ROOT / "docs" / "gallery.md").read_text()


def test_the_gallery_is_whole():
    names = set(re.findall(r"benchmarks/coresets/(\S+\.safetensors)", TEXT))
    assert names == {path.name for path in FILES} and FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_coreset_has_the_row_of_its_result(path):
    images, facts = coreset.load(path), coreset.metadata(path)
    result = json.loads((ROOT / "benchmarks" / "results" / f"{path.stem}.json").read_text())
    scores = result["coresets"][facts["method"]]["convnet-in"]
    cells = [f"`{path.stem}`", f"`{facts['method']}`", str(len(images.images)), f"{int(facts['step']):,}"]
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {cells[0]} |")]
    assert [cell.strip() for cell in row.split("|")[1:5]] == cells
    for quantity, scale, digits in (("accuracy", 100, 1), ("nll", 1, 2), ("ece", 1, 3)):
        values = [scale * value for value in scores[quantity]]
        assert f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}" in row
    assert (result["steps"], result["ipc"] * 10) == (int(facts["step"]), len(images.images))
    assert images.images.shape[1:] == (3, 32, 32) and len(images.classes) == 10
