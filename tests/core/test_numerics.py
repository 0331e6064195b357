"""torch's CPU threads, denormal numbers and deterministic kernels."""

import os
from typing import Any

import pytest
import torch

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
