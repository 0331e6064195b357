"""Imports go one way (CONTRIBUTING.md), heavy libraries stay in their file, the core runs without ray and mlflow."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import fbpc_ray

ROOT = Path(fbpc_ray.__file__).parent

ROOMS = (
    "core", "inference", "data", "models", "evaluation", "distillation", "execution", "tracking", "reporting", "tuning",
    "reproduction", "api", "commands", "__main__",
)  # fmt: skip
"""The rooms, bottom to top. A module imports its own room and those below."""

ONLY = {
    "ray": ("execution.ray.", "tuning.ray_tune.", "tuning.search_space."),
    "mlflow": ("tracking.mlflow_client.", "tracking.mlflow_model.", "tracking.pyfunc_model."),
    "matplotlib": ("reporting.image_grids.", "reporting.charts."),
}
"""Library -> the modules, or the folder, that may import it."""


REEXPORTS = {("__init__", "fbpc_ray.api")}
"""`from fbpc_ray import distill`: imported in __getattr__, and for type checkers."""


class Import(NamedTuple):
    module: str
    """Who imports, relative to the package: `vision.zoo`."""
    target: str
    """What: `fbpc_ray.core.rng`, `torch.nn`."""
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
    return tuple(result for module, tree in modules().items() for result in imports(module, tree))


def inner() -> list[tuple[str, str, bool]]:
    """(who, whom, lazy) inside the package, but for the names of `api` that `fbpc_ray` gives at their first use."""
    return [
        (i.module, i.target.removeprefix("fbpc_ray").removeprefix(".") or "__init__", i.lazy)
        for i in all_imports()
        if i.target.split(".")[0] == "fbpc_ray" and (i.module, i.target) not in REEXPORTS
    ]


def room(module: str) -> int:
    """The floor of a module's room. `fbpc_ray` itself, which has the version alone, is below all."""
    name = module.split(".")[0]
    if name == "__init__":
        return -1
    assert name in ROOMS, f"{module} is in no room: give it its place in one of {', '.join(ROOMS)}"
    return ROOMS.index(name)


def test_every_module_is_in_a_room():
    """The checks below see the package: at least these modules and imports."""
    assert {"core.rng", "models.functional", "inference.posterior", "execution.ray.ray_backend"} <= set(modules())
    for module in modules():
        room(module)
    assert ("models.functional", "models.registry", False) in inner()
    assert ("execution.backends", "execution.ray.ray_backend", True) in inner()


def test_imports_go_down():
    """No import between rooms goes up, not even inside a function."""
    for importer, imported, _ in inner():
        assert room(imported) <= room(importer), f"{importer} imports {imported}, which is above it"


def test_the_mathematics_sees_types_alone():
    """inference/ imports core.types and itself."""
    for importer, imported, _ in inner():
        if importer.startswith("inference."):
            assert imported == "core.types" or imported.startswith("inference."), f"{importer} imports {imported}"


def test_heavy_modules_are_imported_lazily_from_other_rooms():
    """What needs ray, mlflow or matplotlib is named inside a function, or from a room above its own: the core runs
    without them."""
    heavy = tuple(place.rstrip(".") for places in ONLY.values() for place in places)
    for importer, imported, lazy in inner():
        if imported.startswith(heavy) and importer.split(".")[0] != imported.split(".")[0]:
            assert lazy or room(importer) > room(imported), f"{importer} imports {imported}"


@pytest.mark.parametrize("library", ONLY)
def test_a_heavy_library_has_one_place(library):
    """ONLY holds at module level and inside a function."""
    for result in all_imports():
        if result.target.split(".")[0] == library:
            assert f"{result.module}.".startswith(ONLY[library]), f"{result.module} imports {library}"


def test_the_mathematics_stands_on_torch_alone():
    """inference, rng and types import torch and the standard library; config, errors and files the latter only, but
    for the locks of files: filelock, which is small and stands on nothing."""
    plain = {f"core.{name}" for name in ("config", "errors", "files", "signals", "provenance")} | {"__init__"}
    for result in all_imports():
        top = result.target.split(".")[0]
        if top not in sys.stdlib_module_names and top != "fbpc_ray":
            assert result.module not in plain or (result.module, top) == ("core.files", "filelock"), result
            if result.module.startswith("inference.") or result.module in ("core.rng", "core.types"):
                assert top == "torch", result


def test_there_is_no_import_cycle():
    """Modules whose imports at module level are all taken away, again and again, until none is left."""
    graph = {
        module: {imported for importer, imported, lazy in inner() if importer == module and not lazy}
        for module in modules()
    }
    while graph:
        free = {module for module, needs in graph.items() if not needs & graph.keys() - {module}}
        assert free, f"cycle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in free}


