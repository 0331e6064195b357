"""`fbpc evaluate --coreset`: networks and image size are those of the coreset's file, and flags win."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.data_files import write_npz
from support.runs import refused

from fbpc_ray.commands import main
from fbpc_ray.commands.evaluate_coreset import stored_settings
from fbpc_ray.core import memory
from fbpc_ray.core.config import Config
from fbpc_ray.core.rng import generator
from fbpc_ray.data import coreset, coreset_reader
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.execution.coreset_settings import coreset_settings

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "coresets").glob("*.safetensors"))
SHORT = ["--inference", "last-layer", "--net-steps", "2", "--num-chains", "1", "--backend", "serial", "--threads", "1"]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> str:
    """Two random images of each class of CIFAR-10 in each split, as --data takes them."""
    classes = coreset.load(COMMITTED[0]).classes
    return write_npz(tmp_path_factory.mktemp("data") / "cifar.npz", classes, 20, 32)


def evaluated(source: Path, data: str, out: Path, *words: str) -> dict:
    main.main(["evaluate", "--coreset", str(source), "--data", data, *SHORT, "--json", str(out), *words])
    return json.loads(out.read_text())


def written(folder: Path, settings: dict, side: int = 8) -> Path:
    """A coreset of two classes whose file has `settings`."""
    images = torch.randn(2, 3, side, side, generator=generator(0, "coreset"))
    made = Coreset(images, torch.tensor([0, 1]), (0.5,) * 3, (0.25,) * 3, ("ant", "bee"))
    coreset.save(made, folder / "own.safetensors", {"settings": json.dumps(settings)})
    return folder / "own.safetensors"


@pytest.fixture
def pets(tmp_path) -> str:
    return write_npz(tmp_path / "pets.npz", ("ant", "bee"), 8, 24)


# ---- what the file says


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_coreset_brings_its_network(path, capsys):
    taken = stored_settings(str(path), set())
    width = 128 if path.stem.endswith("width128") else 32
    networks = ["convnet-in", "convnet-gn", "convnet-ln", "convnet-bn"][: 4 if path.stem.endswith("four") else 1]
    assert (taken["width"], taken["architectures"]) == (width, networks)
    stored = coreset_reader.settings_of(path).get("inference", "sghmc")
    assert stored == ("last-layer" if re.search("vbpc|frepo", path.stem) else "sghmc")
    line = f"as the coreset was distilled: --architectures {' '.join(networks)} --width {width} --depth 0 --augment dsa"
    assert line in capsys.readouterr().out


def test_that_network_is_the_one_that_is_sampled(cifar, tmp_path):
    assert not COMMITTED[0].stem.endswith("width128")
    result = evaluated(COMMITTED[0], cifar, tmp_path / "r.json")
    assert (result["width"], result["architectures"]) == (32, ["convnet-in"])


def test_a_flag_wins(cifar, tmp_path, capsys):
    result = evaluated(COMMITTED[0], cifar, tmp_path / "r.json", "--width", "8", "--architectures=convnet-ln")
    assert (result["width"], result["architectures"]) == (8, ["convnet-ln"])
    assert "as the coreset was distilled: --depth 0 --augment dsa\n" in capsys.readouterr().out


def test_without_random_images_the_scores_are_the_same(cifar, tmp_path, capsys):
    words = ("--width", "8", "--architectures", "convnet-ln")
    both = evaluated(COMMITTED[0], cifar, tmp_path / "r.json", *words)
    alone = evaluated(COMMITTED[0], cifar, tmp_path / "r.json", *words, "--no-random")
    assert (list(both["coresets"]), list(alone["coresets"])) == (["random", "given"], ["given"])
    scores = [result["coresets"]["given"]["convnet-ln"] for result in (both, alone)]
    assert [scores[0][name] for name in ("accuracy", "nll")] == [scores[1][name] for name in ("accuracy", "nll")]


def test_inference_is_that_of_the_distillation(pets, tmp_path, capsys):
    """Its settings too, but for the number of chains; a flag wins."""
    config = Config().updated(width=8, image_size=8, inference="last-layer", net_steps=3, net_target_scale=1.4)
    stored = coreset_settings(config.updated(num_chains=5))
    assert (stored["inference"], stored["net_steps"], stored["net_target_scale"]) == ("last-layer", 3, 1.4)
    assert "num_chains" not in stored
    words = ["evaluate", "--coreset", str(written(tmp_path, stored)), "--data", pets, "--backend", "serial"]
    words += ["--threads", "1", "--chain-epochs", "2", "--chain-every", "1", "--json", str(tmp_path / "r.json")]
    for flags, expected in ((["--num-chains", "2"], "last-layer"), (["--inference", "sghmc"], "sghmc")):
        main.main([*words, *flags])
        assert json.loads((tmp_path / "r.json").read_text())["inference"] == expected
    assert "--inference last-layer --net-steps 3 --net-target-scale 1.4\n" in capsys.readouterr().out


def test_images_are_resized_as_they_were_for_the_coreset(pets, tmp_path, capsys):
    config = Config().updated(width=8, image_size=8, resize="stretch", chain_eta=0.02, chain_augment=False)
    stored = coreset_settings(config)
    assert (stored["image_size"], stored["resize"], stored["chain_eta"]) == (8, "stretch", 0.02)
    result = evaluated(written(tmp_path, stored), pets, tmp_path / "r.json")
    assert result["width"] == 8
    text = capsys.readouterr().out
    assert "--image-size 8 --resize stretch --chain-eta 0.02 --no-chain-augment" in text
    assert re.search(r"^given: \S+ % of 8 test images right; as many random real images: ", text, re.M)


def test_without_settings_nothing_is_taken_and_the_size_is_proposed(pets, tmp_path, capsys):
    source = written(tmp_path, {})
    with pytest.raises(SystemExit):
        evaluated(source, pets, tmp_path / "r.json", "--width", "8")
    outcome = capsys.readouterr()
    assert "as the coreset was distilled" not in outcome.out
    assert "give its data set with --data, or add --image-size 8" in outcome.err
    assert evaluated(source, pets, tmp_path / "r.json", "--width", "8", "--image-size", "8")["images"] == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architectures": ["os:system"]}, "distilled on os:system, but a file alone imports no code: name a network"),
        ({"width": "wide"}, "--width: must be of type int, got 'wide'"),
        ({"width": 10**6}, "--width: must be at most 8,192, got 1000000"),
        ({"architectures": 3}, "--architectures: must be of type tuple, got 3"),
    ],
)
def test_settings_of_a_stranger_are_checked_and_run_no_code(settings, reason, pets, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluated(written(tmp_path, settings), pets, tmp_path / "r.json", "--image-size", "8")
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert reason in line


def test_a_network_of_ones_own_is_named_by_the_user(pets, tmp_path):
    source = written(tmp_path, {"architectures": ["os:system"], "width": 8, "image_size": 8})
    result = evaluated(source, pets, tmp_path / "r.json", "--architectures", "convnet-none")
    assert (result["architectures"], result["width"]) == (["convnet-none"], 8)


@pytest.mark.parametrize("kind", ["hf", "safetensors", "pt", "png", "npz"])
def test_every_export_keeps_the_settings(kind, finished_run, tmp_path, capsys):
    main.main(["export", str(finished_run), "--format", kind, "--out", str(tmp_path / "it")])
    (path,) = tmp_path.iterdir()
    stored = coreset_reader.settings_of(RunDirectory(finished_run).coreset_path)
    assert stored["width"] == 8 and stored == coreset_reader.settings_of(finished_run)
    assert coreset_reader.settings_of(path) == stored
    inside = {"hf": "data/train-00000-of-00001.parquet", "pt": "images_best.pt"}.get(kind)
    assert not inside or coreset_reader.settings_of(path / inside) == stored


def test_a_file_that_cannot_be_read_has_no_settings(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK")
    assert coreset_reader.settings_of(tmp_path / "x.npz") == coreset_reader.settings_of(tmp_path / "none") == {}


# ---- what is missing


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_split_without_images_is_refused_before_the_work(cifar, tmp_path, capsys, dry):
    words = ("--coreset", str(COMMITTED[0]), "--data", cifar, *SHORT, "--split", "validation", *dry)
    assert refused(capsys, *words, command="evaluate") == "error: the validation split is empty: give --validation 0.1"


def test_an_empty_path_is_not_the_current_folder(cifar, capsys):
    message = refused(capsys, "--coreset", "", "--data", cifar, command="evaluate")
    assert message == "error: --coreset: the path is empty; give a file or a folder"


# ---- memory


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--width", "8192"), "--width 8192: copies of a network need about "),
        (("--inference", "sghmc", "--chain-epochs", "1000000000", "--chain-every", "1"), "--chain-epochs 1000000000: "),
    ],
)
def test_chains_that_cannot_fit_are_refused_at_the_start(words, reason, cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda: 1e9)
    with pytest.raises(SystemExit) as caught:
        evaluated(COMMITTED[0], cifar, tmp_path / "r.json", *words)
    assert caught.value.code == 2
    outcome = capsys.readouterr()
    assert [line.startswith(f"error: {reason}") for line in outcome.err.splitlines()].count(True) == 1
    assert "evaluating on" not in outcome.out


def test_a_file_above_the_memory_is_not_read(cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda: 1000.0)
    with pytest.raises(SystemExit):
        evaluated(COMMITTED[0], cifar, tmp_path / "r.json")
    assert f"error: {COMMITTED[0]}: a coreset of 0.1 GB does not fit into memory" in capsys.readouterr().err
