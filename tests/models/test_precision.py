"""`--precision bf16`: bfloat16 in the passes that train networks, float32 in all that is kept or compared."""

import os
import pickle
import shutil

import pytest
import torch

from fbpc_ray.core.config import Config, current_names, from_json, original_names
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.types import Batch
from fbpc_ray.data.datasets import tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation import expert_store, expert_training
from fbpc_ray.distillation.expert_training import ExpertTask, compiles_training, run_expert_task, train_expert
from fbpc_ray.distillation.methods import fbpc
from fbpc_ray.distillation.worker import Worker
from fbpc_ray.execution import session, validation
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.session import Session
from fbpc_ray.inference.vectors import flatten
from fbpc_ray.models import precision
from fbpc_ray.models.functional import Network, specify
from fbpc_ray.models.passes import Passes
from fbpc_ray.reproduction.rows import cell_key, coreset_key

with_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
SETTINGS = {"steps": 3, "posterior_steps": 4, "map_max_steps": 20, "compiled": "off", "threads": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def bf16_everywhere(monkeypatch):
    """torch emulates bfloat16 on CPUs without it."""
    monkeypatch.setattr(precision, "supports_bf16", lambda device: True)


def network(name: str = "convnet-in") -> Network:
    return Network(specify(name, (1, 8, 8), 10, 8, 0))


def batch(count: int = 20) -> Batch:
    return Batch(torch.randn(count, 1, 8, 8, generator=generator(0, "batch")), torch.arange(count) % 10)


@pytest.mark.parametrize("name", ["convnet-in", "convnet-bn", "convnet-ln", "vgg11-gn", "lenet"])
def test_the_gradient_points_where_that_of_float32_does(name):
    net = Network(specify(name, (1, 16, 16), 10, 16, 0))
    images = torch.randn(20, 1, 16, 16, generator=generator(0, "batch"))
    params, data = net.init(generator(0, "init")), Batch(images, torch.arange(20) % 10)
    (loss, gradients), (exact_loss, exact) = (
        Passes(net, None, kind).loss_and_grad(params, data) for kind in ("bf16", "fp32")
    )
    assert torch.cosine_similarity(flatten(gradients), flatten(exact), 0) > 0.98
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.01)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in gradients.values())
    assert not torch.equal(flatten(gradients), flatten(exact))


def test_logits_and_predictions_stay_float32():
    net = network("convnet-bn")
    params, (images, _) = net.init(generator(0, "init")), batch()
    passes, exact, statistics = Passes(net, None, "bf16"), Passes(net), net.statistics(params, [images])
    assert torch.equal(passes.logits(params, images), exact.logits(params, images))
    assert torch.equal(passes.predict(params, statistics, images), exact.predict(params, statistics, images))


@with_compiler
@pytest.mark.slow
def test_a_compiled_pass_is_called_again_with_what_it_returned(tmp_path):
    """Its gradients have the strides of the parameters: else the second call would read them in another order."""
    net = network()
    params, data = net.init(generator(0, "init")), batch()
    compiled, eager = Passes(net, tmp_path, "bf16"), Passes(net, None, "bf16")
    other = dict(params)
    for _ in range(3):
        _, gradients = compiled.loss_and_grad(params, data)
        assert all(gradients[name].stride() == value.stride() for name, value in params.items())
        params = {name: value - 0.1 * gradients[name] for name, value in params.items()}
        other = {name: value - 0.1 * eager.loss_and_grad(other, data)[1][name] for name, value in other.items()}
    assert torch.cosine_similarity(flatten(params), flatten(other), 0) > 0.999


@pytest.fixture(scope="module")
def bf16(small, digits) -> Session:
    """A session in bf16, over experts trained in float32, which cost nothing here."""
    config = small.updated(precision="bf16", backend="serial", **SETTINGS)
    return Session(config, digits, session.network_specs(config, digits), exact_stores(small, digits))


def exact_stores(small: Config, digits) -> list:
    return [session.expert_store(small, digits, spec) for spec in session.network_specs(small, digits)]


def test_any_worker_computes_the_bits_of_the_serial_backend(bf16):
    """A worker made elsewhere from what travels there; float32 gives other bits, close by."""
    serial, (state, _) = Serial("cpu", Interruption(())), bf16.initial
    group = bf16.worker_group()
    serial.start_workers(group)
    gradients = serial.gradients(state)
    elsewhere = Worker(**pickle.loads(pickle.dumps(group.worker))._asdict(), device="cpu")
    exact = Worker(**group.worker._replace(precision="fp32")._asdict(), device="cpu")
    for task, gradient in zip(group.tasks, gradients, strict=True):
        assert gradient is not None
        value = torch.from_numpy(elsewhere.gradient(task, 0, state.images.numpy(), 0.0).value)
        other = torch.from_numpy(exact.gradient(task, 0, state.images.numpy(), 0.0).value)
        assert torch.equal(value, gradient.value)
        assert not torch.equal(other, gradient.value)


def test_a_run_that_goes_on_takes_the_steps_of_an_undisturbed_one(bf16):
    undisturbed = [step.state for step in bf16.steps(bf16.initial[0], Serial("cpu", Interruption(())))]
    resumed = [step.state for step in bf16.steps(undisturbed[0], Serial("cpu", Interruption(())))]
    assert len(undisturbed) == 3
    assert [state.step for state in resumed] == [2, 3]
    assert torch.equal(resumed[-1].images, undisturbed[-1].images)


