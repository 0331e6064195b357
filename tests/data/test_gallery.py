"""docs/gallery.md: every coreset of the repository is there, with the scores of its result, and can be loaded."""

import hashlib
import json
import re
from pathlib import Path

import gallery
import pytest

from fbpc_ray.data import coreset

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks" / "coresets").glob("*.safetensors"))
TEXT = (ROOT / "docs" / "gallery.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "gallery.json").read_text())
"""{stem of the file: {inference: what `fbpc evaluate --coreset FILE --json` wrote}}"""


def test_the_gallery_is_whole():
    """Every file has a row, a picture and a result."""
    assert FILES and RESULTS.keys() == {path.stem for path in FILES}
    pictures = set(re.findall(r"\]\(images/(\S+)\.png\)", TEXT))
    assert pictures >= {path.stem for path in FILES} - {"cifar10-ipc1-random"} | {"cifar10-ipc1-real"}
    assert all((ROOT / "docs" / "images" / f"{name}.png").is_file() for name in pictures)
    counts = dict(map(gallery.parse_inference, gallery.Arguments(()).inference))
    header, rule, *rows = gallery.table(FILES, RESULTS, counts).splitlines()
    printed = TEXT[TEXT.index("| coreset |") :].split("\n\n")[0].splitlines()
    assert printed[:2] == [header, rule]
    assert sorted(printed[2:]) == sorted(rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_are_those_of_the_file(path):
    images, facts = coreset.load(path), coreset.metadata(path)
    assert facts["data"] == "cifar10"
    assert images.images.shape[1:] == (3, 32, 32) and len(images.classes) == 10
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for inference, result in RESULTS[path.stem].items():
        by_network, count = result["coresets"]["given"], len(result["eval_seeds"])
        assert list(by_network) == json.loads(facts["settings"])["architectures"]
        assert all(len(scores["accuracy"]) == count for scores in by_network.values())
        assert (result["inference"], result["images"]) == (inference, len(images.images))
        assert result["images_scored"] == 10_000
        assert (result["data"], result["coreset"], result["file"]) == ("parquet:PATH", path.name, checksum)
        assert "+" not in result["commit"]
