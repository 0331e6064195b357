"""`fbpc doctor`: whether what is needed is here and works, a line for each thing, with its mend.

Stands on the standard library alone, and tries each library in a process of its own: one that is missing, broken, or
takes its process with it, is a line. `python -m fbpc_ray.commands.doctor` works where the command line's don't.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from fbpc_ray import __version__
from fbpc_ray.core import cache
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import home

PYTHON = (3, 11)
SECONDS = 180
"""After which a library that is being tried is taken for broken."""
ROOM, LITTLE = 5e9, 2e8
"""Bytes of a disk below which there is a note, and below which nothing can be written."""


class Line(NamedTuple):
    """What was found of one thing."""

    state: Literal["ok", "note", "mend"]
    """note: works, but less well, or not in every case; mend: something that is needed doesn't work."""
    what: str
    how: str = ""
    """What to do."""

    def __str__(self) -> str:
        text = f"{self.what}: {self.how}" if self.how else self.what
        return f"{self.state:<6}{' '.join(text.split())}"


class Library(NamedTuple):
    """A requirement, and how it is tried."""

    name: str
    """Of its distribution."""
    code: str
    """Raises where it doesn't work; what it prints is added to the line."""
    without: str = ""
    """What happens without it, where that isn't the end."""


IMPORTANT = (
    Library("numpy", "import numpy; numpy.zeros(2).sum()"),
    Library("torch", "import torch; assert float(torch.ones(2, 2).matmul(torch.ones(2, 1)).sum()) == 4"),
    Library(
        "torchvision",
        "import torch, torchvision\n"
        "boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 2.1], [5., 5., 6., 6.]])\n"
        "assert torchvision.ops.nms(boxes, torch.tensor([.9, .8, .7]), .5).tolist() == [0, 2]\n"
        "print('its compiled operators run')",
    ),
    Library("ray", "import ray, ray.tune", "--backend serial works without"),
    Library("mlflow", "import mlflow; from mlflow import MlflowClient", "runs go on, untracked"),
    Library("pyarrow", "import pyarrow.parquet, pyarrow.fs, pyarrow.ipc"),
    Library("matplotlib", "from matplotlib.backends.backend_agg import FigureCanvasAgg"),
    Library("safetensors", "import safetensors.torch"),
    Library("scikit-learn", "import sklearn.datasets; sklearn.datasets.load_digits()", "needed by --data digits alone"),
    Library("pillow", "import PIL.Image"),
    Library("tyro", "import tyro"),
    Library("tqdm", "import tqdm"),
)

CUDA = """
import json, torch
found = {"built": torch.version.cuda, "torch": torch.__version__, "devices": [], "error": ""}
try:
    if torch.version.cuda:
        torch.cuda.init()
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            ones = torch.ones(1, 1, 8, 8, device=number)
            assert torch.nn.functional.conv2d(ones, ones).item() == 64
            found["devices"].append(f"{about.name}, {about.total_memory / 1e9:.0f} GB")
except Exception as error:
    found["error"] = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
print(json.dumps(found))
"""


def doctor(log: Callable[[str], None]) -> int:
    """Say each line as it is known; the exit status: 1 where something is to be mended, else 0."""
    lines = []
    for line in examine():
        log(str(line))
        lines.append(line)
    broken = sum(line.state == "mend" for line in lines)
    things = "1 thing" if broken == 1 else f"{broken} things"
    log(f"\n{things} to mend" if broken else "\nall that is needed is here")
    return int(bool(broken))


def examine() -> Iterator[Line]:
    """Everything, in the order in which it is said."""
    yield python_version(sys.version_info[:3])
    bounds = requirements()
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda library: tried(library, bounds.get(library.name, "")), IMPORTANT)
    yield cuda()
    yield compiler()
    yield from folders()
    yield token(os.environ)


def python_version(found: tuple[int, ...]) -> Line:
    said = f"Python {'.'.join(map(str, found))} ({sys.executable}), fbpc-ray {__version__}"
    if found[:2] < PYTHON:
        return Line("mend", said, f"make the environment with Python {'.'.join(map(str, PYTHON))} or newer")
    return Line("ok", said)


# Libraries


