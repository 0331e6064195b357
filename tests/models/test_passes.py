"""Compiled passes against eager ones, and what is kept on disk: x sides and machine code."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import reference
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fbpc_ray.core import cache
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch
from fbpc_ray.data.datasets import tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.methods.common import GradientContext
from fbpc_ray.distillation.state import GradientTask, initial_state
from fbpc_ray.distillation.worker import METHODS, Worker
from fbpc_ray.execution import session
from fbpc_ray.execution.worker_group import compiles_passes, trajectory_cache_bytes, worker_group
from fbpc_ray.models import compiler as compiling
from fbpc_ray.models.compiler import CompileError, compile_function
from fbpc_ray.models.functional import Network, specify
from fbpc_ray.models.passes import Passes, count_macs
from fbpc_ray.models.registry import ARCHITECTURES

with_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


SIZE = 20
"""Images of a batch: each other number would be compiled for itself."""


def network(name: str) -> Network:
    return Network(specify(name, (1, 8, 8), 10, 8, 0))


def batch(count: int, seed: int = 0) -> Batch:
    source = generator(seed, "batch")
    return Batch(torch.randn(count, 1, 8, 8, generator=source), torch.arange(count) % 10)


@with_compiler
@pytest.mark.slow
def test_a_compiled_gradient_equals_the_plain_reference(folder, small, digits):
    """All of Algorithm 1 for one architecture through machine code: MAP solve, both K steps, Psi. The batches are all
    of one size, so it takes two compiled passes, which the tests below meet again."""
    config = small.updated(gamma=0.5, posterior_steps=6, real_batch_size=SIZE, start_epoch=1)
    state, labels = initial_state(digits, SIZE // 10, 0)
    spec = session.network_specs(config, digits)[1]
    assert spec == network("convnet-bn").spec
    store = session.expert_store(config, digits, spec)
    snapshots = [store.read(0, epoch) for epoch in range(config.experts.expert_epochs + 1)]
    settings = replace(config.distillation, batch_size=SIZE)
    real = DeviceDataset(*tensors(digits.train, "cpu"), digits.mean, digits.std)
    expected = reference.gradient(spec, snapshots, real, state.images, labels, 3, settings)
    problem = GradientContext(Passes(Network(spec), folder), store, real, labels, settings, "dsa", 1)
    result = METHODS["fbpc"](problem, 3, state.images, 0.0)
    torch.testing.assert_close(result.value, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert len(list(folder.glob("*.pt2"))) == 2
    eager = METHODS["fbpc"](problem._replace(passes=Passes(Network(spec))), 3, state.images, 0.0)
    assert result.stats.map_steps == eager.stats.map_steps
    assert not torch.equal(result.value, eager.value)  # machine code did it, in another order of sums


@with_compiler
@pytest.mark.slow
def test_compiled_passes_equal_eager_ones_to_rounding(folder):
    net = network("convnet-bn")
    eager, fast = Passes(net), Passes(net, folder)
    for seed in (0, 1):  # other values than those that were compiled with
        params, some = net.init(generator(seed, "params")), batch(SIZE, seed)
        loss, gradients = fast.loss_and_grad(params, some)
        expected, wanted = eager.loss_and_grad(params, some)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                gradients[name], value, rtol=1e-4, atol=1e-5 * float(wanted["head.weight"].norm())
            )
        torch.testing.assert_close(
            fast.logits(params, some.images), eager.logits(params, some.images), rtol=1e-4, atol=1e-4
        )
    assert not loss.requires_grad
    assert {path.suffix for path in folder.iterdir()} == {".pt2", ".lock"}
    # Asked again, it is the same to the bit; and machine code did it: one file for the gradient, one for the logits.
    assert torch.equal(fast.loss_and_grad(params, some)[0], loss)
    assert not any(torch.equal(gradients[name], value) for name, value in wanted.items() if value.ndim == 4)


@with_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnet-in", "convnet-bn"])
def test_compiled_features_and_squared_loss_equal_eager_ones_to_rounding(folder, name):
    """66 images are two parts of 33, or one with BatchNorm. Gradient flows to the images through machine code."""
    net, some = network(name), batch(66)
    params, targets = net.init(generator(0, "params")), torch.randn(66, 10, generator=generator(0, "targets"))

    def of(passes: Passes):
        images = some.images.clone().requires_grad_()
        features = passes.features(params, images)
        (by_images,) = torch.autograd.grad((features * torch.linspace(-1, 1, features.shape[1])).sum(), images)
        loss, gradients = passes.squared_loss_and_grad(params, Batch(some.images, targets))
        return features.detach(), by_images, loss, *gradients.values()

    eager, compiled = of(Passes(net)), of(Passes(net, folder))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
    assert not torch.equal(compiled[1], eager[1])  # machine code did it, in another order of sums


def test_features_and_squared_loss_in_parts_are_those_of_the_whole():
    """By autograd on one pass of all 66 images, where the passes take two of 33."""
    net, some = network("convnet-gn"), batch(66)
    params, targets = net.init(generator(0, "params")), torch.randn(66, 10, generator=generator(0, "targets"))
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    images = some.images.clone().requires_grad_()
    expected, outputs = net.features(leaves, images)
    wanted = torch.autograd.grad(0.5 * (outputs - targets).square().sum(1).mean(), list(leaves.values()))
    again = some.images.clone().requires_grad_()
    features = Passes(net).features(leaves, again)
    torch.testing.assert_close(features, expected)
    by_images, by_again = (torch.autograd.grad(f.square().sum(), x)[0] for f, x in
                           ((net.features(params, images)[0], images), (features, again)))  # fmt: skip
    torch.testing.assert_close(by_again, by_images)
    loss, gradients = Passes(net).squared_loss_and_grad(leaves, Batch(some.images, targets))
    torch.testing.assert_close(loss, 0.5 * (outputs - targets).square().sum(1).mean().detach())
    torch.testing.assert_close(list(gradients.values()), list(wanted))


def test_parts_are_equal_and_batchnorm_has_one():
    sizes = {count: Passes(network("convnet-in")).part_size(count) for count in (1, 20, 64, 65, 100, 200, 256, 257)}
    assert sizes == {1: 1, 20: 20, 64: 64, 65: 33, 100: 50, 200: 50, 256: 64, 257: 52}
    assert Passes(network("convnet-bn")).part_size(200) == 200


@with_compiler
@pytest.mark.slow
def test_what_is_compiled_serves_other_processes_and_no_other_network(folder):
    """A second Passes loads what is there; another width is another network, and gets machine code of its own."""
    net, some = network("convnet-bn"), batch(SIZE)
    Passes(net, folder).loss_and_grad(net.init(generator(0, "params")), some)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt2")}
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path[:0] = sys.argv[1:3]; from test_passes import *\n"
        "net = network('convnet-bn'); fast = Passes(net, Path(sys.argv[3]))\n"
        "fast.loss_and_grad(net.init(generator(0, 'params')), batch(SIZE)); print('done')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(Path(__file__).parents[1]), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == "done", process.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.pt2")} == files
    wider = Network(specify("convnet-bn", (1, 8, 8), 10, 12, 0))
    Passes(wider, folder).logits(wider.init(generator(0, "params")), some.images)
    assert len(list(folder.glob("*.pt2"))) == len(files) + 1


@with_compiler
def test_where_it_cannot_be_compiled_one_line_says_so(tmp_path, monkeypatch):
    """A worker that went on by itself would change the bits. Nothing half-made is left."""
    net, some = network("convnet-in"), batch(3)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match=r"convnet-in cannot be compiled here \(division by zero\).*--compiled"):
        Passes(net, tmp_path).loss_and_grad(net.init(generator(0, "params")), some)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_network_without_a_last_linear_layer_is_named_before_it_is_compiled(tmp_path, monkeypatch):
    """The compiler is not at fault: `--compiled off` would not help."""
    layers = [nn.Flatten(), nn.Linear(64, 10), nn.Tanh()]
    monkeypatch.setitem(ARCHITECTURES, "headless", lambda spec: nn.Sequential(*layers))
    net = network("headless")
    with pytest.raises(UserError, match=r"^--architectures headless: its logits are not the output"):
        Passes(net, tmp_path).features(net.init(generator(0, "params")), batch(SIZE).images)


@with_compiler
def test_machine_code_in_a_folder_of_others_is_not_loaded(tmp_path, monkeypatch):
    """Neither where others can write to it, nor where they can put another in its place; what is there already too."""
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: 1 / 0)
    monkeypatch.setattr(compiling, "_checksum", lambda graph, arguments: "planted")
    for mode, above in ((0o777, 0o700), (0o700, 0o777)):
        folder = tmp_path / f"{mode}" / "compiled"
        folder.mkdir(parents=True)
        (folder / "planted.pt2").write_bytes(b"machine code")
        folder.chmod(mode)
        folder.parent.chmod(above)
        with pytest.raises(CompileError, match="can be written to by others"):
            compile_function(lambda x: [x + 1], [torch.zeros(2)], folder)
    with pytest.raises(CompileError, match="division by zero"):  # in a folder of one's own it would be loaded
        folder.parent.chmod(0o700)
        compile_function(lambda x: [x + 1], [torch.zeros(2)], folder)


@with_compiler
def test_a_changed_network_or_thread_count_has_another_name(folder):
    def name_of(function):
        return compiling._checksum(make_fx(function)(torch.zeros(3)), [torch.zeros(3)])

    names = {name_of(lambda x: [x + 1]), name_of(lambda x: [x + 2]), name_of(lambda x: [x * torch.ones(3)])}
    torch.set_num_threads(2)
    names.add(name_of(lambda x: [x + 1]))
    torch.set_num_threads(1)
    assert len(names) == 4
    assert name_of(lambda x: [x + 1]) in names


def test_multiplications_by_hand():
    """8x8 digits, width 8, depth 2: 64 x 8 x 9 x 1, 16 x 8 x 9 x 8, and 32 x 10 in the head."""
    assert count_macs(network("convnet-in")) == 64 * 8 * 9 + 16 * 8 * 9 * 8 + 32 * 10


def test_only_long_runs_are_compiled(small, digits, monkeypatch):
    """By what they compute: a hundred thousand steps are, four of them aren't. What can't be compiled is said."""
    lines: list[str] = []
    reason = ""
    monkeypatch.setattr(compiling, "compile_failure", lambda folder: reason)
    small = small.updated(device="cpu")
    specs = session.network_specs(small, digits)
    assert not compiles_passes(small, digits, specs, lines.append)
    assert compiles_passes(small.updated(compiled="on"), digits, specs, lines.append)
    large = small.updated(steps=100_000, posterior_steps=30, real_batch_size=256)
    assert compiles_passes(large, digits, specs, lines.append)
    assert not compiles_passes(large.updated(compiled="off"), digits, specs, lines.append)
    assert not compiles_passes(large.updated(device="cuda"), digits, specs, lines.append)
    assert not compiles_passes(large.updated(method="vbpc"), digits, specs, lines.append)
    assert compiles_passes(large.updated(method="vbpc", steps=2_000_000), digits, specs, lines.append)
    assert not lines
    reason = "no g++"
    assert not compiles_passes(large, digits, specs, lines.append)
    assert lines == ["note: the passes of a step stay eager, which is slower: they cannot be compiled here (no g++)"]


def test_a_cache_that_would_hardly_be_met_is_not_used(small, digits):
    """Each run has 2 experts x 3 epochs of 5 rows: with room for a quarter of that it is used, with less it isn't."""
    specs = session.network_specs(small, digits)
    each = sum(4 * Network(spec).parameter_count * 5 for spec in specs)
    long = small.updated(steps=1000)
    assert trajectory_cache_bytes(long.updated(trajectory_cache_gb=1.6 * each / 1e9), specs) == pytest.approx(
        1.6 * each
    )
    assert trajectory_cache_bytes(long.updated(trajectory_cache_gb=1.4 * each / 1e9), specs) == 0
    assert trajectory_cache_bytes(small.updated(steps=1, trajectory_cache_gb=0.6 * each / 1e9), specs) > 0
    assert trajectory_cache_bytes(small.updated(steps=1, trajectory_cache_gb=0.3 * each / 1e9), specs) == 0
    assert trajectory_cache_bytes(long.updated(trajectory_cache_gb=10.0, method="fbpc-isotropic"), specs) == 0
    assert trajectory_cache_bytes(long.updated(trajectory_cache_gb=0.0), specs) == 0


