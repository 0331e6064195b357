"""Freed memory stays with the process: the pages of a tensor are not faulted in twice."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from fbpc_ray.core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    kept = [torch.ones(35_000_000) for _ in range(3)]  # as a pass keeps activations: 3 x 140 MB, then all freed
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    before = faults()
print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_are_used_again_without_page_faults():
    """420 MB are 102,540 pages of 4 KiB, or 200 of 2 MiB; a block is an activation of 256 images at width 128."""
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    )
    assert 4 * kept < returned  # the kernel's own housekeeping, as between NUMA nodes, costs a few
