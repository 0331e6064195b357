"""A file is data: nothing that is loaded runs code, however it was made. Every trap here goes off when unpickled,
imported or run; `sprung` is the file that it would leave."""

import json
import pickle
import sys
from pathlib import Path

import pytest
from conftest import flags
from test_run import distil, refused

from fbpc_ray import cli
from fbpc_ray.run import Run

NETWORK = """
from pathlib import Path
Path({sprung!r}).touch()
from torch import nn
def build(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""
SERIAL = ("--backend", "serial", "--eval-seeds", "1", "--chain-steps", "10", "--chain-every", "5")


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sprung: Path):
        self.sprung = str(sprung)

    def __reduce__(self):
        return Path.touch, (Path(self.sprung),)


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / "sprung"


def test_the_trap_is_one(sprung):
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()


@pytest.fixture
def run(small, tmp_path):
    """A run that was made elsewhere: nobody here asked for its network."""
    folder = tmp_path / "theirs"
    distil(*flags(small, backend="serial", steps=2, architectures=("convnet-in",), out=str(folder)))
    return folder


@pytest.fixture
def network(sprung, tmp_path, monkeypatch):
    """A module in the current folder whose import is seen."""
    (tmp_path / "theirnets.py").write_text(NETWORK.format(sprung=str(sprung)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "theirnets:build"
    sys.modules.pop("theirnets", None)


def rewrite(folder: Path, **values: object) -> None:
    path = Run(folder).config_path
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "command",
    [("evaluate", "RUN", *SERIAL), ("distill", "--out", "RUN", "--resume"), ("distill", "--out", "RUN", "--again"),
     ("distill", "--out", "RUN", "--again", "--dry-run")],
    ids=lambda words: f"{words[0]} {words[2] if words[0] == 'evaluate' else words[3]}",
)  # fmt: skip
def test_a_configuration_imports_no_network_unasked(run, network, sprung, capsys, command):
    """A config.json that names an own network: one line that repeats the flag, and no import."""
    rewrite(run, architectures=["convnet-in", network], steps=3)
    Run(run).result_path.unlink()
    said = refused(capsys, *(str(run) if word == "RUN" else word for word in command[1:]), command=command[0])
    assert f"--architectures convnet-in {network}" in said
    assert not sprung.exists()
    assert "theirnets" not in sys.modules


def test_a_network_that_is_asked_for_is_imported(run, network, sprung, capsys):
    """The way out that the line names, for evaluate; a name of ours needs none."""
    rewrite(run, architectures=["convnet-in", network])
    cli.main(["evaluate", str(run), *SERIAL, "--architectures", "convnet-in"])
    assert not sprung.exists()
    cli.main(["evaluate", str(run), *SERIAL, "--architectures", "convnet-in", network])
    assert sprung.exists()
    assert network in capsys.readouterr().out


def test_a_run_of_an_own_network_says_how_it_is_resumed(small, network, tmp_path, capsys):
    """The flag repeated goes on with it, the line without it is refused."""
    folder = tmp_path / "own"
    words = flags(small, backend="serial", steps=2, architectures=(network,), out=str(folder))
    distil(*words)
    assert network in refused(capsys, "--out", str(folder), "--resume", "--steps", "3")
    distil("--out", str(folder), "--resume", "--steps", "3", "--architectures", network)
    assert json.loads(Run(folder).result_path.read_text())["steps"] == 3


@pytest.mark.parametrize("address", ["203.0.113.7:6379", "ray://203.0.113.7:10001", "auto"])
def test_a_configuration_connects_to_no_cluster_unasked(run, capsys, address):
    """What a cluster answers is unpickled, so its address is asked for; `evaluate` takes its own."""
    rewrite(run, address=address, backend="ray", steps=3)
    assert f"--address {address}" in refused(capsys, "--out", str(run), "--resume")
    assert f"--address {address}" in refused(capsys, "--out", str(run), "--again")
    cli.main(["evaluate", str(run), *SERIAL])
    distil("--out", str(run), "--resume", "--address", address, "--backend", "serial")
    assert json.loads(Run(run).result_path.read_text())["steps"] == 3
