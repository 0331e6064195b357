"""The programs that measure: they run, say what they compared, and compare like with like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import ENVIRONMENT

from fbpc_ray.commands import main
from fbpc_ray.core.errors import UserError
from fbpc_ray.models.precision import supports_bf16

JOBS = Path(__file__).parents[2] / "jobs"


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOBS / program), *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_an_outer_step_is_timed_beside_its_reference_and_its_passes(tmp_path):
    """Two networks one after the other; where neither Ray nor MLflow can be imported."""
    report = tmp_path / "found.json"
    ways = ("reference", "ours", "ours, cold", "floor", "bpc-fkl", "ours, pool")
    words = [
        "--data", "digits", "--networks", "convnet-in+convnet-bn", "--widths", "16", "--ipcs", "1", "--steps", "1",
        "--repeats", "1", "--no-compiled", "--warm-pool-size", "1", "--first-run", "1", "--json", str(report),
        "--ways", *ways,
    ]  # fmt: skip
    code = (
        "import runpy, sys; sys.modules['ray'] = sys.modules['mlflow'] = None;"
        f"sys.argv[0] = {str(JOBS / 'benchmark.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", code, *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    output = json.loads(report.read_text())
    (case,) = output["cases"]
    assert (case["networks"], case["width"], case["m"]) == (["convnet-in", "convnet-bn"], 16, 10)
    assert case["map_steps"] > case["map_steps_pool"]  # it begins at a solution of images that have hardly moved
    assert set(case["seconds"]) == set(ways)
    assert all(len(times["all"]) == 1 and min(times["all"]) > 0 for times in case["seconds"].values())
    assert case["ratios"]["ours / floor"]["all"][0] == pytest.approx(
        case["seconds"]["ours"]["all"][0] / case["seconds"]["floor"]["all"][0]
    )
    assert min(case["peak_gb"].values()) > 0
    assert case["training"]["ratio"]["median"] == pytest.approx(
        case["training"]["ours"]["median"] / case["training"]["bare loop"]["median"]
    )
    first = case["first_run"]
    assert (first["steps"], first["compiled"]) == (1, False)
    assert first["reference / ours"] == pytest.approx(first["seconds"]["reference"] / first["seconds"]["ours"])
    assert str(tmp_path) not in report.read_text()  # no path of a machine
    assert "ours / floor" in process.stdout
    rows = report.with_suffix(".md").read_text().splitlines()
    assert sum(row.startswith("| convnet-in + convnet-bn, width 16, ipc 1 |") for row in rows) == 2


@pytest.mark.slow
def test_a_step_of_vbpc_is_timed_beside_its_passes_and_its_algebra(tmp_path):
    """n: ten classes and their mirror images; h: width 8 times 2 x 2 pixels. The picture is drawn from two sizes."""
    report = tmp_path / "vbpc.json"
    words = ["--no-compiled", "--widths", "8", "--ipcs", "1", "2", "--repeats", "1", "--json", str(report)]
    process = run("benchmark_vbpc.py", *words)
    assert process.returncode == 0, process.stderr
    cases = json.loads(report.read_text())["cases"]
    assert [(case["n"], case["h"], case["real_batch_size"]) for case in cases] == [(20, 32, 256), (40, 32, 256)]
    for case in cases:
        seconds = {name: times["all"][0] for name, times in case["seconds"].items()}
        assert min(seconds.values()) > 0
        assert seconds["algebra"] < seconds["step"]
        assert case["ratios"]["step / passes"]["all"] == [pytest.approx(seconds["step"] / seconds["passes"])]
    assert report.with_suffix(".md").read_text().count("\n| 8 |") == 2
    assert report.with_suffix(".png").exists() and report.with_stem("vbpc-memory").with_suffix(".png").exists()


@pytest.mark.slow
def test_passes_are_timed_in_both_formats_and_with_both_limits(tmp_path):
    """On a CPU without bfloat16 instructions the rows of bf16 are left out, with a line that says so."""
    report = tmp_path / "passes.json"
    words = ("--widths", "8", "--images", "10", "--repeats", "2", "--no-compiled", "--json", str(report))
    process = run("benchmark_passes.py", *words)
    assert process.returncode == 0, process.stderr
    output = json.loads(report.read_text())
    has_bf16 = supports_bf16("cpu")
    assert ("this CPU has no bfloat16 instructions" in process.stdout) is not has_bf16
    formats = ["pass of 10: fp32 / bf16", "expert batch: fp32 / bf16"] if has_bf16 else []
    assert [row["name"] for row in output["rows"]] == [
        *formats, "prediction, batches: 500 / 50",
        "expert batch, kept: 64 MiB / 1 GiB", "prediction, kept: 64 MiB / 1 GiB",
    ]  # fmt: skip
    for row in output["rows"]:
        first, second, ratios = (row[key]["all"] for key in ("first", "second", "ratio"))
        assert ratios == [a / b for a, b in zip(first, second, strict=True)]
    assert set(output["gflops"]) == {"float32", *(["bfloat16"] if has_bf16 else [])}
    (limit,) = output["limits"]
    product, whole = (limit["gflops"][name]["all"] for name in ("product", "pass"))
    assert limit["pass / product"]["all"] == [a / b for a, b in zip(whole, product, strict=True)]
    assert output["settings"]["json"] == "passes.json"
    assert "| 8 | prediction, batches: 500 / 50 |" in report.with_suffix(".md").read_text()
    assert "| 8 | 10 |" in report.with_suffix(".md").read_text()


@pytest.mark.slow
def test_memory_of_a_step_is_the_peak_of_its_process(tmp_path):
    """Of the whole process, so above what it holds before the step; the chunk is the one of the budget."""
    report = tmp_path / "memory.json"
    words = [
        "--image-size", "16", "--classes", "2", "--per-class", "4", "--ipc", "3", "--width", "4", "--memory-budget",
        "2GB", "--map-max-steps", "2", "--no-compiled", "--json", str(report),
    ]  # fmt: skip
    done = run("benchmark_memory.py", *words)
    assert done.returncode == 0, done.stderr
    output = json.loads(report.read_text())
    assert (output["images"], output["image_shape"], output["map_steps"]) == (6, [3, 16, 16], 2)
    assert 0.2 < output["at_rest_gb"] <= output["peak_gb"] < 2 == output["budget_gb"]
    assert output["within_budget"] is True
    assert output["seconds"] >= sum(output[f"seconds_{part}"] for part in ("x", "map", "u", "gradient"))
    assert output["settings"]["json"] == "memory.json"
    assert str(tmp_path) not in report.read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_the_drivers_cost_is_measured_with_trivial_actors(tmp_path):
    report = tmp_path / "actors.json"
    words = ("--actors", "1", "3", "--processes", "2", "--nodes", "2", "--units", "6", "--repeats", "1")
    done = run("scaling.py", *words, "--json", str(report))
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert set(rows) == {"10x1x8x8", "100x3x32x32"}
    for each in rows.values():
        assert [(row["actors"], row["processes"], row["nodes"], row["steps"]) for row in each] == [
            (1, 1, 2, 6), (3, 2, 2, 2),
        ]  # fmt: skip
        assert min(row["cpu_seconds_a_unit"]["median"] for row in each) > 0


def test_cost_is_drawn_against_what_the_cases_differ_in(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(JOBS)
    import benchmark

    def case(ipc: int, *networks: str) -> dict:
        seconds = {way: {"median": ipc * len(networks) * share} for way, share in (("ours", 1.0), ("floor", 0.9))}
        return {"networks": list(networks), "width": 32, "ipc": ipc, "seconds": seconds}

    benchmark.draw([case(1, "a"), case(10, "a")], tmp_path / "by-ipc.json")
    assert [path.name for path in tmp_path.iterdir()] == ["by-ipc.ipc.png"]
    benchmark.draw([case(1, "a"), case(10, "a"), case(1, "a", "b", "c", "d")], tmp_path / "both.json")
    assert {path.name for path in tmp_path.glob("both*")} == {"both.ipc.png", "both.networks.png"}
    benchmark.draw([case(1, "a")], tmp_path / "one.json")
    assert not list(tmp_path.glob("one*"))


@pytest.mark.slow
@pytest.mark.ray
def test_ray_is_timed_beside_serial_and_gives_its_bits(tmp_path):
    """That the ways agree to the bit is checked by the program itself."""
    report = tmp_path / "found.json"
    words = ("--width", "8", "--steps", "1", "--repeats", "1", "--json", str(report))
    process = run("scaling.py", *words)
    assert process.returncode == 0, process.stderr
    output = json.loads(report.read_text())
    seconds = {way: times["median"] for way, times in output["seconds_a_step"].items()}
    assert set(seconds) == {"serial", "one worker", "two workers"}
    assert output["overhead"]["median"] == pytest.approx(seconds["one worker"] / seconds["serial"] - 1)
    assert output["scaling"]["median"] == pytest.approx(seconds["one worker"] / seconds["two workers"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ways", "theirs"], "unknown way 'theirs': choose from reference, ours, ours, cold, floor, bpc-fkl"),
        (["--data", "parquet:nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(words, message):
    process = run("benchmark.py", "--data", "digits", "--widths", "8", "--ipcs", "1", *words)
    assert process.returncode == 2
    assert message in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_one_line():
    process = run("benchmark.py", "--device", "cuda")
    assert (process.returncode, process.stderr.strip()) == (
        2, "error: --device cuda, but torch finds no CUDA device here: use --device cpu",
    )  # fmt: skip


def test_another_checkout_is_timed_by_commands_that_both_know(digits, tmp_path, capsys, monkeypatch):
    """Here the flags are those of today's parser; the file of `write_images` is data, and a coreset of it."""
    monkeypatch.syspath_prepend(str(JOBS))
    import benchmark_versions

    data, coreset = benchmark_versions.write_images(digits, tmp_path)
    for case in benchmark_versions.cases("convnet-in", 8, data, coreset):
        assert case.few < case.many
        main.main([*case.words, case.flag, str(case.many), "--dry-run"])
        assert "nothing was written" in capsys.readouterr().out
    with pytest.raises(UserError, match="--before nowhere: must be a checkout of this repository"):
        benchmark_versions.benchmark(["--before", "nowhere"])
