"""Compile functions of tensors ahead of time with torch's Inductor, each for one set of shapes.

A function is traced to a graph of operations. The compiled graph is a file whose name is a checksum of the operations,
the versions and the processor: processes and runs share the file, and a changed network never loads old code. Loading
takes milliseconds; compiling takes tens of seconds and needs a C++ compiler.

The files are machine code. So only the user may write to their folder; a folder that others can write to is refused.
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
from fbpc_ray.core.errors import UserError

Function = Callable[..., list[Tensor]]


def folder() -> Path:
    """Return the folder of compiled functions: below $FBPC_CACHE, else below the user's cache folder."""
    return cache.folder() / "compiled"


class CompileError(Exception):
    """A function can't be compiled here; the message is one line."""


def compile_function(function: Function, arguments: Sequence[Tensor], folder: Path) -> Function:
    """Compile `function`, tensors -> list of tensors, for the shapes of `arguments`.

    The compiled function uses torch's present number of threads. Its results equal those of `function` but for
    rounding, and carry no gradient.

    Raises:
        CompileError: there is no compiler, or the compiler failed.
        UserError: of `function` itself.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own code
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # silences "no CUDA runtime"
            from torch.fx.experimental.proxy_tensor import make_fx  # takes a second or two

            _claim(folder)
            graph = make_fx(function)(*arguments)
            path = folder / f"{_checksum(graph, arguments)}.pt2"
            if not path.exists():
                _compile(graph, arguments, path)
            return torch._inductor.aoti_load_package(str(path))
    except UserError:  # the network is wrong, not the compiler
        raise
    except Exception as error:
        raise CompileError(str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)) from error


def _compile(graph: torch.fx.GraphModule, arguments: Sequence[Tensor], path: Path) -> None:
    """Compile `graph` to `path`; one of several processes compiles, the others wait."""
    with files.file_lock(path.with_suffix(".lock")):
        if path.exists():
            return
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.pt2")
        try:
            with torch.no_grad():
                program = torch.export.export(graph, tuple(arguments))
            from torch._inductor import config

            # Precompiled headers would lie in a folder of /tmp with a predictable name.
            with _inductor_cache(path.parent), config.patch({"aot_inductor.precompile_headers": False}):
                torch._inductor.aoti_compile_and_package(program, package_path=str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _inductor_cache(folder: Path) -> Iterator[None]:
    """Put Inductor's intermediate files below `folder`, not in /tmp, and delete them after the block."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix=".inductor-", dir=folder, ignore_cleanup_errors=True) as scratch:
        os.environ[name] = scratch
        try:
            yield
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def _claim(folder: Path) -> None:
    """Create the folder for its user alone, and remove files that killed compilations left a day ago.

    Raises:
        CompileError: others can write to the folder, or replace it.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if place := cache.open_to_others(folder):
        raise CompileError(f"{place} can be written to by others: set FBPC_CACHE to a folder of your own")
    for stale in (*folder.glob(".inductor-*"), *folder.glob(".*.pt2")):
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > 86_400:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


@functools.cache
def _machine() -> tuple[str, ...]:
    """Describe the processor and the compiler: machine code runs only on the kind it was compiled for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return (*kind, version.splitlines()[0])


@functools.cache
def compile_failure(folder: Path) -> str:
    """Compile the smallest function; return why that failed, or "" if it worked."""
    try:
        compile_function(lambda x: [x + 1], [torch.zeros(2)], folder)
    except CompileError as error:
        return str(error)
    return ""


def can_compile(subject: str, log: Callable[[str], None]) -> bool:
    """Tell whether the cache and the compiler work; log a note about `subject` if they don't."""
    if reason := compile_failure(folder()):
        log(f"note: {subject} stay eager, which is slower: they cannot be compiled here ({reason})")
    return not reason


def _checksum(graph: torch.fx.GraphModule, arguments: Sequence[Tensor]) -> str:
    """Hash everything that the machine code depends on."""
    digest = hashlib.blake2b(digest_size=20)
    key: list[Any] = [
        torch.__version__, platform.machine(), _machine(), torch.get_num_threads(),
        graph.code, [(tuple(t.shape), str(t.dtype), t.stride(), str(t.device)) for t in arguments],
    ]  # fmt: skip
    digest.update(repr(key).encode())
    for name, value in sorted(graph.state_dict().items()):
        digest.update(repr((name, value.shape, value.dtype)).encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()
