"""Imports go one way (CONTRIBUTING.md), heavy libraries stay in their file, the core runs without ray and mlflow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import fbpc_ray

ROOT = Path(fbpc_ray.__file__).parent

LAYERS = {
    0: "__init__ errors",
    1: "allocator atomic cache compiled config presets rng storage types signals provenance page manual mlflow_uri",
    2: "inference.* vision.*",
    3: "coreset ensemble exchange experts passes",
    4: "teach methods.* evaluate",
    5: "distill",
    6: "backend run",
    7: "plan results",
    8: "pipeline sweep",
    9: "cluster.* tracking figures charts served",
    10: "reproduce.* pictures logged mlflow_model serve",
    11: "api commands ended export reproduction tuning report doctor ui",
    12: "cli",
    13: "__main__",
}
"""Layer -> its modules. A module imports its own layer and those below."""

ONLY = {
    "ray": ("cluster.",),
    "mlflow": ("tracking.", "mlflow_model.", "served."),
    "matplotlib": ("figures.", "charts."),
}
"""Library -> the modules, or the folder, that may import it."""

LAZY_UPWARDS = {("plan", "cluster.backend")}
"""What a function may import from a layer above: the backend, when it is asked for."""


class Import(NamedTuple):
    module: str
    """Who imports, relative to the package: `vision.zoo`."""
    target: str
    """What: `fbpc_ray.rng`, `torch.nn`."""
    lazy: bool
    """Inside a function."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imports(module: str, node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import under `node`. `from fbpc_ray import x` is one of `fbpc_ray.x`."""
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: relative import"
            source = child.module or ""
            for alias in child.names:
                below = f"{source}.{alias.name}"
                is_module = source.split(".")[0] == "fbpc_ray" and below.removeprefix("fbpc_ray.") in modules()
                yield Import(module, below if is_module else source, lazy)
        elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("__import__", "importlib.import_module"):
            assert child.args, module
            assert isinstance(child.args[0], ast.Constant), f"{module}: an import that can't be read"
            yield Import(module, str(child.args[0].value), lazy)
        yield from imports(module, child, inside)


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for module, tree in modules().items() for found in imports(module, tree))


def inner() -> list[tuple[str, str, bool]]:
    """(who, whom, lazy) inside the package."""
    return [
        (i.module, i.target.removeprefix("fbpc_ray").removeprefix(".") or "__init__", i.lazy)
        for i in all_imports()
        if i.target.split(".")[0] == "fbpc_ray"
    ]


def layer(module: str) -> int:
    folder = module.split(".")[0] + ".*"
    for number, members in LAYERS.items():
        if module in members.split() or folder in members.split():
            return number
    raise AssertionError(f"{module} is in no layer: give it its place in LAYERS, as low as it can be")


def test_every_module_has_a_layer_and_every_layer_module_is_found():
    """The check below sees the package: at least these, and none outside."""
    assert {"rng", "vision.zoo", "inference.posterior", "teach", "cluster.backend", "cli"} <= set(modules())
    for module in modules():
        layer(module)
    assert ("teach", "vision.zoo", False) in inner()
    assert ("plan", "cluster.backend", True) in inner()


def test_imports_go_one_way():
    """config, types, rng <- inference | vision <- coreset, experts <- teach, distill, evaluate <- cluster <- cli."""
    for who, whom, lazy in inner():
        if not (lazy and (who, whom) in LAZY_UPWARDS):
            assert layer(whom) <= layer(who), f"{who} imports {whom}, which is above it"


def test_inference_and_vision_do_not_know_each_other_nor_anything_above():
    """The mathematics sees types alone; the ingredients see types, rng, errors and atomic."""
    allowed = {"inference": {"types"}, "vision": {"types", "rng", "errors", "atomic"}}
    for who, whom, _ in inner():
        folder = who.split(".")[0]
        if folder in allowed:
            assert whom in allowed[folder] or whom.split(".")[0] == folder, f"{who} imports {whom}"


def test_the_base_imports_nothing_of_the_package_but_errors_and_each_other():
    """config, errors, rng, types, atomic and storage can be read, and tested, without the rest."""
    base = {"config", "errors", "rng", "types", "atomic", "storage"}
    for who, whom, _ in inner():
        if who in base:
            assert whom in base, f"{who} imports {whom}"
    assert not [whom for who, whom, _ in inner() if who in ("errors", "__init__")]


def test_tracking_figures_and_charts_know_nobody():
    """They take plain values; of the package at most the error, places, addresses, and the whole-file write."""
    for who, whom, _ in inner():
        if who in ("tracking", "mlflow_model", "figures", "charts") and (who, whom) != ("mlflow_model", "tracking"):
            assert whom in ("errors", "atomic", "storage", "mlflow_uri", "__init__"), f"{who} imports {whom}"


