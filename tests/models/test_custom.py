"""A user's own network: what holds for it, and how one that cannot be used is refused."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from support.networks import EVERY, images_of, network, random_params, source
from support.runs import SMALL as RUN
from support.runs import flags
from torch.func import functional_call

from fbpc_ray.commands import main
from fbpc_ray.core.config import to_json
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.data import coreset
from fbpc_ray.models import checks
from fbpc_ray.models.functional import Network, specify

NETS = """
    import numpy as np
    import torch
    from torch import nn
    from torch.nn.functional import dropout

    SIZE = 17

    def net(shape, classes, *layers, hidden=SIZE):
        c, h, w = shape
        first = nn.Flatten(), nn.Linear(c * h * w, hidden), nn.ReLU(True)
        return nn.Sequential(*first, *layers, nn.Linear(hidden, classes))

    def maps(shape, classes, *layers):
        last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
        return nn.Sequential(nn.Conv2d(shape[0], 6, 3), *layers, *last)

    class Own(nn.Module):
        def __init__(self, shape, classes):
            super().__init__()
            self.net = net(shape, classes)
        def forward(self, images):
            return self.net(images)

    def plain(shape, classes): return net(shape, classes)
    def linear(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    def batchnorm1d(shape, classes): return net(shape, classes, nn.BatchNorm1d(SIZE))
    def batchnorm2d(shape, classes): return maps(shape, classes, nn.BatchNorm2d(6))
    def syncbatchnorm(shape, classes): return maps(shape, classes, nn.SyncBatchNorm(6))
    def instancenorm(shape, classes): return maps(shape, classes, nn.InstanceNorm2d(6, affine=True))
    def no_dropout(shape, classes): return net(shape, classes, nn.Dropout(0.0))
    def evaluating(shape, classes): return maps(shape, classes, nn.BatchNorm2d(6)).eval()
    def zero_head(shape, classes):
        made = net(shape, classes)
        nn.init.zeros_(made[-1].weight)
        return made
    def tied(shape, classes):
        one = nn.Linear(SIZE, SIZE)
        return net(shape, classes, one, nn.Tanh(), one)
    class Scaled(Own):
        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            self.register_buffer("scale", torch.tensor(2.0))
        def forward(self, images):
            return self.net(images) * self.scale

    CONSTANT = 3
    def returns_list(shape, classes): return [nn.Linear(1, 1)]
    def fails(shape, classes): raise ValueError("one line" + chr(10) + "and another")
    def wrong_shape(shape, classes): return net(shape, 3)
    class WrongInput(Own):
        def forward(self, images): return self.net(images[..., 1:])
    def double(shape, classes): return Casting(shape, classes)
    class Casting(Own):
        def forward(self, images): return self.net(images).double()
    class Two(Own):
        def forward(self, images): return self.net(images), images
    def small_dropout(shape, classes): return net(shape, classes, nn.Dropout(1e-4))
    def dropout2d(shape, classes): return maps(shape, classes, nn.Dropout2d(0.5))
    class Functional(Own):
        def forward(self, images): return self.net(dropout(images, 0.5, self.training))
    class Hidden(Functional):
        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            nn.init.zeros_(self.net[-1].weight)
    class Noisy(Own):
        def forward(self, images): return self.net(images + torch.randn_like(images))
    def tracking(shape, classes): return maps(shape, classes, nn.InstanceNorm2d(6, track_running_stats=True))
    def untracked(shape, classes): return maps(shape, classes, nn.BatchNorm2d(6, track_running_stats=False))
    class Squeezing(Own):
        def forward(self, images): return self.net(images).squeeze()
    def seeded(shape, classes):
        torch.manual_seed(0)
        return net(shape, classes)
    def of_numpy(shape, classes):
        made = net(shape, classes)
        made[1].weight.data = torch.tensor(np.random.default_rng().normal(size=made[1].weight.shape)).float()
        return made
    class RandomBuffer(Own):
        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            self.register_buffer("features", torch.randn(3))
    def frozen(shape, classes):
        made = net(shape, classes)
        made[1].requires_grad_(False)
        return made
    class Unused(Own):
        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            self.spare = nn.Linear(2, 2)
    class Detached(Own):
        def forward(self, images): return self.net(images.detach())
    class Overwrites(Own):
        def forward(self, images): return self.net(images.relu_())
"""
GOOD = (
    "plain", "linear", "batchnorm1d", "batchnorm2d", "syncbatchnorm", "instancenorm", "no_dropout", "evaluating",
    "zero_head", "tied", "Own", "Scaled",
)  # fmt: skip


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The networks above as nets.py in the current folder, which is not on the import path yet."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETS))
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "needs.py").write_text("\nimport a_library_that_is_not_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("nets", "broken", "needs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", GOOD)
def test_a_users_own_network_is_one_like_ours(name, nets):
    """Found in the current folder, checked, and pure functions from there: BatchNorm of any kind, shared weights."""
    spec = specify(f"nets:{name}", (1, 8, 8), 4, 128, 3)
    checks.check(spec)
    net = Network(spec)
    params, images = random_params(net), images_of(6, (1, 8, 8))
    statistics = net.statistics(params, [images_of(7, (1, 8, 8), 5)])
    whole = net.predict(params, statistics, images)
    alone = torch.cat([net.predict(params, statistics, image[None]) for image in images])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)
    module = net.module(source(3))
    assert module.training
    expected = functional_call(module, params, (images,))
    torch.testing.assert_close(net.forward(params, images), expected)
    batch = "batchnorm" in name or name == "evaluating"
    assert batch == bool((net.forward(params, images)[:2] - net.forward(params, images[:2])).abs().max() > 1e-3)
    snapshot = dict(module.state_dict())
    assert net.parameters_of(snapshot).keys() == params.keys()


def test_a_shared_weight_is_one_parameter(nets):
    """A layer used twice: once among the parameters, and its gradient is the sum over its uses."""
    net = contract_checked("tied")
    params, images = random_params(net), images_of(3, (1, 8, 8))
    hidden = (images.flatten(1) @ params["1.weight"].T + params["1.bias"]).clamp(min=0)
    shared = [params["3.weight"].clone().requires_grad_() for _ in range(2)]
    inner = ((hidden @ shared[0].T + params["3.bias"]).tanh() @ shared[1].T) + params["3.bias"]
    logits = inner @ params["6.weight"].T + params["6.bias"]
    weight = params["3.weight"].requires_grad_()
    assert "5.weight" not in params
    result = net.forward(params, images)
    torch.testing.assert_close(result, logits)
    (one,) = torch.autograd.grad(result.square().sum(), weight)
    torch.testing.assert_close(one, sum(torch.autograd.grad(logits.square().sum(), shared)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.predict(params, {}, images), logits)
    torch.testing.assert_close(net.features(params, images)[1], logits)


def contract_checked(name):
    spec = specify(f"nets:{name}", (1, 8, 8), 4, 128, 0)
    checks.check(spec)
    return Network(spec)


@pytest.mark.parametrize("name", EVERY)
def test_our_networks_hold_to_the_contract_too(name):
    assert checks.first_violation(network(name)) == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent:build", ["No module named 'absent'", "from this folder"]),
        ("nets.deeper:build", ["No module named 'nets.deeper'", "from this folder"]),
        ("nets:nothing", ["no attribute 'nothing'", "from this folder"]),
        ("nets.py:build", ["nets.py", "from this folder"]),
        ("a folder/nets.py:build", ["from this folder"]),
        (":build", ["from this folder"]),
        ("nets:", ["not a function"]),
        ("broken:build", ["SyntaxError", "broken.py, line 1"]),
        ("needs:build", ["needs.py:2", "No module named 'a_library_that_is_not_here'"]),
        ("nets:CONSTANT", ["not a function", "(image_shape, classes)"]),
        ("nets:returns_list", ["got list", "torch.nn.Module"]),
        ("nets:fails", ["ValueError: one line)", "nets.py:"]),
        ("nets:wrong_shape", ["returns (2, 3) torch.float32", "logits (2, 4)"]),
        ("nets:WrongInput", ["RuntimeError", "nets.py:"]),
        ("nets:double", ["torch.float64"]),
        ("nets:Two", ["returns tuple"]),
        ("nets:small_dropout", ["Dropout"]),
        ("nets:dropout2d", ["Dropout"]),
        ("nets:Functional", ["Dropout"]),
        ("nets:Hidden", ["Dropout"]),
        ("nets:Noisy", ["between two calls"]),
        ("nets:tracking", ["train() and eval()"]),
        ("nets:untracked", ["other images of the batch", "BatchNorm"]),
        ("nets:Squeezing", ["other images of the batch"]),
        ("nets:seeded", ["same for every seed"]),
        ("nets:of_numpy", ["another generator than torch's global one"]),
        ("nets:RandomBuffer", ["random buffer"]),
        ("nets:frozen", ["1.weight", "frozen"]),
        ("nets:Unused", ["spare.weight"]),
        ("nets:Detached", ["no gradient reaches the images"]),
        ("nets:Overwrites", ["RuntimeError", "nets.py:"]),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_in_one_line(name, words, nets):
    """Before anything long begins, with the cause, and with the place where it is in the user's code."""
    before = torch.random.get_rng_state()
    with pytest.raises(UserError) as caught:
        checks.check(specify(name, (1, 8, 8), 4, 128, 0))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in (name, *words)), str(caught.value)
    assert "UserError" not in str(caught.value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_has_the_one_name_of_its_network_and_goes_on_under_the_other(tmp_path, capsys):
    """Every command's configuration has canonical names, before --resume compares it with the stored one."""
    stored = preset("digits").updated(**RUN).updated(architectures=("vgg11-in",), out=str(tmp_path))
    (tmp_path / "config.json").write_text(to_json(stored))
    resumed = ["distill", "--out", str(tmp_path), "--resume"]
    for command in (resumed, ["distill", "--width", "8"]):
        main.main([*command, "--architectures", "vgg11", "--print-config"])
        assert '"vgg11-in"' in capsys.readouterr().out
    main.main(["experts", "--width", "8", "--architectures", "vgg11", "--dry-run"])
    assert " vgg11-in: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main([*resumed, "--architectures", "vgg11-bn", "--dry-run"])
    assert "now ('vgg11-bn',)" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_users_own_network_runs_on_ray_to_the_bits_of_serial(nets):
    """`python jobs/distill_multi.py` from the folder of nets.py, which Ray's workers import; and without Ray."""
    config = preset("digits").updated(**RUN).updated(
        architectures=("nets:batchnorm2d",), steps=2, expert_count=1, expert_epochs=1, num_chains=1, chain_epochs=4,
        chain_every=4,
    )  # fmt: skip
    job, ray = Path(__file__).parents[2] / "jobs" / "distill_multi.py", tempfile.mkdtemp(prefix="fr", dir="/tmp")
    words = flags(config, backend="ray", address="local", out=str(nets / "ray"), experts=str(nets / "one"))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray}
    try:
        process = subprocess.run(
            [sys.executable, str(job), *words], cwd=nets, env=environment, capture_output=True, text=True, timeout=400
        )
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    assert process.returncode == 0, process.stdout + process.stderr
    main.main(["distill", *flags(config, backend="serial", out=str(nets / "serial"), experts=str(nets / "other"))])
    one, other = (json.loads((nets / name / "result.json").read_text()) for name in ("ray", "serial"))
    assert list(one["coresets"]["fbpc"]) == one["architectures"] == ["nets:batchnorm2d"]
    assert one["coresets"] == other["coresets"]
    images = [coreset.load(nets / name / "coreset" / "coreset.safetensors").images for name in ("ray", "serial")]
    assert torch.equal(*images)
