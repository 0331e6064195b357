"""Functions of tensors compiled ahead of time by torch's Inductor, each for one set of shapes.

A function is traced to the operations that it makes of its arguments, and what is compiled of them is kept on disk
under a checksum of these operations, of the versions and of the kind of processor: processes and runs share it, and a
changed network can't meet old code. Loading takes milliseconds; compiling tens of seconds and a C++ compiler.

What is loaded is machine code. So the folder is one that only its user can write to, and a folder of others is refused.
"""

import functools
import hashlib
import logging
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbpc_ray.core import cache, files

Function = Callable[..., list[Tensor]]


def folder() -> Path:
    """Where it is kept: below $FBPC_CACHE, else below the user's cache folder."""
    return cache.folder() / "compiled"


class CannotCompile(Exception):
    """Why, in one line."""


def compiled(function: Function, arguments: Sequence[Tensor], folder: Path) -> Function:
    """`function`, tensors to a list of tensors, compiled for arguments like these and for as many CPU threads as torch
    has now. Its results differ from the function's own by rounding alone, and carry no gradient.

    Raises CannotCompile where there is no compiler, or where it fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
            from torch.fx.experimental.proxy_tensor import make_fx  # a second or two, for those who compile

            _own(folder)
            graph = make_fx(function)(*arguments)
            path = folder / f"{_name(graph, arguments)}.pt2"
            if not path.exists():
                _make(graph, arguments, path)
            return torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise CannotCompile(str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)) from error


def _make(graph: torch.fx.GraphModule, arguments: Sequence[Tensor], path: Path) -> None:
    """Compile `graph` to `path`; of several processes that want the same, one does."""
    with files.file_lock(path.with_suffix(".lock")):
        if path.exists():
            return
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.pt2")
        try:
            with torch.no_grad():
                program = torch.export.export(graph, tuple(arguments))
            from torch._inductor import config

            # Headers that are compiled beforehand lie in a folder of /tmp whose name anybody can guess.
            with _scratch(path.parent), config.patch({"aot_inductor.precompile_headers": False}):
                torch._inductor.aoti_compile_and_package(program, package_path=str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Inductor's intermediate files lie below `folder` and go after the block, instead of gathering in /tmp."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix=".inductor-", dir=folder, ignore_cleanup_errors=True) as scratch:
        os.environ[name] = scratch
        try:
            yield
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def _own(folder: Path) -> None:
    """Make the folder, for its user alone, and clear what killed compilations left a day ago. Raises CannotCompile
    where others can write to it, or put another in its place."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if place := cache.open_to_others(folder):
        raise CannotCompile(f"{place} can be written to by others: set FBPC_CACHE to a folder of your own")
    for left in (*folder.glob(".inductor-*"), *folder.glob(".*.pt2")):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@functools.cache
def _machine() -> tuple[str, ...]:
    """The processor and the compiler: machine code is for the very kind that it was compiled on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return (*kind, version.splitlines()[0])


@functools.cache
def complaint(folder: Path) -> str:
    """Why nothing can be compiled here, found out on the smallest function; empty where it can."""
    try:
        compiled(lambda x: [x + 1], [torch.zeros(2)], folder)
    except CannotCompile as error:
        return str(error)
    return ""


def possible(what: str, log: Callable[[str], None]) -> bool:
    """Whether `what` can be compiled here, as far as the cache and the compiler go. It is said where it can't."""
    if why := complaint(folder()):
        log(f"note: {what} stay eager, which is slower: they cannot be compiled here ({why})")
    return not why


def _name(graph: torch.fx.GraphModule, arguments: Sequence[Tensor]) -> str:
    """The checksum of all that the machine code depends on."""
    digest = hashlib.blake2b(digest_size=20)
    about: list[Any] = [
        torch.__version__, platform.machine(), _machine(), torch.get_num_threads(),
        graph.code, [(tuple(each.shape), str(each.dtype), each.stride(), str(each.device)) for each in arguments],
    ]  # fmt: skip
    digest.update(repr(about).encode())
    for name, value in sorted(graph.state_dict().items()):
        digest.update(repr((name, value.shape, value.dtype)).encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()
