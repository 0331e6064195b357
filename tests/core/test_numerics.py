"""torch's CPU threads, denormal numbers and deterministic kernels."""

import os
from typing import Any

import pytest
import torch

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.numerics import flushes_denormals, numerics


def _smallest_product() -> float:
    return (torch.full((64,), 1e-20) * 1e-20).sum().item()


def test_a_block_has_its_threads_and_flushes_denormal_numbers():
    threads = torch.get_num_threads()
    with numerics(3):
        assert torch.get_num_threads() == 3
        assert _smallest_product() == 0
    assert torch.get_num_threads() == threads
    assert _smallest_product() == pytest.approx(64e-40, rel=1e-3)


def test_a_block_leaves_the_mode_of_the_caller():
    torch.set_flush_denormal(True)
    try:
        with numerics(1):
            pass
        assert flushes_denormals()
    finally:
        torch.set_flush_denormal(False)
    with pytest.raises(ValueError), numerics(1):
        raise ValueError
    assert not flushes_denormals()


memory: Any = torch.utils.deterministic


def test_cuda_gets_deterministic_kernels_within_the_block_alone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with numerics(1, "cpu"):
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(ValueError), numerics(1, "cuda"):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not memory.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise ValueError
    assert not torch.are_deterministic_algorithms_enabled()
    assert memory.fill_uninitialized_memory


def test_a_gpu_without_memory_is_one_line():
    """The message is that of torch 2.14 for CUDA."""
    text = (
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.78 GiB of which 1.02 GiB is "
        "free. Process 7 has 14.00 GiB memory in use.\nIf reserved but unallocated memory is large try setting ..."
    )
    with pytest.raises(UserError) as refused, numerics(1, "cuda"):
        raise torch.OutOfMemoryError(text)
    assert refused.value.code == 1 and "\n" not in str(refused.value)
    assert str(refused.value).startswith("the GPU is out of memory (2.50 GiB more asked for): lower --width ")
    with pytest.raises(UserError, match="the GPU is out of memory: lower"), numerics(1, "cuda"):
        raise torch.OutOfMemoryError("CUDA error: out of memory")
    assert not torch.are_deterministic_algorithms_enabled()


def test_float32_on_cuda_is_no_tf32_within_the_block_alone():
    def precisions() -> list[str]:
        switches: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
        return [switch.fp32_precision for switch in switches]

    before = precisions()
    assert before[0] == "tf32"  # torch's default for convolutions
    with numerics(1, "cpu"):
        assert precisions() == before
    with pytest.raises(ValueError), numerics(1, "cuda"):
        assert precisions() == ["ieee", "ieee"]
        raise ValueError
    assert precisions() == before
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
