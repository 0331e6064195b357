"""torch's CPU threads and denormal numbers."""

import pytest
import torch

from fbpc_ray.core.threads import flushes_denormals, torch_threads


def _smallest_product() -> float:
    return (torch.full((64,), 1e-20) * 1e-20).sum().item()


def test_a_block_has_its_threads_and_flushes_denormal_numbers():
    threads = torch.get_num_threads()
    with torch_threads(3):
        assert torch.get_num_threads() == 3
        assert _smallest_product() == 0
    assert torch.get_num_threads() == threads
    assert _smallest_product() == pytest.approx(64e-40, rel=1e-3)


def test_a_block_leaves_the_mode_of_the_caller():
    torch.set_flush_denormal(True)
    try:
        with torch_threads(1):
            pass
        assert flushes_denormals()
    finally:
        torch.set_flush_denormal(False)
    with pytest.raises(ValueError), torch_threads(1):
        raise ValueError
    assert not flushes_denormals()
