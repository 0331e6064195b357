"""Run the training loop of a checkout of the official BPC code, and print the seconds of its steps.

    python jobs/peer_bpc.py CHECKOUT --width 32 --ipc 1 --threads 1

jobs/benchmark.py --peer starts it in an empty folder. It runs the checkout's own train.py as a program, with that
program's own settings, on noise instead of CIFAR-10 and on an untrained expert, neither of which changes a step's time.
The images stay as they are (--lr_img 0), so that no step makes them infinite. The checkout must have:

    train.py         a program with --dataset --model --ipc --divergence --lr_img --num_eval --eval_it --Iteration
                     --buffer_path --load_all, which calls get_network(..., dist=False) once at the start of each step
    utils.py         get_dataset and get_network, which train.py imports by name; models ConvNetW32, ConvNetW64, ...

For each line N on standard input, it takes N steps and writes one line, MARK and a JSON list of N seconds. It imports
nothing of fbpc_ray, and fbpc_ray nothing of the checkout.
"""

import argparse
import importlib
import json
import runpy
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = "seconds of steps: "
CLASSES, PER_CLASS = 10, 60
SNAPSHOTS = 64
"""Of the expert: more than any start epoch of the code's settings for CIFAR-10, and the epoch that follows it."""
STEPS = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(args.checkout))
    stand_in_for_removed_modules()
    utils = importlib.import_module("utils")
    model, clock = f"ConvNetW{args.width}", Clock(utils.get_network)
    write_expert(utils.get_network(model, 3, CLASSES, (32, 32), dist=False), Path("buffers") / "CIFAR10" / model)
    setattr(utils, "get_dataset", noise)  # noqa: B010  for train.py, which imports it from there
    setattr(utils, "get_network", clock)  # noqa: B010
    sys.argv = [
        "train.py", "--dataset", "CIFAR10", "--model", model, "--divergence", "fkl", "--ipc", str(args.ipc),
        "--lr_img", "0", "--num_eval", "0", "--eval_it", str(STEPS + 1), "--Iteration", str(STEPS),
        "--buffer_path", "buffers", "--load_all",
    ]  # fmt: skip
    runpy.run_path(str(args.checkout / "train.py"), run_name="__main__")


class Clock:
    """Stands in for get_network, with which each step begins: times the steps, and waits for the next order."""

    def __init__(self, get_network: Callable[..., Any]):
        self.get_network, self.seconds, self.left, self.began = get_network, list[float](), 0, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if named.get("dist") is False:
            self.lap()
        return self.get_network(*arguments, **named)

    def lap(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.left:
            self.seconds.append(now - self.began)
            self.left -= 1
        if not self.left:
            if self.seconds:
                print(f"\n{MARK}{json.dumps(self.seconds)}", flush=True)
            self.seconds, line = [], sys.stdin.readline()
            if not line.strip():
                sys.exit(0)
            self.left = int(line)
        self.began = time.perf_counter()


def noise(*arguments: Any, **named: Any) -> tuple[Any, ...]:
    """Stand in for get_dataset: its twelve results for CIFAR-10, with noise for images."""
    source = torch.Generator().manual_seed(0)
    numbers = [number for number in range(CLASSES) for _ in range(PER_CLASS)]
    train = [(torch.randn(3, 32, 32, generator=source), number) for number in numbers]
    same = {number: number for number in range(CLASSES)}
    names = [str(number) for number in range(CLASSES)]
    return 3, (32, 32), CLASSES, names, [0.5] * 3, [0.25] * 3, train, train[:1], None, None, same, same


def write_expert(network: torch.nn.Module, folder: Path) -> None:
    """Write a buffer of one untrained trajectory, as buffer.py writes those that it trained."""
    folder.mkdir(parents=True)
    snapshot = [value.detach().clone() for value in network.parameters()]
    torch.save([[snapshot] * SNAPSHOTS], folder / "replay_buffer_0.pt")


def stand_in_for_removed_modules() -> None:
    """Give `scipy.ndimage.interpolation`, which SciPy removed, its function that utils.py imports."""
    try:
        importlib.import_module("scipy.ndimage.interpolation")
    except ImportError:
        module = types.ModuleType("scipy.ndimage.interpolation")
        setattr(module, "rotate", None)  # noqa: B010  training without DC's augmentation never calls it
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    main()
