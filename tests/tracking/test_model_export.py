"""The samples of an evaluation as an MLflow model: loaded, served on loopback, and equal to what was scored."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import free_port, soon
from support.runs import flags

from fbpc_ray import api
from fbpc_ray.commands import main
from fbpc_ray.core.rng import generator
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import ensemble
from fbpc_ray.inference.metrics import predictive_stats, scores
from fbpc_ray.tracking.mlflow_model import default_store

NETWORK = """
from torch import nn

def build(shape, classes):
    c, h, w = shape
    return nn.Sequential(nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))
"""
STORE = os.environ.get("MLFLOW_TRACKING_URI")
CHAIN = ["--backend", "serial", "--num-chains", "2", "--chain-epochs", "20", "--chain-every", "10"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder to work in, with a network of one's own and a tracked run of random images."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "servednets.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBPC_HOME", str(folder))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(home, small) -> RunDirectory[Path]:
    words = flags(small, backend="serial", method="random", architectures=("convnet-bn",), tracking=True, num_chains=1)
    main.main(["distill", *words, "--out", "run"])
    return RunDirectory(home / "run")


def scores_of(run: RunDirectory, *words: str) -> dict:
    main.main(["evaluate", str(run.folder), *CHAIN, "--json", "result.json", *words])
    return json.loads(Path("result.json").read_text())["coresets"]["random"]


def loaded(where: str):
    with warnings.catch_warnings(action="ignore"):  # MLflow's own
        import mlflow

        return mlflow.pyfunc.load_model(where)


def assert_scored(frame, split, expected: dict, at: int = 0) -> None:
    """The numbers of the model are those that the evaluation found for its chain `at`."""
    probabilities = torch.tensor(np.stack(frame["probabilities"].to_list()))
    result = scores(predictive_stats(probabilities.log(), torch.tensor(split.labels)))
    for name, value in result._asdict().items():
        assert value == pytest.approx(expected[name][at], abs=1e-9), name
    entropy = -(probabilities * probabilities.log()).sum(1)
    assert frame["entropy"].to_numpy() == pytest.approx(entropy.numpy(), abs=1e-9)
    assert (frame["mutual_information"] >= 0).all()
    assert (frame["mutual_information"] <= frame["entropy"] + 1e-9).all()


@pytest.mark.slow
def test_the_model_predicts_what_was_scored_and_lies_in_the_run(run, digits, capsys):
    """Of the two chains it is the first; the same model is an output of the MLflow run."""
    expected = scores_of(run, "--save-model", "model")["convnet-bn"]
    message = capsys.readouterr().out
    assert expected["nll"][0] != expected["nll"][1]
    folder = Path("model").absolute()
    assert not list(folder.rglob("*.pkl")) + list(folder.rglob("__pycache__"))  # a model that is loaded may get them
    model = loaded(str(folder))
    frame = model.predict(digits.test.images)
    assert_scored(frame, digits.test, expected)
    assert frame["class"].to_list() == [digits.classes[np.argmax(p)] for p in frame["probabilities"]]
    metadata = model.metadata.metadata
    assert metadata is not None
    assert model.input_example is not None
    assert (metadata["architecture"], metadata["classes"], metadata["seed"]) == ("convnet-bn", list(digits.classes), 0)
    assert metadata["scores"]["nll"] == expected["nll"][0]
    assert np.array_equal(model.input_example, digits.test.images[:2])
    address = message.split("MLflow: ")[-1].strip()
    assert address.startswith("models:/")
    remembered = json.loads((run.folder / "mlflow.json").read_text())
    with warnings.catch_warnings(action="ignore"):
        import mlflow

        assert os.environ.get("MLFLOW_TRACKING_URI") == STORE  # which MLflow changes as it logs a model
        with default_store(remembered["uri"]):
            again = loaded(address).predict(digits.test.images)
            outputs = mlflow.MlflowClient(remembered["uri"]).get_run(remembered["run_id"]).outputs
    assert os.environ.get("MLFLOW_TRACKING_URI") == STORE
    assert again.equals(frame)
    assert outputs is not None
    assert [f"models:/{column.model_id}" for column in outputs.model_outputs] == [address]


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["last-layer", "ensemble"])
def test_trained_networks_predict_what_was_scored(run, digits, capsys, inference):
    """With BatchNorm, whose statistics are of the coreset with its mirror images; the file is read back to the bit."""
    folder = Path(f"model-{inference}").absolute()
    words = ["--inference", inference, "--net-steps", "20", "--ensemble-size", "2", "--save-model", str(folder)]
    expected = scores_of(run, *words)["convnet-bn"]
    model = loaded(str(folder))
    frame = model.predict(digits.test.images)
    assert_scored(frame, digits.test, expected)
    assert model.metadata.metadata is not None
    assert model.metadata.metadata["inference"] == inference
    assert (folder / "code" / "fbpc_ray" / "evaluation" / "ensemble.py").exists()
    samples = ensemble.load(next(folder.rglob("samples.safetensors")))
    assert (samples.last_layer is None) == (inference != "last-layer")
    ensemble.save(samples, folder / "again.safetensors")
    again = ensemble.load(folder / "again.safetensors").predict(digits.test.images)
    assert again.probabilities.tolist() == frame["probabilities"].to_list()


@contextmanager
def serving(command: str, folder: Path) -> Iterator[str]:
    """The printed command on a port of its own, in another folder, without this package on the path."""
    port = free_port()
    words = ["bash", "-c", command.replace("--port 5001", f"--port {port}")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}  # as evaluated
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < end, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{address}/ping", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert soon(lambda: not group_lives(process.pid))


def group_lives(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def ask(address: str, inputs: object) -> dict:
    body = json.dumps({"inputs": inputs}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_a_model_of_ones_own_network_is_served_by_the_printed_command(run, digits, tmp_path, capsys):
    """In a folder where the network's module is not: the model brings it. Bad images are refused with the reason."""
    import pandas as pd

    expected = scores_of(run, "--architectures", "servednets:build", "--save-model", "own model")["servednets:build"]
    command = capsys.readouterr().out.split("which this serves: ")[1].splitlines()[0]
    with serving(command, tmp_path) as address:
        frame = pd.DataFrame(ask(address, digits.test.images.tolist())["predictions"])
        assert_scored(frame, digits.test, expected)
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(address, np.zeros((2, 1, 3, 3), int).tolist())
        assert caught.value.code == 400
        assert "(-1, 1, 8, 8)" in caught.value.read().decode()


