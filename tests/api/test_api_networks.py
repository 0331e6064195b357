"""From Python: networks of one's own, which no file alone may import."""

import sys

import pytest
import torch
from support.runs import silent
from torch import nn

from fbpc_ray import api
from fbpc_ray.core.errors import UserError


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    c, h, w = shape
    return nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * h * w, classes))  # fmt: skip


def test_an_own_network_is_a_function_wherever_it_is_defined(pseudocoreset, digits):
    """Of a module by its import path, as --architectures takes it; of a function inside one by this process alone."""

    def inner(shape, classes):
        return build(shape, classes)

    by_name = api.posterior(pseudocoreset, f"{__name__}:build", chain_epochs=4, chain_every=2)
    by_function = api.posterior(pseudocoreset, build, chain_epochs=4, chain_every=2)
    local = api.posterior(pseudocoreset, inner, chain_epochs=4, chain_every=2)
    assert by_function.spec == by_name.spec
    assert local.spec.architecture.endswith("<locals>.inner")
    images = digits.test.images[:20]
    assert torch.equal(by_function.predict(images).probabilities, by_name.predict(images).probabilities)
    with pytest.raises(UserError, match="this process alone"):
        api.distill("digits", inner, backend="ray", log=silent)


def test_a_network_of_ones_own_is_distilled(digits, tmp_path):
    data = api.dataset((digits.train.images[:60], digits.train.labels[:60]), log=silent)
    result = api.distill(
        data, [build, "convnet"], ipc=2, steps=2, width=8, expert_count=1, expert_epochs=2, gamma=1.0,
        posterior_steps=2, real_batch_size=16, mc_samples=3, start_epoch=1, experts=str(tmp_path), log=silent,
    )  # fmt: skip
    assert result.images.shape == (20, 1, 8, 8)
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"test_api_networks-build-w0-d0", "convnet-in-w8-d2"}


def test_a_file_of_samples_alone_imports_no_network(pseudocoreset, tmp_path, monkeypatch):
    path = tmp_path / "samples.safetensors"
    api.save(api.posterior(pseudocoreset, build, chain_epochs=2, chain_every=1), path)
    with pytest.raises(UserError, match="imports no code"):
        api.load_posterior(path)
    assert len(api.load_posterior(path, build).samples) == 2
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(sys.modules[__name__], "build", lambda shape, classes: other)
    with pytest.raises(UserError, match="of another"):
        api.load_posterior(path, f"{__name__}:build")


def test_a_preset_file_imports_no_code(tmp_path):
    (tmp_path / "theirs.json").write_text('{"architectures": ["os:system"]}')
    pseudocoreset = api.Coreset(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), (0.5,), (0.5,), ("ant", "bee"))
    with pytest.raises(UserError, match="a file alone imports no code"):
        api.posterior(pseudocoreset, preset=str(tmp_path / "theirs.json"))
