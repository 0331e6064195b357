"""The code of a report that loads a coreset does load it, learned labels too."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.reporting import run_usage
from fbpc_ray.reporting.document import Code


@pytest.mark.parametrize("soft", [None, torch.randn(2, 2)])
def test_the_code_loads_the_coreset(soft, tmp_path):
    path = tmp_path / "it.safetensors"
    soft_coreset = Coreset(torch.randn(2, 1, 3, 3), torch.arange(2), (0.5,), (0.2,), ("a", "b"), soft)
    coreset.save(soft_coreset, path)
    run = SimpleNamespace(
        coreset=soft_coreset, label="", name="vbpc", run=SimpleNamespace(coreset_path=path, folder=tmp_path)
    )
    block = next(block for block in run_usage.how_to_use(cast(Any, [run])) if isinstance(block, Code))
    names: dict[str, Any] = {}
    exec(block.text, names)
    assert torch.equal(names["images"], soft_coreset.images)
    assert names["classes"] == ["a", "b"]
    if soft is None:
        assert "soft" not in block.text
    else:
        assert torch.equal(names["soft_labels"], soft)
        assert "(2, 2) float32 logits" in block.text
    remote = run_usage.REMOTE.format(path=str(path), shape="", count=2)
    exec(remote, names)
    assert torch.equal(names["labels"], soft_coreset.labels)