def test_nothing_below_cluster_imports_it_at_module_level():
    """The core runs without Ray: only commands, cli and jobs, which stand above, may name it before a run asks."""
    for who, whom, lazy in inner():
        top = whom.split(".")[0]
        if top in ("cluster", "tracking", "mlflow_model", "figures", "charts") and who.split(".")[0] != top:
            assert lazy or layer(who) > layer(whom), f"{who} imports {whom}"


@pytest.mark.parametrize("library", ONLY)
def test_a_heavy_library_has_one_place(library):
    """ray in cluster, mlflow in tracking and mlflow_model (and in served, which MLflow runs), matplotlib in figures
    and charts: at module level or inside a function."""
    for found in all_imports():
        if found.target.split(".")[0] == library:
            assert f"{found.module}.".startswith(ONLY[library]), f"{found.module} imports {library}"


def test_the_mathematics_stands_on_torch_alone():
    """inference, rng and types import torch and the standard library; config, errors and atomic the latter only."""
    for found in all_imports():
        top, folder = found.target.split(".")[0], found.module.split(".")[0]
        if top not in sys.stdlib_module_names and top != "fbpc_ray":
            assert folder not in ("config", "errors", "atomic", "signals", "provenance", "__init__"), found
            assert folder not in ("inference", "rng", "types") or top == "torch", found


def test_there_is_no_import_cycle():
    """Modules whose imports at module level are all taken away, again and again, until none is left."""
    graph = {module: {whom for who, whom, lazy in inner() if who == module and not lazy} for module in modules()}
    while graph:
        free = {module for module, needs in graph.items() if not needs & graph.keys() - {module}}
        assert free, f"cycle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in free}


def test_jobs_are_imported_by_nobody():
    """Jobs, tests and benchmarks stand on top."""
    assert not [found for found in all_imports() if found.target.split(".")[0] in ("jobs", "tests", "benchmarks")]


def run(code: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_importing_the_package_imports_nothing_heavy():
    """A version, and no work: `fbpc --help` and Ray's workers start from here."""
    heavy = ("torch", "numpy", "ray", "mlflow", "matplotlib", "pyarrow", "sklearn", "torchvision", "tyro")
    assert run(f"import sys, fbpc_ray; print(fbpc_ray.__version__, *({set(heavy)} & set(sys.modules)))") == [
        fbpc_ray.__version__
    ]


def test_importing_config_and_cli_takes_no_torch():
    """Flags and presets are plain Python, so --help and a typo answer at once."""
    heavy = {"torch", "ray", "mlflow", "matplotlib", "pyarrow"}
    assert run(f"import sys, fbpc_ray.config, fbpc_ray.cli; print(*({heavy} & set(sys.modules)))") == []


def test_the_core_imports_neither_ray_nor_mlflow_nor_matplotlib():
    """Where they are installed: importing the pipeline and the plan takes none of them."""
    code = f"import sys, fbpc_ray.pipeline, fbpc_ray.plan; print(*({set(ONLY)} & set(sys.modules)))"
    assert run(code) == []


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import importlib
for missing, names in (("ray", "mlflow", "matplotlib"), CORE), (("ray", "mlflow"), TOP):
    for name in names:
        importlib.import_module(f"fbpc_ray.{name}")
        print(name)
for name in "ray", "mlflow":
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print("no", name)

from fbpc_ray import plan
from fbpc_ray.config import Config
from fbpc_ray.errors import UserError
from fbpc_ray.signals import Interruption
settings = Config()
with plan.backend(settings.updated(backend="serial", device="cpu"), Interruption(), print) as opened:
    print(type(opened).__name__)
try:
    with plan.backend(settings, Interruption(), print):
        print("opened")
except UserError as error:
    print("--backend" in str(error) and "ray" in str(error) and "\\n" not in str(error))
"""


def test_the_core_runs_where_ray_and_mlflow_are_not_installed():
    """All below cluster imports (without matplotlib, too), and so do commands and cli; the serial backend opens.

    Ray's backend says in one line what to do.
    """
    core = [module for module in modules() if layer(module) < layer("cluster.backend") and module != "__init__"]
    top = ["commands", "export", "tuning", "report", "doctor", "ui", "cli"]
    found = run(WITHOUT.replace("CORE", repr(core)).replace("TOP", repr(top)))
    assert found == [*core, *top, "no", "ray", "no", "mlflow", "Serial", "True"]
