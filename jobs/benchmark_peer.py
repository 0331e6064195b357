"""The official BPC code beside ours: starts jobs/peer_bpc.py on a checkout, and asks it for the seconds of steps."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from peer_bpc import MARK

from fbpc_ray.core.errors import UserError

WAY = "official bpc"
"""Name of the peer among the ways of jobs/benchmark.py."""
FILES = ("train.py", "utils.py", "networks.py", "reparam_module.py", "config.py")
WIDTHS = (32, 64, 128, 256, 512, 1024)
"""Of the ConvNets that the code has, ConvNetW32 and so on."""
ADAPTER = Path(__file__).with_name("peer_bpc.py")


def check(path: str, widths: tuple[int, ...]) -> None:
    """Raise UserError if `path` is no checkout of the official BPC code, or it has no network of a width."""
    missing = [name for name in FILES if not (Path(path) / name).is_file()]
    if missing:
        raise UserError(f"--peer {path}: not a checkout of the official BPC code (no {missing[0]}); give its folder")
    if other := set(widths) - set(WIDTHS):
        raise UserError(f"--widths {other.pop()}: with --peer must be one of {', '.join(map(str, WIDTHS))}")


class Peer:
    """A running adapter; a context manager, which ends it."""

    def __init__(self, path: str, width: int, ipc: int, threads: int, device: str):
        self.path, self.folder = path, tempfile.TemporaryDirectory(prefix="fbpc-peer-", ignore_cleanup_errors=True)
        self.log = (Path(self.folder.name) / "stderr.txt").open("w+")
        words = ["--width", str(width), "--ipc", str(ipc), "--threads", str(threads)]
        hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(ADAPTER), str(Path(path).absolute()), *words], cwd=self.folder.name,
            env={**os.environ, **hidden, "OMP_NUM_THREADS": str(threads)}, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()
        self.folder.cleanup()

    def seconds(self, steps: int) -> float:
        """Take `steps` steps; return the mean seconds of one. Raises UserError if the code fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return sum(json.loads(line.removeprefix(MARK))) / steps
        raise self._failure()

    def _failure(self) -> UserError:
        self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()] or [f"exit status {self.process.returncode}"]
        return UserError(f"--peer {self.path}: its train.py does not run here ({lines[-1]}); see jobs/peer_bpc.py", 1)
