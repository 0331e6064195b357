"""The programs that measure: they run, say what they compared, and compare like with like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import ENVIRONMENT

JOBS = Path(__file__).parent.parent / "jobs"


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOBS / program), *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_an_outer_step_is_timed_beside_its_reference_and_its_passes(tmp_path):
    report = tmp_path / "found.json"
    done = run(
        "benchmark.py", "--data", "digits", "--widths", "8", "--ipcs", "1", "--steps", "1", "--repeats", "2",
        "--no-compiled", "--json", str(report),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(report.read_text())["cases"]
    assert (case["network"], case["width"], case["m"]) == ("convnet-in", 8, 10)
    assert case["map_steps"] > 1
    assert set(case["seconds"]) == {"reference", "ours", "ours, cold", "floor", "bpc-fkl"}
    assert all(len(each["all"]) == 2 and min(each["all"]) > 0 for each in case["seconds"].values())
    assert case["ratios"]["ours / floor"]["all"][0] == pytest.approx(
        case["seconds"]["ours"]["all"][0] / case["seconds"]["floor"]["all"][0]
    )
    assert "ours / floor" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_ray_is_timed_beside_serial_and_gives_its_bits(tmp_path):
    """That the ways agree to the bit is checked by the program itself."""
    report = tmp_path / "found.json"
    done = run("scaling.py", "--width", "8", "--steps", "1", "--repeats", "1", "--json", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    seconds = {way: each["median"] for way, each in found["seconds_a_step"].items()}
    assert set(seconds) == {"serial", "one worker", "two workers"}
    assert found["overhead"]["median"] == pytest.approx(seconds["one worker"] / seconds["serial"] - 1)
    assert found["scaling"]["median"] == pytest.approx(seconds["one worker"] / seconds["two workers"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["--ways", "theirs"], "unknown way 'theirs': choose from reference, ours, ours, cold, floor, bpc-fkl"),
        (["--data", "parquet:nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(words, said):
    done = run("benchmark.py", "--data", "digits", "--widths", "8", "--ipcs", "1", *words)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said():
    done = run("benchmark.py", "--device", "cuda")
    assert (done.returncode, done.stderr.strip()) == (
        2, "error: --device cuda, but torch finds no CUDA device here: use --device cpu",
    )  # fmt: skip
