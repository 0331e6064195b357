"""How torch computes: CPU threads and denormal numbers; on CUDA determinism and no TF32."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fbpc_ray.core.errors import UserError


@contextmanager
def numerics(threads: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Set torch's CPU threads in the block, and flush denormal numbers; on CUDA repeat bits, and use no TF32.

    The number of threads changes the last bits of results. A prior shrinks weights without a gradient until they are
    denormal (below 1.2e-38), where one operation takes the time of many. Raises UserError where a GPU has no memory
    left.
    """
    before, flushed = torch.get_num_threads(), flushes_denormals()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    with ExitStack() as stack:
        stack.callback(torch.set_flush_denormal, flushed)
        stack.callback(torch.set_num_threads, before)
        if torch.device(device).type == "cuda":
            stack.enter_context(_deterministic())
            stack.enter_context(_without_tf32())
            stack.enter_context(gpu_memory())
        yield


@contextmanager
def gpu_memory() -> Iterator[None]:
    """Turn torch's error for a GPU without memory into a UserError of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        what = f" ({asked[1]} more asked for)" if asked else ""
        raise UserError(
            f"the GPU is out of memory{what}: lower --width or the sizes of batches, or have fewer workers share it by "
            "--gpus-per-actor 1 (docs/faq.md names the flags)",
            code=1,
        ) from None


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have torch take deterministic kernels, and warn where an operation has none: some of a network of the user's."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it matrix products differ; read at the first
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # it is for finding mistakes, and takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = fills


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Have torch compute float32 in full: TF32 drops 13 bits of a factor, and Psi is made of small differences."""
    switches: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def flushes_denormals() -> bool:
    """Tell whether this thread flushes denormal numbers; torch sets the mode, but does not report it."""
    return (torch.tensor(1e-20) * 1e-20).item() == 0