def requirements() -> dict[str, str]:
    """{distribution: its lowest version}, out of pyproject.toml beside the code, else out of what was installed."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    wanted: list[str] = []
    try:
        project = tomllib.loads(path.read_text())["project"]
        wanted = project["dependencies"] if project["name"] == "fbpc-ray" else []
    except (OSError, ValueError, KeyError):
        pass
    if not wanted:
        try:
            wanted = metadata.requires("fbpc-ray") or []
        except metadata.PackageNotFoundError:
            return {}
    found = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\d.]+)(?!.*extra\s*==)", each) for each in wanted)
    return {match[1].lower(): match[2] for match in found if match}


def tried(library: Library, lowest: str) -> Line:
    """A library in a process of its own: its version, and whether it works."""
    name = library.name
    wanted = f"'{name}>={lowest}'" if lowest else name
    install = f"{sys.executable} -m pip install {wanted}"
    state = "note" if library.without else "mend"
    beside = f"; {library.without}" if library.without else ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Line(state, f"{name} is not installed{beside}", install)
    failed, said = _run(library.code)
    if failed:
        again = f"{sys.executable} -m pip install --force-reinstall {wanted}"
        if name == "torchvision":
            again = f"torch and torchvision must be a pair, from one index: {install} 'torch'"
        return Line(state, f"{name} {version} does not work ({failed}){beside}", again)
    if lowest and _numbers(version) < _numbers(lowest):
        return Line(state, f"{name} {version} is older than {lowest}{beside}", install)
    return Line("ok", f"{name} {version}{f', {said}' if said else ''}")


def _numbers(version: str) -> tuple[int, ...]:
    """2.14.1+cpu -> (2, 14, 1); zeros at the end don't count."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(each) for each in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _run(code: str) -> tuple[str, str]:
    """(why it failed, or nothing; what it printed last) of Python in a process of its own."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR", "GIT_PYTHON_REFRESH": "quiet"}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **quiet}, capture_output=True, text=True,
            errors="replace", stdin=subprocess.DEVNULL, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s", ""
    except OSError as error:
        return str(error), ""
    if done.returncode < 0:
        return f"it ended its process by signal {-done.returncode}", ""
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200], ""
    return "", (done.stdout.strip().splitlines() or [""])[-1]


# The machine


def cuda() -> Line:
    """What torch makes of the GPUs."""
    failed, said = _run(CUDA)
    here = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if failed:
        return Line("note", "CUDA: torch cannot say", "mend torch first")
    return cuda_line(json.loads(said), here)


def cuda_line(found: dict, here: bool) -> Line:
    """`found` is what torch says; `here`: the machine seems to have a GPU."""
    torch, devices = f"torch {found['torch']}", found["devices"]
    if found["built"] is None:
        if here:
            how = "runs use the CPU; install the torch and torchvision that are built for CUDA"
            return Line("note", f"CUDA: a GPU is here, but {torch} is built without", how)
        return Line("note", "CUDA: none here, runs use the CPU")
    if devices and not found["error"]:
        return Line("ok", f"CUDA {found['built']}: {', '.join(devices)}")
    if here or devices:
        why = found["error"] or "it sees no device"
        how = f"update the driver, install a torch that fits it, or use --device cpu ({torch}, CUDA {found['built']})"
        return Line("mend", f"CUDA: a GPU is here, but torch cannot use it ({why})", how)
    return Line("note", "CUDA: no GPU here, runs use the CPU")


def compiler() -> Line:
    """The C++ compiler that --compiled takes, tried on a library with OpenMP."""
    program = os.environ.get("CXX") or "g++"
    less = "passes stay eager, which is slower"
    how = "install one (apt-get install g++, dnf install gcc-c++), or name yours in CXX"
    if not shutil.which(program):
        return Line("note", f"C++ compiler: no {program}; {less}", how)
    with tempfile.TemporaryDirectory(prefix="fbpc-") as folder:
        source = Path(folder) / "try.cpp"
        source.write_text("#include <omp.h>\n#include <vector>\nint threads() { return omp_get_max_threads(); }\n")
        words = [program, "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            return Line("note", f"C++ compiler: {program} does not run ({error}); {less}", how)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[0].replace(f"{folder}/", "")[:160]
        return Line("note", f"C++ compiler: {program} does not compile ({why}); {less}", how)
    return Line("ok", f"C++ compiler: {program}, for --compiled")


def folders() -> Iterator[Line]:
    """Can they be written, and have they room: the user's home, where runs go, the cache, temporary files."""
    try:
        yield folder_line("HOME", Path.home(), "note", "set HOME to a folder that can be written")
    except RuntimeError:
        yield Line("note", "HOME: this user has none", "set HOME to a folder that can be written")
    try:
        yield folder_line(
            "experts, runs and mlflow.db", home(), "mend", "set FBPC_HOME to a folder that can be written"
        )
    except (UserError, RuntimeError, OSError) as error:
        yield Line("mend", f"experts, runs and mlflow.db: {error}", "set FBPC_HOME to a local folder")
    yield cache_line()
    yield temporary_line()


