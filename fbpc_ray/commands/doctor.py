"""`fbpc doctor`: check what a run needs, and print a line with its fix for each problem.

This file imports the standard library, core, and of tracking what needs no library, and tries each library in a process
of its own, so that a library that is missing, broken, or aborts its process, is a line. `python -m
fbpc_ray.commands.doctor` needs not even tyro.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fbpc_ray import __version__
from fbpc_ray.commands import doctor_places as places
from fbpc_ray.commands.doctor_places import Finding

PYTHON = (3, 11)
SECONDS, DEEP_SECONDS = 12.0, 180.0
"""Timeout of all processes that try libraries together; of each, and of the compiler, with --deep."""


class Library(NamedTuple):
    """A requirement, and the code that tries it."""

    name: str
    """Name of its distribution."""
    code: str
    """Raises if the library doesn't work; doctor adds what the code prints to the line."""
    without: str = ""
    """What a run does without it; empty if it can't do without."""
    deep: bool = False
    """Tried with --deep alone: it takes long."""


LIBRARIES = (
    Library("numpy", "import numpy; numpy.zeros(2).sum()"),
    Library("torch", "import torch; assert float(torch.ones(2, 2).matmul(torch.ones(2, 1)).sum()) == 4"),
    Library(
        "torchvision",
        "import torch, torchvision\n"
        "boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 2.1], [5., 5., 6., 6.]])\n"
        "assert torchvision.ops.nms(boxes, torch.tensor([.9, .8, .7]), .5).tolist() == [0, 2]\n"
        "print('its compiled operators run')",
    ),
    Library("ray", "import ray, ray.tune", "--backend serial works without", deep=True),
    Library("mlflow", "import mlflow; from mlflow import MlflowClient", "runs go on, untracked"),
    Library("pyarrow", "import pyarrow.parquet, pyarrow.fs, pyarrow.ipc"),
    Library("matplotlib", "from matplotlib.backends.backend_agg import FigureCanvasAgg"),
    Library("safetensors", "import safetensors.torch"),
    Library("scikit-learn", "import sklearn.datasets; sklearn.datasets.load_digits()", "needed by --data digits alone"),
    Library("scipy", "import scipy.special", "needed by fbpc reproduce alone"),
    Library("pillow", "import PIL.Image"),
    Library("jinja2", "import jinja2"),
    Library("filelock", "import filelock"),
    Library("tyro", "import tyro"),
    Library("tqdm", "import tqdm"),
)

CUDA = """
import json, torch
report = {"built": torch.version.cuda, "torch": torch.__version__, "devices": [], "error": ""}
assert float(torch.ones(2, 2).matmul(torch.ones(2, 1)).sum()) == 4
try:
    if torch.version.cuda:
        torch.cuda.init()
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            ones = torch.ones(1, 1, 8, 8, device=number)
            assert torch.nn.functional.conv2d(ones, ones).item() == 64
            report["devices"].append(f"{device.name}, {device.total_memory / 1e9:.0f} GB")
except Exception as error:
    report["error"] = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
print(json.dumps(report))
"""


def doctor(log: Callable[[str], None], deep: bool = False) -> int:
    """Print each finding as soon as it is known; return the exit status: 1 if something must be fixed, else 0."""
    problems = 0
    for finding in findings(deep):
        log(str(finding))
        problems += finding.state == "fix"
    log(f"\n{problems} problem{'' if problems == 1 else 's'} to fix" if problems else "\nno problem found")
    return int(bool(problems))


def findings(deep: bool = False) -> Iterator[Finding]:
    """Run all checks, in order; the long ones if `deep`."""
    yield from python_version()
    yield from libraries(deep)
    yield from compiler(deep)
    yield from places.folders()
    yield from places.store()
    yield from places.token()


def python_version() -> Iterator[Finding]:
    yield python_finding(sys.version_info[:3])


def python_finding(version: tuple[int, ...]) -> Finding:
    message = f"Python {'.'.join(map(str, version))} ({sys.executable}), fbpc-ray {__version__}"
    if version[:2] < PYTHON:
        return Finding("fix", message, f"make the environment with Python {'.'.join(map(str, PYTHON))} or newer")
    return Finding("ok", message)


