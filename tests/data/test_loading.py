"""A file is data: nothing that is loaded runs code, however it was made. Every trap here goes off when unpickled,
imported or run; `sprung` is the file that it would leave. CIFAR-10-C's arrays: test_corruptions.py."""

import ast
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import EpsImagePlugin, Image
from support.runs import distil, flags, refused
from support.traps import Trap

import fbpc_ray
from fbpc_ray.commands import main
from fbpc_ray.core import files, inputs
from fbpc_ray.core.config import read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.data import coreset
from fbpc_ray.data.datasets import load
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.execution import session
from fbpc_ray.reproduction.rows import Rows

NETWORK = """
from pathlib import Path
Path({sprung!r}).touch()
from torch import nn
def build(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""
SERIAL = ("--backend", "serial", "--num-chains", "1", "--chain-epochs", "2", "--chain-every", "1")
BRIEF: dict[str, int] = {"num_chains": 1, "chain_epochs": 2, "chain_every": 1}


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / "sprung"


def test_the_trap_is_one(sprung):
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A finished run of two steps on one network."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    distil(*flags(small, backend="serial", steps=2, architectures=("convnet-in",), out=str(folder), **BRIEF))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run that was made elsewhere: nobody here asked for its network."""
    return Path(shutil.copytree(finished, tmp_path / "theirs"))