def test_what_cannot_be_saved_is_refused_before_anything_runs(run, home, capsys):
    (home / "taken").mkdir(exist_ok=True)
    for words, message in (
        (["--save-model", "taken"], "exists already"),
        (["--save-model", "s3://bucket/it"], "must be a local folder"),
        (["--save-model", "new", "--architectures", "convnet-bn", "convnet-in"], "--architectures"),
    ):
        with pytest.raises(SystemExit) as caught:
            main.main(["evaluate", str(run.folder), *CHAIN, *words])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert not (home / "new").exists()
    with pytest.raises(SystemExit) as caught:
        main.main(["evaluate", str(run.folder), *CHAIN, "--save-model", "new", "--chain-eta", "1e6"])
    assert caught.value.code == 1
    assert "diverged" in capsys.readouterr().err
    assert not (home / "new").exists()


def test_from_python_with_a_network_of_this_process_it_is_refused(tmp_path):
    def inner(shape, classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))

    images = torch.randn(2, 1, 8, 8, generator=generator(0, "images"))
    pseudocoreset = api.Coreset(images, torch.arange(2), (0.0,), (1.0,), ("a", "b"))
    samples = api.posterior(pseudocoreset, inner, chain_epochs=2, chain_every=1)
    with pytest.raises(api.UserError, match="move it to a module"):
        api.save_model(samples, tmp_path / "model", np.zeros((1, 1, 8, 8), np.uint8))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("before", ["", "sqlite:///theirs.db"])
def test_the_default_store_of_mlflow_is_the_callers_again(before, tmp_path, monkeypatch):
    """Also after an error; a notebook may log runs of its own."""
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.set_tracking_uri(before or None)  # pyright: ignore[reportArgumentType]
    try:
        with suppress(KeyError), default_store(f"sqlite:///{tmp_path / 'ours.db'}"):
            assert mlflow.get_tracking_uri().endswith("ours.db")
            raise KeyError
        assert mlflow.is_tracking_uri_set() == bool(before)
        assert os.environ.get("MLFLOW_TRACKING_URI", "") == before
    finally:
        mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]
