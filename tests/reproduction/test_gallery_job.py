"""jobs/gallery.py: every file by every inference, once, and one table."""

import json

import gallery
import numpy as np
import pytest
import torch
from support.data_files import write_npz

from fbpc_ray.commands import main
from fbpc_ray.core.rng import generator
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset

FEW = {"architectures": ["convnet-in"], "width": 8, "image_size": 8, "net_steps": 2, "ensemble_size": 2}


def write(path, seed=0):
    images = torch.randn(2, 3, 8, 8, generator=generator(seed, "coreset"))
    made = Coreset(images, torch.tensor([0, 1]), (0.5,) * 3, (0.25,) * 3, ("ant", "bee"))
    coreset.save(made, path, {"settings": json.dumps(FEW), "method": "vbpc", "step": "7"})
    return str(path)


@pytest.fixture
def pets(tmp_path) -> str:
    return write_npz(tmp_path / "pets.npz", ("ant", "bee"), 8, 8)


def test_each_file_is_evaluated_once_by_each_inference(pets, tmp_path, capsys):
    files = [write(tmp_path / "one.safetensors"), write(tmp_path / "two.safetensors", seed=1)]
    words = ["--data", pets, "--inference", "last-layer:2", "ensemble:1", "--json", str(tmp_path / "all.json")]
    gallery.gallery([*files, *words])
    results = json.loads((tmp_path / "all.json").read_text())
    both = ["last-layer", "ensemble"]
    assert {name: list(result) for name, result in results.items()} == {"one": both, "two": both}
    first = results["one"]["last-layer"]
    assert list(first["coresets"]) == ["given"], "random images are a file of their own"
    assert (first["data"], first["coreset"], first["inference"]) == ("npz:PATH", "one.safetensors", "last-layer")
    assert str(tmp_path) not in json.dumps(results)
    scores = first["coresets"]["given"]["convnet-in"]
    accuracy, nll, ece = (np.mean(scores[name]) for name in ("accuracy", "nll", "ece"))
    printed = capsys.readouterr().out
    assert f"| `one` | `vbpc` | 2 | 7 | {100 * accuracy:.1f}, {nll:.2f}, {ece:.3f} |" in printed

    write(tmp_path / "two.safetensors", seed=2)
    gallery.gallery([*files, *words])
    again = json.loads((tmp_path / "all.json").read_text())
    evaluations = capsys.readouterr().out.count("evaluating on the test split")
    assert evaluations == 2 and again["one"] == results["one"]
    assert again["two"]["ensemble"]["coresets"]["given"] != results["two"]["ensemble"]["coresets"]["given"]


def test_a_row_is_the_mean_over_networks():
    """Of a coreset that was distilled on two: accuracies 10, 20 and 30 % of one, 60 % thrice of the other."""
    ones = {"nll": [1.0, 1.0, 1.0], "ece": [0.5, 0.5, 0.5]}
    by_network = {"convnet-in": {"accuracy": [0.1, 0.2, 0.3], **ones}, "convnet-gn": {"accuracy": [0.6] * 3, **ones}}
    assert gallery.cell({"coresets": {"given": by_network}}) == "40.0, 1.00, 0.500"


@pytest.mark.parametrize("word", ["last-layer", "last-layer:0", "last-layer:many"])
def test_an_inference_without_a_count_is_one_line(pets, tmp_path, capsys, word):
    file = write(tmp_path / "one.safetensors")
    with pytest.raises(SystemExit) as stopped:
        main.run(gallery.gallery, [file, "--data", pets, "--inference", word])
    assert stopped.value.code == 2 and f"--inference {word}: give INFERENCE:COUNT" in capsys.readouterr().err
