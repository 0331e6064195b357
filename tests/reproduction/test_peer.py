"""`--peer`: the adapter of the official BPC code, on a stand-in that has the same entry points."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ENVIRONMENT

from fbpc_ray.core.errors import UserError

JOBS = Path(__file__).parents[2] / "jobs"

TRAIN = """
import argparse, os, time
import torch
from utils import get_dataset, get_network
from config import setup_hps

def main(args):
    args = setup_hps(args)
    channel, im_size, num_classes, names, mean, std, train, test, loader, by_class, class_map, back = get_dataset(
        args.dataset, args.data_path, args.batch_real, args.subset, args=args
    )
    labels = [class_map[torch.tensor(sample[1]).item()] for sample in train]
    assert all(labels.count(number) >= args.ipc for number in range(num_classes))
    print("a log line of the code's own")
    for it in range(args.num_eval):
        raise AssertionError("it evaluates")
    folder = os.path.join(args.buffer_path, args.dataset, args.model)
    buffer = torch.load(os.path.join(folder, "replay_buffer_0.pt"))
    for it in range(0, args.Iteration + 1):
        net = get_network(args.model, channel, num_classes, im_size, dist=False)
        start, target = buffer[0][args.max_start_epoch - 1], buffer[0][args.max_start_epoch - 1 + args.expert_epochs]
        assert [p.shape for p in start] == [p.shape for p in target] == [p.shape for p in net.parameters()]
        assert (args.divergence, args.lr_img) == ("fkl", 0)
        get_network(args.model, channel, num_classes, im_size)  # one that is no step's
        time.now += SECONDS * args.ipc

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind, default in (
        ("dataset", str, "CIFAR10"), ("subset", str, ""), ("model", str, "ConvNet"), ("ipc", int, 10),
        ("num_eval", int, 10), ("eval_it", int, 100), ("Iteration", int, 5000), ("lr_img", float, 1000),
        ("batch_real", int, 256), ("data_path", str, "data"), ("buffer_path", str, "./buffers"),
        ("divergence", str, "fkl"), ("expert_epochs", int, 1), ("max_start_epoch", int, 20),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--load_all", action="store_true")
    main(parser.parse_args())
"""
UTILS = """
import time
import torch.nn as nn
from scipy.ndimage.interpolation import rotate
from networks import ConvNet

time.now = 0.0
time.perf_counter = lambda: time.now

def get_dataset(*arguments, **named):
    raise AssertionError("it downloads")

def get_network(model, channel, num_classes, im_size=(32, 32), dist=True):
    if not model.startswith("ConvNetW"):
        exit("unknown model")
    return ConvNet(channel, num_classes, int(model.removeprefix("ConvNetW")))
"""
NETWORKS = """
import torch.nn as nn

class ConvNet(nn.Sequential):
    def __init__(self, channel, num_classes, width):
        super().__init__(nn.Conv2d(channel, width, 3), nn.Flatten(), nn.Linear(width * 900, num_classes))
"""
SECONDS = 0.05


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    files = {
        "train.py": TRAIN.replace("SECONDS", str(SECONDS)), "utils.py": UTILS, "networks.py": NETWORKS,
        "reparam_module.py": "", "evaluation.py": "", "log.py": "",
        "config.py": "def setup_hps(args):\n    args.max_start_epoch = 30\n    return args\n",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(JOBS)
    import benchmark_peer

    return benchmark_peer


@pytest.mark.slow
def test_steps_are_those_of_the_checkouts_own_program(checkout, module):
    """As often as it is asked, and its seconds are the code's, here by a clock that only the steps move."""
    means = []
    for ipc in (1, 2):
        with module.Peer(str(checkout), 32, ipc, 1, "cpu") as peer:
            peer.seconds(1)
            means.append(peer.seconds(3))
            assert peer.process.poll() is None
            folder = Path(peer.folder.name)
            assert (folder / "buffers" / "CIFAR10" / "ConvNetW32" / "replay_buffer_0.pt").is_file()
        assert peer.process.poll() == 0
        assert not folder.exists()
    assert means == pytest.approx([SECONDS, 2 * SECONDS])
    assert {path.name for path in checkout.iterdir()} >= {"train.py"}
    assert not (checkout / "buffers").exists(), "nothing is written into the checkout"


@pytest.mark.slow
def test_a_checkout_that_fails_is_one_line(checkout, module):
    (checkout / "evaluation.py").write_text("")
    (checkout / "train.py").write_text("import module_that_is_nowhere\n")
    with (
        module.Peer(str(checkout), 32, 1, 1, "cpu") as peer,
        pytest.raises(
            UserError, match=r"^--peer .*checkout: its train.py does not run here \(ModuleNotFoundError: .*\)"
        ),
    ):
        peer.seconds(1)


@pytest.mark.slow
def test_the_benchmark_has_the_peer_as_a_way(checkout, tmp_path):
    """And the project imports nothing of the checkout."""
    report = tmp_path / "report.json"
    words = [
        "--data", "digits", "--widths", "32", "--ipcs", "1", "--steps", "1", "--repeats", "2", "--no-compiled",
        "--no-training", "--no-memory", "--ways", "bpc-fkl", "--peer", str(checkout), "--json", str(report),
    ]  # fmt: skip
    program = [sys.executable, str(JOBS / "benchmark.py"), *words]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    output = json.loads(report.read_text())
    (case,) = output["cases"]
    assert len(case["seconds"]["official bpc"]["all"]) == 2
    assert case["ratios"]["official bpc / bpc-fkl"]["all"][1] == pytest.approx(
        case["seconds"]["official bpc"]["all"][1] / case["seconds"]["bpc-fkl"]["all"][1]
    )
    assert str(tmp_path) not in report.read_text()


@pytest.mark.parametrize("name", ["train.py", "networks.py"])
def test_what_is_no_checkout_is_one_line(name, checkout, module):
    module.check(str(checkout), (32, 128))
    (checkout / name).unlink()
    with pytest.raises(UserError) as caught:
        module.check(str(checkout), (32,))
    line = f"--peer {checkout}: not a checkout of the official BPC code (no {name}); give its folder"
    assert str(caught.value) == line


def test_a_width_that_it_has_not_is_one_line(checkout, module):
    with pytest.raises(UserError, match=r"^--widths 48: with --peer must be one of 32, 64, 128, 256, 512, 1024$"):
        module.check(str(checkout), (32, 48))
