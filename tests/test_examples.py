"""The example scripts, as a user starts them, at their smallest size: what they say can be read, and fits together."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fbpc_ray.data import coreset

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def output_of(folder: Path, name: str, *words: str) -> str:
    """What an example prints, started in `folder` with one thread and neither Ray nor MLflow to be had."""
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['ray'] = sys.modules['mlflow'] = None")
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), "--quick", *words]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert "%|" not in process.stderr  # no progress where nobody watches
    return process.stdout


def test_own_images_and_an_own_network(tmp_path):
    """A coreset of three classes that differs from the random images; both are scored on the images held out."""
    output = output_of(tmp_path, "own.py", "--images", "90", "--steps", "2", "--out", "mine")
    result = coreset.load(tmp_path / "mine" / "coreset.safetensors")
    assert result.images.shape == (3, 1, 16, 16)
    assert result.classes == ("disc", "square", "cross")
    assert "30 test images" in output
    rows = {name: (accuracy, nll) for name, accuracy, nll in re.findall(r"^(\w+) +([\d.]+) +([\d.]+)$", output, re.M)}
    assert rows.keys() == {"random", "distilled"}
    assert rows["random"] != rows["distilled"]
    assert (tmp_path / "experts" / "shapes").is_dir()


def test_ood_images(tmp_path):
    """Two coresets, four kinds of out-of-distribution images, two AUROCs with their ranges over the chains."""
    output = output_of(tmp_path, "ood.py", "--steps", "2", "--chains", "2")
    value = r"([\d.]+) \(([\d.]+)-([\d.]+)\)"
    rows = {(row[0], row[1]): [float(number) for number in row[2:]]
            for row in re.findall(rf"^(\w+) +(\w+) +{value} +{value}$", output, re.M)}  # fmt: skip
    kinds = ("photos", "noise", "inverted", "rotated")
    assert rows.keys() == {(name, kind) for name in ("random", "distilled") for kind in kinds}
    for entropy, lowest, highest, information, low, high in rows.values():
        assert 0 <= lowest <= entropy <= highest <= 1
        assert 0 <= low <= information <= high <= 1
    assert rows["random", "photos"] != rows["distilled", "photos"]


def test_a_coreset_as_replay_buffer(tmp_path):
    """Any buffer is better than none, whose learner has forgotten all classes but the last two (20 % of the images)."""
    output = output_of(tmp_path, "replay.py", "--seeds", "1", "--steps", "1", "--ipc", "2")
    rows = {(learner.strip(), buffer): float(value) for learner, buffer, value in
            re.findall(r"^(replay|buffer alone) +(\w+) +([\d.]+) ", output, re.M)}  # fmt: skip
    assert rows.keys() == {
        ("replay", "none"), ("replay", "random"), ("replay", "distilled"),
        ("buffer alone", "random"), ("buffer alone", "distilled"),
    }  # fmt: skip
    assert rows["replay", "none"] <= 25
    assert rows["replay", "random"] > rows["replay", "none"]
    assert rows["replay", "distilled"] > rows["replay", "none"]
    assert "buffer: 2 per class, 20 images in the end; n = 360 test images" in output