def folder_line(what: str, path: Path, state: Literal["note", "mend"], how: str) -> Line:
    """Whether a file can be made in `path`, or in what is there of it, and the room on its disk."""
    try:
        there = next(each for each in (path, *path.parents) if each.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".fbpc-doctor-"):
            pass
        free = shutil.disk_usage(there).free
    except (OSError, StopIteration) as error:
        why = getattr(error, "strerror", None) or "it is not there"
        return Line(state, f"{what}: {path} cannot be written ({why.lower()})", how)
    said = f"{what}: {path}, {free / 1e9:.1f} GB free"
    if free < LITTLE:
        return Line(state, said, f"free some space, or {how}")
    if free < ROOM:
        return Line("note", said, "a hundred experts take gigabytes: mind the space")
    return Line("ok", said)


def cache_line() -> Line:
    """The cache of experts and of compiled passes."""
    try:
        path = cache.folder()
    except RuntimeError:
        return Line("note", "cache: no home", "set FBPC_CACHE to a folder that can be written")
    if limit := os.environ.get("FBPC_CACHE_GB"):
        try:
            float(limit)
        except ValueError:
            return Line("mend", f"cache: FBPC_CACHE_GB is {limit!r}", "give a number of gigabytes, or unset it")
    line = folder_line("cache", path, "note", "set FBPC_CACHE to a folder that can be written")
    if line.state == "ok" and (place := cache.open_to_others(path / "compiled")):
        why = f"cache: others can write to {place}, so no compiled pass is loaded from it"
        return Line("note", why, f"chmod go-w {place}, or set FBPC_CACHE to a folder of your own")
    return line


def temporary_line() -> Line:
    """Ray keeps its sessions here, and stores nothing where a disk is fuller than 95 %."""
    path = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    line = folder_line("temporary files", path, "mend", "set TMPDIR (RAY_TMPDIR for Ray) to another disk")
    if line.state != "mend":
        usage = shutil.disk_usage(path if path.exists() else path.parent)
        if usage.free < 0.05 * usage.total:
            how = "Ray spills no objects to it: free some space, or set RAY_TMPDIR to another disk"
            return Line("note", f"temporary files: the disk of {path} is over 95 % full", how)
    return line


def token(environment: Mapping[str, str]) -> Line:
    """How Ray is told who we are. Shows nothing of the token."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    make = "ray get-auth-token --generate"
    try:
        file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        held = bool(file.is_file() and file.read_text().strip())
    except (OSError, RuntimeError, ValueError) as error:
        return Line("note", f"Ray's token cannot be read ({error})", "mend the file's permissions")
    known = bool(environment.get("RAY_AUTH_TOKEN")) or held
    if mode not in ("", "token", "disabled"):
        return Line("mend", f"RAY_AUTH_MODE is {mode!r}", "set it to token, or to disabled on a machine of your own")
    if mode == "token" and not known:
        return Line("mend", f"RAY_AUTH_MODE is token, but there is none in RAY_AUTH_TOKEN or {file}", make)
    if held and not environment.get("RAY_AUTH_TOKEN") and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Line("note", f"Ray's token: others can read {file}", f"chmod 600 {file}")
    if mode == "disabled":
        return Line("note", "RAY_AUTH_MODE is disabled: who reaches the cluster can use it", "set it to token")
    if mode:
        return Line("ok", "RAY_AUTH_MODE is token, and a token is there")
    if known:
        how = "commands here use it; for `ray start` and `ray job submit` export RAY_AUTH_MODE=token in each shell"
        return Line("note", "Ray's token is there, RAY_AUTH_MODE is not set", how)
    how = f"before `ray start` export RAY_AUTH_MODE=token, then {make}; fbpc alone needs neither"
    return Line("note", "RAY_AUTH_MODE is not set, and there is no token", how)


if __name__ == "__main__":
    sys.exit(doctor(lambda line: print(line, flush=True)))