# Libraries


def libraries(deep: bool) -> Iterator[Finding]:
    """Try each library in a process of its own, two at a time, and what torch makes of the GPUs."""
    lowest, end = requirements(), time.monotonic() + SECONDS

    def seconds_left() -> float:
        return DEEP_SECONDS if deep else end - time.monotonic()

    def try_one(library: Library) -> Finding | None:
        if library.deep and not deep:
            return version_finding(library, lowest.get(library.name, ""))
        if library.name == "torch" and not gpu.result()[0]:
            library = library._replace(code="")  # the process for the GPUs has tried it
        return try_library(library, lowest.get(library.name, ""), seconds_left(), deep)

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1 if not deep else 2) as pool:
        gpu = first.submit(lambda: _run(CUDA, seconds_left()))
        others = [library for library in LIBRARIES if library.name not in ("torch", "torchvision")]
        others.sort(key=lambda library: library.name in ("ray", "mlflow"))  # the long ones last
        rest = {library.name: pool.submit(try_one, library) for library in others}
        rest |= {name: first.submit(try_one, library) for library in LIBRARIES if (name := library.name) not in rest}
        silent: list[str] = []
        for library in LIBRARIES:
            finding = rest[library.name].result()
            if finding is None:
                silent.append(library.name)
            else:
                yield finding
        if silent:
            message = f"{', '.join(silent)}: {NO_ANSWER} {SECONDS:g} s for all libraries together, the machine is busy"
            yield Finding("note", message, "fbpc doctor --deep waits longer")
        yield from cuda(*gpu.result())