def test_jobs_are_imported_by_nobody():
    """Jobs, tests and benchmarks stand on top."""
    assert not [result for result in all_imports() if result.target.split(".")[0] in ("jobs", "tests", "benchmarks")]


def run(code: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


HEAVY = ("torch", "numpy", "ray", "mlflow", "matplotlib", "pyarrow", "sklearn", "torchvision", "tyro")
STAGES = """
import json, sys
stages = []
def end(*more): stages.append([sorted(set(HEAVY) & set(sys.modules)), *more])
import fbpc_ray
end(fbpc_ray.__version__)
import fbpc_ray.core.config, fbpc_ray.commands.main
end()
names = dir(fbpc_ray)
end()
from fbpc_ray import *
from fbpc_ray import api, distill
assert distill is api.distill and set(api.__all__) <= set(names)
end(sorted(api.__all__) == sorted(fbpc_ray.__all__), Coreset.__name__)
import fbpc_ray.distillation.loop, fbpc_ray.execution.session, fbpc_ray.execution.backends
end()
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages() -> list[list]:
    """What a fresh interpreter has imported of HEAVY: after the package, the command line, `dir`, the API, the core."""
    return json.loads(" ".join(run(f"HEAVY = {HEAVY}{STAGES}")))


def test_importing_the_package_imports_nothing_heavy(stages):
    """A version, and no work: `fbpc --help` and Ray's workers start from here."""
    assert stages[0] == [[], fbpc_ray.__version__]


def test_importing_config_and_cli_takes_no_torch(stages):
    """Flags and presets are plain Python, so --help and a typo answer at once."""
    assert set(stages[1][0]).isdisjoint({"torch", "ray", "mlflow", "matplotlib", "pyarrow"})


def test_the_public_names_are_there_at_their_first_use(stages):
    """Those of api, as editors and `dir` see them; no other."""
    assert "torch" not in stages[2][0]
    assert "torch" in stages[3][0] and stages[3][1:] == [True, "Coreset"]
    with pytest.raises(AttributeError, match="module 'fbpc_ray' has no attribute 'distil'"):
        fbpc_ray.distil  # type: ignore[attr-defined]  # noqa: B018
    assert (ROOT / "py.typed").is_file()


def test_the_core_imports_neither_ray_nor_mlflow_nor_matplotlib(stages):
    """Where they are installed: importing the API, the pipeline and the plan takes none of them."""
    assert set(stages[4][0]).isdisjoint(ONLY)


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

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.core.signals import Interruption
settings = Config()
with open_backend(settings.updated(backend="serial", device="cpu"), Interruption(), print) as opened:
    print(type(opened).__name__)
try:
    with open_backend(settings, Interruption(), print):
        print("opened")
except UserError as error:
    print("--backend" in str(error) and "ray" in str(error) and "\\n" not in str(error))
"""


@pytest.mark.slow
def test_the_core_runs_where_ray_and_mlflow_are_not_installed():
    """All below `tracking` but Ray's backend imports (without matplotlib, too), and so do commands; the serial backend
    opens.

    Ray's backend says in one line what to do.
    """
    heavy = tuple(place.rstrip(".") for places in ONLY.values() for place in places)
    core = [m for m in modules() if room(m) < ROOMS.index("tracking") and m != "__init__" and not m.startswith(heavy)]
    top = [f"commands.{name}" for name in ("distill", "export", "doctor", "ui", "main")] + ["tuning.sweep"]
    result = run(WITHOUT.replace("CORE", repr(core)).replace("TOP", repr(top)))
    assert result == [*core, *top, "no", "ray", "no", "mlflow", "Serial", "loading", "Ray", "...", "True"]


@pytest.mark.parametrize("module", modules())
def test_a_module_says_in_one_line_what_it_is(module):
    """The map of modules on the documentation site (docs/site_hooks.py) is made of these lines."""
    line = (ast.get_docstring(modules()[module]) or "").partition("\n")[0]
    assert 10 < len(line) <= 100, line
    assert line[-1] in ".:", line


def test_contributing_names_the_rooms():
    """Bottom to top, all of them, and each is a folder."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    rooms = text.partition("Rooms, bottom to top: `")[2].partition("`")[0].split()
    assert rooms == [room for room in ROOMS if room not in ("api", "__main__")]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(rooms)
    files = re.findall(r"`(\w+/[\w/]*\w\.py)`", text.partition("## Where is what?")[2])
    assert len(files) > 20 and all((ROOT / file).exists() for file in files)