def test_a_network_too_large_for_the_cache_keeps_no_other_out_of_it():
    """K steps of a ResNet18 take 1.4 GB, which no cache keeps; those of a ConvNet 40 MB."""
    names = "convnet-in", "resnet18-in"
    convnet, resnet = (specify(name, (3, 32, 32), 10, 128, 0) for name in names)
    config = Config().updated(expert_count=5, expert_epochs=6, architectures=names)
    assert trajectory_cache_bytes(config, [convnet, resnet]) == 20e9
    assert trajectory_cache_bytes(config, [resnet]) == 0


def test_without_a_cache_at_its_first_and_at_its_second_use_a_gradient_has_the_same_bits(small, digits):
    specs = session.network_specs(small, digits)
    stores = [session.expert_store(small, digits, spec) for spec in specs]
    state, labels = initial_state(digits, 1, 0)
    items = []
    for gigabytes in (0.0, 1.0, 1.0):
        arguments = worker_group(
            small.updated(trajectory_cache_gb=gigabytes), digits, labels, specs, stores
        ).worker._asdict()
        items.append(Worker(**arguments, device="cpu").gradient(GradientTask(1, 0), 2, state.images.numpy(), 0.0)[0])
    assert list((cache.folder() / "x-sides").glob("*.npy"))
    assert (items[0] == items[1]).all()
    assert (items[0] == items[2]).all()