def test_experts_of_bf16_are_others_and_lie_beside(small, digits, tmp_path):
    config = small.updated(experts=str(tmp_path))
    spec = session.network_specs(config, digits)[0]
    exact, store = (session.expert_store(config.updated(precision=kind), digits, spec) for kind in ("fp32", "bf16"))
    assert store.folder.name == f"{exact.folder.name}-bf16"
    assert exact.recipe.to_json() == {k: v for k, v in store.recipe.to_json().items() if k != "precision"}
    assert store.recipe.to_json()["precision"] == "bf16"
    assert "precision" not in repr(exact.recipe)
    store.write(0, train(store.recipe, spec, digits))
    stored, last = store.read(0, store.recipe.epochs), store.recipe.epochs
    expected = [{k: v.clone() for k, v in state.items()} for state in train(store.recipe, spec, digits)][last]
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match="precision"):
        expert_store.ExpertStore(store.folder, exact.recipe)


def train(recipe, spec, digits):
    images, labels = tensors(digits.train, "cpu")
    data = DeviceDataset(images[:150], labels[:150], digits.mean, digits.std)
    return train_expert(
        Network(spec), data, epochs=recipe.epochs, learning_rate=0.05, batch_size=32, augment="dsa", seed=0, index=0,
        precision=recipe.precision,
    )  # fmt: skip


def test_an_expert_in_bf16_learns_what_one_in_float32_does(small, digits):
    store = exact_stores(small, digits)[0]
    spec = session.network_specs(small, digits)[0]
    first, one = ends(train(store.recipe, spec, digits))
    _, other = ends(train(store.recipe._replace(precision="bf16"), spec, digits))
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one - first, other - first, 0) > 0.98


def ends(states) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = [flatten({name: value.clone() for name, value in state.items()}) for state in states]
    return vectors[0], vectors[-1]


def test_training_is_compiled_by_its_recipe_alone(small, digits, monkeypatch):
    recipe = exact_stores(small, digits)[0].recipe
    monkeypatch.setattr(expert_training, "COMPILE_FROM", 6.0 * 14_144 * 1000 * recipe.epochs)
    net = network()
    assert not compiles_training(recipe, net, 10**9), "float32 stays eager"
    assert compiles_training(recipe._replace(precision="bf16"), net, 1000)
    assert not compiles_training(recipe._replace(precision="bf16"), net, 999)
    assert not compiles_training(recipe._replace(precision="bf16"), network("convnet-bn"), 10**9), "it has buffers"


def test_the_k_steps_of_bf16_are_another_trajectory(bf16, small):
    worker = Worker(**bf16.worker_group().worker._asdict(), device="cpu")
    key = fbpc.trajectory_key(worker._context(bf16.worker_group().tasks[0]), 0, 2)
    assert key.precision == "bf16"
    assert key.digest() != key._replace(precision="fp32").digest()


def test_a_device_without_bfloat16_refuses_in_one_line(bf16, monkeypatch):
    monkeypatch.setattr(precision, "supports_bf16", lambda device: False)
    line = r"^--precision bf16: this CPU .* has no bfloat16 instructions; use --precision fp32$"
    serial, (state, _) = Serial("cpu", Interruption(())), bf16.initial
    serial.start_workers(bf16.worker_group())
    with pytest.raises(UserError, match=line):
        serial.gradients(state)
    store = bf16.stores[0]
    task = ExpertTask(bf16.specs[0], expert_store.ExpertStore(store.folder.parent / "new", bf16_recipe(store)), 0)
    with pytest.raises(UserError, match=line):
        run_expert_task(bf16.dataset, task, "cpu")
    precision.require("fp32", "cpu")


def bf16_recipe(store):
    return store.recipe._replace(precision="bf16")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_instructions_decide_not_emulation(capabilities, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.supports_bf16("cpu") == expected


@pytest.mark.parametrize("method", ["vbpc", "frepo"])
def test_methods_without_these_passes_refuse(method):
    with pytest.raises(UserError, match=f"--precision bf16: --method {method} supports fp32 alone"):
        validation.check(Config().updated(method=method, precision="bf16"))


def test_files_of_before_are_read_as_float32():
    """A number by the name `precision` is that of vbpc's prior. Keys of fp32 results are those of before."""
    assert from_json('{"width": 8}', "config.json").networks.precision == "fp32"
    config = from_json('{"precision": 2.5, "method": "vbpc"}', "config.json")
    assert (config.networks.precision, config.distillation.prior_precision) == ("fp32", 2.5)
    assert current_names({"precision": "bf16"}) == {"precision": "bf16"}
    assert original_names({"prior_precision": 2.5}) == {"precision": 2.5}
    with pytest.raises(UserError, match="--precision: got 'bf17'"):
        Config().updated(precision="bf17")


def test_results_of_bf16_have_keys_of_their_own():
    exact, other = Config(), Config().updated(precision="bf16")
    assert coreset_key(exact) != coreset_key(other)
    assert cell_key("table1", "FBPC", "ipc 1", "convnet-in", exact) != cell_key(
        "table1", "FBPC", "ipc 1", "convnet-in", other
    )
    assert coreset_key(exact.updated(method="random")) == coreset_key(other.updated(method="random"))
