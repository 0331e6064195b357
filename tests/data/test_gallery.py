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
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "gallery.json").read_text())
"""{stem of the file: {inference: what `fbpc evaluate --coreset FILE --json` wrote}}"""


def cells(stem: str, inference: str) -> list[str]:
    """The cells of a coreset's row in the table of an inference."""
    _, _, table = TEXT.partition(f"\n| coreset, `{inference}` |")
    (row,) = [line for line in table.split("\n\n")[0].splitlines() if line.startswith(f"| `{stem}` |")]
    return [cell.strip() for cell in row.split("|")[1:-1]]


def written(values: list[float], scale: float, digits: int) -> str:
    """Mean ± standard deviation; of one value, the value."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def test_the_gallery_is_whole():
    """Every file has a command, a picture and a result."""
    names = set(re.findall(r"benchmarks/coresets/(\S+\.safetensors)", TEXT))
    assert names == {path.name for path in FILES} and FILES
    assert RESULTS.keys() == {path.stem for path in FILES}
    pictures = set(re.findall(r"\]\(images/(\S+)\.png\)", TEXT))
    assert pictures >= {path.stem for path in FILES} - {"cifar10-ipc1-random"} | {"cifar10-ipc1-real"}
    assert all((ROOT / "docs" / "images" / f"{name}.png").is_file() for name in pictures)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_coreset_has_the_rows_of_its_results(path):
    images, facts = coreset.load(path), coreset.metadata(path)
    assert facts["data"] == "cifar10"
    assert images.images.shape[1:] == (3, 32, 32) and len(images.classes) == 10
    for inference, result in RESULTS[path.stem].items():
        scores = result["coresets"]["given"]["convnet-in"]
        assert (result["inference"], result["images"]) == (inference, len(images.images))
        assert (result["images_scored"], len(result["eval_seeds"])) == (10_000, len(scores["accuracy"]))
        assert result["data"] == "parquet:PATH" and "+" not in result["commit"]
        assert cells(path.stem, inference)[1:] == [
            f"`{facts['method']}`", str(len(images.images)), f"{int(facts['step']):,}", str(len(scores["accuracy"])),
            *(written(scores[name], *form) for name, form in
              {"accuracy": (100, 1), "nll": (1, 2), "ece": (1, 3)}.items()),
        ]  # fmt: skip