def requirements() -> dict[str, str]:
    """Return {distribution: lowest version}, from pyproject.toml beside the code, else from the installed package."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    lines: list[str] = []
    try:
        project = tomllib.loads(path.read_text())["project"]
        lines = project["dependencies"] if project["name"] == "fbpc-ray" else []
    except (OSError, ValueError, KeyError):
        pass
    if not lines:
        try:
            lines = metadata.requires("fbpc-ray") or []
        except metadata.PackageNotFoundError:
            return {}
    matches = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\d.]+)(?!.*extra\s*==)", line) for line in lines)
    return {match[1].lower(): match[2] for match in matches if match}


def try_library(library: Library, lowest: str, seconds: float = DEEP_SECONDS, deep: bool = True) -> Finding | None:
    """Check the version of a library, and run its code in a process of its own.

    No answer within `seconds` is a problem if `deep`, else None: the machine may be busy.
    """
    finding = version_finding(library, lowest)
    if "is not installed" in finding.message or not library.code:
        return finding
    error, output = _run(library.code, seconds)
    name, version = library.name, metadata.version(library.name)
    if error.startswith(NO_ANSWER) and not deep:
        return None
    if error:
        requirement = f"'{name}>={lowest}'" if lowest else name
        fix = f"{sys.executable} -m pip install --force-reinstall {requirement}"
        if name == "torchvision":
            install = f"{sys.executable} -m pip install {requirement}"
            fix = f"torch and torchvision must be a pair, from one index: {install} 'torch'"
        without = f"; {library.without}" if library.without else ""
        state = "note" if library.without else "fix"
        return Finding(state, f"{name} {version} does not work ({error}){without}", fix)
    if finding.state == "ok" and output:
        return Finding("ok", f"{name} {version}, {output}")
    return finding


def version_finding(library: Library, lowest: str) -> Finding:
    """Check that a library is installed, and its version."""
    name = library.name
    requirement = f"'{name}>={lowest}'" if lowest else name
    install = f"{sys.executable} -m pip install {requirement}"
    state = "note" if library.without else "fix"
    without = f"; {library.without}" if library.without else ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(state, f"{name} is not installed{without}", install)
    if lowest and _numbers(version) < _numbers(lowest):
        return Finding(state, f"{name} {version} is older than {lowest}{without}", install)
    return Finding("ok", f"{name} {version}{' (--deep imports it)' if library.deep else ''}")


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 14, 1) for 2.14.1+cpu, without zeros at the end."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


NO_ANSWER = "no answer within"
"""How the error of `_run` begins where its process took too long."""


def _run(code: str, seconds: float) -> tuple[str, str]:
    """Run Python code in a process of its own; return why it failed, or nothing, and the last line that it printed."""
    if seconds <= 0:
        return f"{NO_ANSWER} {SECONDS:g} s for all libraries", ""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR", "GIT_PYTHON_REFRESH": "quiet"}
    try:
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **quiet}, capture_output=True, text=True,
            errors="replace", stdin=subprocess.DEVNULL, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{NO_ANSWER} {seconds:.0f} s", ""
    except OSError as error:
        return str(error), ""
    if process.returncode < 0:
        return f"its process was ended by signal {-process.returncode}", ""
    if process.returncode:
        return (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1][:200], ""
    return "", (process.stdout.strip().splitlines() or [""])[-1]


# The machine


def cuda(error: str, output: str) -> Iterator[Finding]:
    """Check whether torch can use the GPUs of this machine, by the error and the output of `CUDA`."""
    has_gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if error.startswith(NO_ANSWER):
        yield Finding("note", f"CUDA: unknown, {error}", "fbpc doctor --deep waits longer")
    elif error:
        yield Finding("note", "CUDA: unknown, since torch does not run", "fix torch first")
    else:
        yield cuda_finding(json.loads(output), has_gpu)


def cuda_finding(report: dict, has_gpu: bool) -> Finding:
    """Judge `report`, which `CUDA` prints; `has_gpu`: this machine seems to have a GPU."""
    torch, devices = f"torch {report['torch']}", report["devices"]
    if report["built"] is None:
        if has_gpu:
            fix = "runs use the CPU; install the torch and torchvision that are built for CUDA"
            return Finding("note", f"CUDA: this machine has a GPU, but {torch} is built without CUDA", fix)
        return Finding("note", "CUDA: no GPU here, runs use the CPU")
    if devices and not report["error"]:
        return Finding("ok", f"CUDA {report['built']}: {', '.join(devices)}")
    if has_gpu or devices:
        error = report["error"] or "it sees no device"
        fix = f"update the driver, install a torch that fits it, or use --device cpu ({torch}, CUDA {report['built']})"
        return Finding("fix", f"CUDA: this machine has a GPU, but torch cannot use it ({error})", fix)
    return Finding("note", "CUDA: no GPU here, runs use the CPU")


def compiler(deep: bool = True) -> Iterator[Finding]:
    """Look for the compiler and, if `deep`, compile a small library with OpenMP, as --compiled does."""
    program = os.environ.get("CXX") or "g++"
    error = _compiler_error(program) if deep or not shutil.which(program) else ""
    if error:
        fix = "install one (apt-get install g++, dnf install gcc-c++), or name yours in CXX"
        yield Finding("note", f"C++ compiler: {error}; passes stay eager, which is slower", fix)
    else:
        yield Finding("ok", f"C++ compiler: {program}, for --compiled{'' if deep else ' (--deep tries it)'}")


def _compiler_error(program: str) -> str:
    """Return why `program` cannot compile, or nothing."""
    if not shutil.which(program):
        return f"{program} not found"
    with tempfile.TemporaryDirectory(prefix="fbpc-") as folder:
        source = Path(folder) / "try.cpp"
        source.write_text("#include <omp.h>\n#include <vector>\nint threads() { return omp_get_max_threads(); }\n")
        words = [program, "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(source.with_suffix(".so"))]
        try:
            process = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=DEEP_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{program} does not run ({error})"
    if process.returncode:
        line = (process.stderr.strip().splitlines() or ["no reason given"])[0].replace(f"{folder}/", "")[:160]
        return f"{program} does not compile ({line})"
    return ""


if __name__ == "__main__":
    sys.exit(doctor(lambda line: print(line, flush=True), "--deep" in sys.argv[1:]))