@pytest.fixture
def network(sprung, tmp_path, monkeypatch):
    """A module in the current folder whose import is seen."""
    (tmp_path / "theirnets.py").write_text(NETWORK.format(sprung=str(sprung)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "theirnets:build"
    sys.modules.pop("theirnets", None)


def rewrite(folder: Path, **values: object) -> None:
    path = RunDirectory(folder).config_path
    files.write_checked_json(path, inputs.read_checked_json(path) | values)


@pytest.mark.parametrize(
    "command",
    [("evaluate", "RUN", *SERIAL), ("distill", "--out", "RUN", "--resume"),
     ("distill", "--out", "RUN", "--resume", "auto"),
     ("distill", "--out", "RUN", "--resume", "auto", "--dry-run")],
    ids=lambda words: f"{words[0]} {words[2] if words[0] == 'evaluate' else words[3]}",
)  # fmt: skip
def test_a_configuration_imports_no_network_unasked(run, network, sprung, capsys, command):
    """A config.json that names an own network: one line that repeats the flag, and no import."""
    rewrite(run, architectures=["convnet-in", network], steps=3)
    RunDirectory(run).result_path.unlink()
    message = refused(capsys, *(str(run) if word == "RUN" else word for word in command[1:]), command=command[0])
    assert f"--architectures convnet-in {network}" in message
    assert not sprung.exists()
    assert "theirnets" not in sys.modules


@pytest.mark.parametrize("command", ["distill", "experts", "tune"])
def test_a_preset_file_imports_no_network_unasked(network, sprung, tmp_path, capsys, command):
    (tmp_path / "best.json").write_text(json.dumps({"architectures": ["convnet-in", network]}))
    message = refused(capsys, "--preset", "best.json", "--dry-run", "--backend", "serial", command=command)
    assert f"--architectures convnet-in {network}" in message
    assert not sprung.exists()


def test_a_network_that_is_asked_for_is_imported(run, network, sprung, capsys):
    """The way out that the line names, for evaluate; a name of ours needs none."""
    rewrite(run, architectures=["convnet-in", network])
    main.main(["evaluate", str(run), *SERIAL, "--architectures", "convnet-in"])
    assert not sprung.exists()
    main.main(["evaluate", str(run), *SERIAL, "--architectures", "convnet-in", network])
    assert sprung.exists()
    assert network in capsys.readouterr().out


def test_a_run_of_an_own_network_says_how_it_is_resumed(small, network, tmp_path, capsys):
    """The flag repeated goes on with it, the line without it is refused."""
    folder = tmp_path / "own"
    distil(*flags(small, backend="serial", steps=2, architectures=(network,), out=str(folder), **BRIEF))
    assert network in refused(capsys, "--out", str(folder), "--resume", "--steps", "3")
    distil("--out", str(folder), "--resume", "--steps", "3", "--architectures", network)
    assert json.loads(RunDirectory(folder).result_path.read_text())["steps"] == 3


@pytest.mark.parametrize("address", ["203.0.113.7:6379", "ray://203.0.113.7:10001", "auto"])
def test_a_configuration_connects_to_no_cluster_unasked(run, capsys, address):
    """What a cluster answers is unpickled, so its address is asked for."""
    rewrite(run, address=address, backend="ray", steps=3)
    assert f"--address {address}" in refused(capsys, "--out", str(run), "--resume")
    assert f"--address {address}" in refused(capsys, "--out", str(run), "--resume", "auto")


def test_an_address_that_is_asked_for_is_taken(run):
    """The way out that the line names, for a resume; `evaluate` takes its own."""
    rewrite(run, address="203.0.113.7:6379", backend="ray", steps=3)
    main.main(["evaluate", str(run), *SERIAL])
    distil("--out", str(run), "--resume", "--address", "203.0.113.7:6379", "--backend", "serial")
    assert json.loads(RunDirectory(run).result_path.read_text())["steps"] == 3


# ---- files of every kind in the place of ours


def pickled(trap: Trap) -> bytes:
    return pickle.dumps(trap)


def torch_file(trap: Trap) -> bytes:
    """A zip file with a pickle in it, as torch.save writes."""
    file = io.BytesIO()
    torch.save({"images": torch.zeros(2), "trap": trap}, file)
    return file.getvalue()


def torch_file_of_old(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save(trap, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def object_array(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([trap], object), allow_pickle=True)
    return file.getvalue()


def object_archive(trap: Trap) -> bytes:
    """An npz whose arrays have the right names, and are pickles."""
    file = io.BytesIO()
    traps = np.array([trap], object)
    np.savez(file, x_train=traps, y_train=traps, x_test=traps, y_test=traps)
    return file.getvalue()


def hostile_schema(trap: Trap) -> pa.Table:
    """A column whose type an Arrow before 14.0.1 unpickles as soon as it reads the schema."""
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(trap)}
    fields = [pa.field(name, pa.binary(), metadata=extension) for name in ("image", "label", "weight", "step")]
    return pa.Table.from_arrays([pa.array([pickle.dumps(trap)])] * 4, schema=pa.schema(fields, {"recipe": "{}"}))


def parquet_file(trap: Trap) -> bytes:
    file = io.BytesIO()
    pq.write_table(hostile_schema(trap), file)
    return file.getvalue()


def arrow_file(trap: Trap) -> bytes:
    file, table = io.BytesIO(), hostile_schema(trap)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def hostile_metadata(trap: Trap) -> bytes:
    """A safetensors file with the right tensors and Python where numbers and JSON should be."""
    code = f"__import__('pathlib').Path({trap.sprung!r}).touch()"
    images = torch.zeros(10, 1, 8, 8)
    tensors = {"images": images, "velocity": images.clone(), "labels": torch.arange(10), "inner": torch.zeros(2)}
    facts = {"format": "1", "step": code, "mean": code, "std": code, "classes": code, "method": code}
    return safetensors.torch.save(tensors, facts)


def hostile_header(trap: Trap) -> bytes:
    """A safetensors file whose header claims 2^62 bytes, and is a pickle."""
    return (1 << 62).to_bytes(8, "little") + pickle.dumps(trap)


def deep_json(trap: Trap) -> bytes:
    """More brackets than the stack of any reader holds."""
    del trap
    return b"[" * 1_000_000


def deep_metadata(trap: Trap) -> bytes:
    del trap
    facts = {"format": "1", "step": "1", **dict.fromkeys(("mean", "std", "classes"), "[" * 100_000)}
    return safetensors.torch.save({"images": torch.zeros(1, 1, 1, 1), "labels": torch.zeros(1).long()}, facts)


KINDS = (
    pickled, torch_file, torch_file_of_old, object_array, object_archive, parquet_file, arrow_file, hostile_metadata,
    hostile_header, deep_json, deep_metadata,
)  # fmt: skip


@pytest.fixture(scope="module")
def loaders(small, digits, tmp_path_factory):
    """{what: (the file, who reads it)} for all that a run, its experts and a table consist of."""
    folder = tmp_path_factory.mktemp("loaders")
    run, labels = RunDirectory(folder / "run"), torch.arange(10)
    config = small.updated(experts=str(folder / "experts"))
    (spec, *_) = session.network_specs(config, digits)

    def experts():
        return session.expert_store(config, digits, spec)

    def checkpoint():
        return run.restore(labels, digits.image_shape)

    place = Path(str(experts().folder))
    readers_of: dict[str, tuple[Path, Callable[[], object]]] = {
        "coreset": (run.coreset_path, lambda: coreset.load(run.coreset_path)),
        "what made a coreset": (run.coreset_path, lambda: coreset.metadata(run.coreset_path)),
        "checkpoint": (run.state_path, checkpoint),
        "metrics": (run.metrics_path, checkpoint),
        "configuration": (run.config_path, lambda: read_config(run.folder)),
        "preset": (folder / "best.json", lambda: preset(str(folder / "best.json"))),
        "result": (run.result_path, run.read_result),
        "experts' recipe": (place / "store.json", experts),
        "an expert's manifest": (place / "00000.json", lambda: experts().missing(1) and experts().read(0, 0)),
        "an expert": (place / "00000.arrow", lambda: experts().read(0, 0)),
        "rows of a table": (folder / "rows" / "a.parquet", lambda: Rows(folder / "rows").read()),
        "npz": (folder / "d.npz", lambda: load(f"npz:{folder / 'd.npz'}")),
        "parquet": (folder / "d.parquet", lambda: load(f"parquet:{folder / 'd.parquet'}")),
        "image": (folder / "d" / "train" / "ant" / "0.png", lambda: load(f"folder:{folder / 'd'}")),
        "cifar10": (folder / "cifar-10-batches-py" / "data_batch_1", lambda: load("cifar10", root=folder)),
    }
    return readers_of


@pytest.fixture(scope="module")
def good(small, digits, finished):
    """A state, a manifest and an expert that are whole, to stand beside the file in question."""
    config = small.updated(architectures=("convnet-in",))
    (spec,) = session.network_specs(config, digits)
    return RunDirectory(finished), session.expert_store(config, digits, spec).folder


LOADERS = (
    "coreset", "what made a coreset", "checkpoint", "metrics", "configuration", "preset", "result", "experts' recipe",
    "an expert's manifest", "an expert", "rows of a table", "npz", "parquet", "image", "cifar10",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("what", LOADERS)
def test_a_hostile_file_is_refused_in_one_line_and_runs_nothing(loaders, good, sprung, what, kind):
    path, read = loaders[what]
    path.parent.mkdir(parents=True, exist_ok=True)
    stands_beside = {
        "metrics": [(good[0].state_path, loaders["checkpoint"][0])],
        "an expert": [(good[1] / "00000.json", loaders["an expert's manifest"][0])],
        "an expert's manifest": [(good[1] / "00000.arrow", loaders["an expert"][0])],
    }
    beside = stands_beside.get(what, [])
    for source, target in beside:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    data = kind(Trap(sprung))
    path.write_bytes(data)
    if what == "an expert":  # a manifest that vouches for it
        manifest = json.loads(beside[0][1].read_text())
        beside[0][1].write_text(json.dumps(manifest | {"bytes": len(data)}))
    try:
        with pytest.raises(UserError) as caught:
            read()
    finally:
        for left in (path, *(target for _, target in beside)):
            left.unlink()
    assert "\n" not in str(caught.value)
    assert not sprung.exists()


def test_postscript_is_no_image(sprung, tmp_path, monkeypatch):
    """PIL gives what begins like PostScript, whatever its name, to the program `gs`, which runs what is in it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{sprung}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    image = tmp_path / "data" / "train" / "ant" / "0.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="not a readable image"):
        load(f"folder:{tmp_path / 'data'}")
    assert not sprung.exists()
    with pytest.raises(Exception), Image.open(image) as opened:  # noqa: B017  our `gs` makes no picture
        opened.load()
    assert sprung.exists()


UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code", "yaml"}
RUN = {"eval", "exec", "compile", "__import__"}


def test_no_module_can_unpickle_or_evaluate():
    """In the package and the jobs: no import of what unpickles, no eval, no allow_pickle; torch.load in one place, for
    weights alone; imports by name in one place, for networks that are asked for. jobs/peer_bpc.py alone runs a program,
    that of the checkout which --peer names."""
    root = Path(fbpc_ray.__file__).parent
    jobs = root.parent / "jobs"
    for path in {*root.rglob("*.py"), *jobs.glob("*.py")} - {jobs / "peer_bpc.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(root.parent)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {name.split(".")[0] for name in names} & UNPICKLE, where
            elif isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                assert function not in RUN, where
                assert function not in ("pd.read_pickle", "np.fromfile"), where
                if function == "torch.load":
                    assert path.name == "coreset_files.py", where
                    assert "weights_only" in {word.arg for word in node.keywords}, where
                if function.endswith(("import_module", "resolve_name")):
                    assert path.name == "custom.py", where
                for word in node.keywords:
                    assert word.arg != "allow_pickle" or ast.unparse(word.value) == "False", where
                    assert word.arg != "weights_only" or ast.unparse(word.value) == "True", where
