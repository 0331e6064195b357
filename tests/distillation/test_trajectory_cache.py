"""The cache of theta_x and its K steps: what names a file, what is kept, and what a broken disk costs."""

import os
import threading
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch

from fbpc_ray.core.rng import generator
from fbpc_ray.data.datasets import tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation import trajectory_cache
from fbpc_ray.distillation.expert_format import Recipe
from fbpc_ray.distillation.methods import fbpc
from fbpc_ray.distillation.methods.common import GradientContext
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.distillation.trajectory_cache import TrajectoryCache, TrajectoryKey
from fbpc_ray.execution import session
from fbpc_ray.inference.posterior import sgd_trajectory
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes

RECIPE = Recipe("digits", "f00d", (1, 8, 8), 10, "convnet-in", 8, 2, 3, 0.01, 64, "dsa", "float32", 0)
KEY = TrajectoryKey(1, RECIPE, 2, "c0ffee", 3, 0.01, 256, 30, "dsa", "2.11.0", 1, False, "AVX2", "cpu")
OTHER = {
    "format": 2, "recipe": RECIPE._replace(lr=0.02), "expert": 1, "checksum": "decaf", "epoch": 4, "lambda_x": 0.02,
    "real_batch_size": 128, "posterior_steps": 29, "augment": "none", "torch_version": "2.12.0", "threads": 2,
    "compiled": True, "cpu_capability": "AVX512", "device": "NVIDIA H200", "precision": "bf16",
    "chunk_images": 64,
}  # fmt: skip


def test_a_key_names_the_file_that_it_named_before_it_was_a_named_tuple():
    """Computed by commit 09479ec: trajectories on disk stay valid."""
    assert KEY.digest() == "134ba70eabad3b42180614ab2cd3190c8a4e90d2"
    assert KEY._replace(recipe=Recipe(*RECIPE)).digest() == KEY.digest()


@pytest.mark.parametrize("field", TrajectoryKey._fields)
def test_every_field_of_the_key_names_another_file(field):
    assert OTHER.keys() == set(TrajectoryKey._fields)
    assert KEY._replace(**{field: OTHER[field]}).digest() != KEY.digest()


@pytest.mark.parametrize("field", Recipe._fields)
def test_every_field_of_the_recipe_names_another_file(field):
    value = getattr(RECIPE, field)
    other = (3, 8, 8) if field == "image_shape" else f"{value}x" if isinstance(value, str) else value + 1
    assert KEY._replace(recipe=RECIPE._replace(**{field: other})).digest() != KEY.digest()


@pytest.fixture(scope="module")
def context(small, digits) -> GradientContext:
    spec = session.network_specs(small, digits)[0]
    _, labels = initial_state(digits, 1, 0)
    real = DeviceDataset(*tensors(digits.train, "cpu"), digits.mean, digits.std)
    store = session.expert_store(small, digits, spec)
    return GradientContext(Passes(Network(spec)), store, real, labels, small.distillation, "dsa", 1)


def test_the_key_of_a_gradient_says_what_its_k_steps_depend_on(context, tmp_path, monkeypatch):
    """Each field in turn, by name: the settings, the expert's file, this process and its device."""
    key = fbpc.trajectory_key(context, 0, 2)
    settings = context.settings
    assert key == fbpc.trajectory_key(context, 0, 2)
    assert key._asdict() == {
        "format": fbpc.EXPERT_SIDE_FORMAT, "recipe": context.store.recipe, "expert": 0,
        "checksum": context.store.checksum(0), "epoch": 2, "lambda_x": settings.lambda_x,
        "real_batch_size": settings.real_batch_size, "posterior_steps": settings.posterior_steps, "augment": "dsa",
        "torch_version": torch.__version__, "threads": torch.get_num_threads(), "compiled": False,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "device": "cpu", "precision": "fp32",
        "chunk_images": 0,
    }  # fmt: skip
    changes = {"lambda_x": 0.123, "real_batch_size": 17, "posterior_steps": 5}
    for name, value in changes.items():
        changed = context._replace(settings=replace(settings, **{name: value}))
        assert fbpc.trajectory_key(changed, 0, 2) == key._replace(**{name: value})
    assert fbpc.trajectory_key(context._replace(augment="none"), 0, 2) == key._replace(augment="none")
    assert fbpc.trajectory_key(context, 0, 3) == key._replace(epoch=3)
    for name, target, attribute in (
        ("threads", torch, "get_num_threads"),
        ("cpu_capability", torch.backends.cpu, "get_cpu_capability"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, lambda name=name: OTHER[name])
            assert fbpc.trajectory_key(context, 0, 2) == key._replace(**{name: OTHER[name]})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        assert fbpc.trajectory_key(context, 0, 2) == key._replace(torch_version="0.0")
    compiled = context._replace(passes=Passes(context.network, tmp_path))
    assert fbpc.trajectory_key(compiled, 0, 2) == key._replace(compiled=True)
    for size, divides in ((settings.real_batch_size - 1, True), (settings.real_batch_size, False)):
        chunked = context._replace(passes=Passes(context.network, chunk_images=size))
        assert fbpc.trajectory_key(chunked, 0, 2) == key._replace(chunk_images=size if divides else 0)


def test_only_what_the_k_steps_depend_on_makes_another_file(context, tmp_path):
    """One file for every step, seed, gamma and lambda_u; a second one for another lambda_x, with other values."""
    cached = context._replace(trajectory_cache=TrajectoryCache(tmp_path, 1e8))
    shared = {"seed": 5, "gamma": 0.9, "lambda_u": 0.7, "map_lr": 0.3, "start_epoch": 3, "start_rule": "from"}
    base = replace(cached.settings, **(shared | {"seed": 0, "gamma": 0.5}))
    first = fbpc.expert_side(cached._replace(settings=base), 0)
    again = fbpc.expert_side(cached._replace(settings=replace(base, **shared)), 1)
    assert len(list(tmp_path.iterdir())) == 1
    assert (first == again).all()
    other = fbpc.expert_side(cached._replace(settings=replace(base, lambda_x=2 * base.lambda_x)), 0)
    assert len(list(tmp_path.iterdir())) == 2
    assert (other[0] == first[0]).all(), "theta_x itself"
    assert (other[1:] != first[1:]).any()


class OneSnapshot(NamedTuple):
    """A store in which every epoch of every expert is the same snapshot."""

    recipe: Recipe
    snapshot: dict[str, torch.Tensor]

    def read(self, expert, epoch):
        return self.snapshot


def test_the_real_images_of_the_k_steps_are_drawn_by_the_snapshots_name(context):
    """Alike for every step and seed of a run, so that runs can share them; by hand for expert, epoch and recipe's seed.

    The snapshots of both experts are one and the same, so only the draw can differ.
    """
    recipe = context.store.recipe
    last, snapshot = recipe.epochs, context.store.read(0, 1)

    def expert_side(seed, step, recipe=recipe):
        settings = replace(context.settings, seed=seed, start_epoch=last, start_rule="from")
        store = cast(Any, OneSnapshot(recipe, snapshot))
        changed = context._replace(settings=settings, experts=store, expert_count=2)
        drawn = generator(seed, "step", step, context.network.spec.architecture, "expert")
        return int(torch.randint(2, (), generator=drawn)), fbpc.expert_side(changed, step)

    by_expert = {}
    for seed, step in product((0, 5), range(4)):
        expert, rows = expert_side(seed, step)
        assert (by_expert.setdefault(expert, rows) == rows).all()
    assert by_expert.keys() == {0, 1}
    assert (by_expert[0][0] == by_expert[1][0]).all()
    theta_x = context.network.parameters_of(snapshot)
    for expert, rows in by_expert.items():
        source = generator(recipe.seed, "x-side", context.network.spec.architecture, expert, last)
        batches = context.real.stream(context.settings.real_batch_size, "dsa", source)
        steps = sgd_trajectory(context.passes.loss_and_grad, theta_x, batches, context.settings.lambda_x)
        for row, params in zip(rows[1:], steps, strict=False):
            assert (row == torch.cat([value.flatten() for value in params.values()]).numpy()).all()
    other = expert_side(0, 0, recipe._replace(seed=recipe.seed + 1))[1]
    assert (other[1] != by_expert[expert_side(0, 0)[0]][1]).any()


def rows(values):
    """The block's rows, and how often they were asked for."""
    calls = []

    def make():
        calls.append(1)
        return (torch.full((3,), float(value)) for value in values)

    return make, calls


def test_x_sides_are_made_once_and_read_back_to_the_bit(tmp_path):
    make, calls = rows([0.1, 1 / 3])
    store = TrajectoryCache(tmp_path, 1e6)
    first, again = store.block("a", (2, 3), make), TrajectoryCache(tmp_path, 1e6).block("a", (2, 3), make)
    assert first is not None
    assert (first == np.array([[0.1] * 3, [1 / 3] * 3], np.float32)).all()
    assert again is not None
    assert (again == first).all()
    assert len(calls) == 1
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1


def test_the_cache_is_bounded_and_drops_what_was_used_longest_ago(tmp_path):
    store, (make, _) = TrajectoryCache(tmp_path, 500), rows([1, 2])
    for name, age in (("a", 10), ("b", 20), ("c", 30)):
        store.block(name, (2, 3), make)
        os.utime(tmp_path / f"{name}.npy", (age, age))
    store.block("a", (2, 3), make)  # used now
    store.block("d", (2, 3), make)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"a", "c", "d"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 500
    assert TrajectoryCache(tmp_path, 20).block("e", (2, 3), make) is None  # larger than all it may hold


def test_the_bytes_of_a_snapshot_are_those_of_its_files(tmp_path):
    """Of two networks, and of the smaller one alone where a file of the larger is above the limit by a byte."""
    small, large = (2, 3), (2, 50)
    for shape in (small, large):
        made = [torch.zeros(shape[1])] * 2
        TrajectoryCache(tmp_path, 1e6).block(str(shape[1]), shape, lambda made=made: made)
    sizes = [(tmp_path / f"{shape[1]}.npy").stat().st_size for shape in (small, large)]
    assert trajectory_cache.bytes_of_a_snapshot([small, large], sizes[1]) == sum(sizes)
    assert trajectory_cache.bytes_of_a_snapshot([small, large], sizes[1] - 1) == sizes[0]


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_block_is_made_again(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    make, calls = rows([5, 6])
    result = TrajectoryCache(tmp_path, 1e6).block("a", (2, 3), make)
    assert result is not None
    assert result[1, 0] == 6
    assert calls


def test_each_flipped_byte_and_a_file_without_a_checksum_are_made_again(tmp_path, monkeypatch):
    """Header, values and checksum: what another process finds is the right value, never a damaged one."""
    TrajectoryCache(tmp_path, 1e6).block("a", (2, 3), rows([5, 6])[0])
    data = (tmp_path / "a.npy").read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npy"), [[5] * 3, [6] * 3])  # others read it too
    flipped = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    for damaged in (*flipped, data[:-1], data[: trajectory_cache.HEADER + 24], data + b"x"):
        monkeypatch.setattr(trajectory_cache, "_checked", set())
        (tmp_path / "a.npy").write_bytes(damaged)
        block = TrajectoryCache(tmp_path, 1e6).block("a", (2, 3), rows([5, 6])[0])
        assert block is not None
        assert np.array_equal(block, [[5] * 3, [6] * 3])
        assert (tmp_path / "a.npy").read_bytes()[trajectory_cache.HEADER :] == data[trajectory_cache.HEADER :]


def test_a_block_of_another_shape_is_made_again(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 4), np.float32))
    result = TrajectoryCache(tmp_path, 1e6).block("a", (2, 3), rows([5, 6])[0])
    assert result is not None
    assert result.shape == (2, 3)


def test_a_cache_that_cannot_be_written_is_one_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    assert TrajectoryCache(tmp_path / "file" / "below", 1e6).block("a", (2, 3), rows([1, 2])[0]) is None


def test_an_error_while_a_block_is_made_leaves_nothing(tmp_path):
    def broken():
        yield torch.zeros(3)
        raise RuntimeError("amid")

    with pytest.raises(RuntimeError, match="amid"):
        TrajectoryCache(tmp_path, 1e6).block("a", (2, 3), broken)
    assert not list(tmp_path.iterdir())


def test_several_workers_that_want_the_same_block_all_get_it(tmp_path):
    items: list[np.ndarray | None] = [None] * 8

    def want(place):
        items[place] = TrajectoryCache(tmp_path, 1e6).block("a", (2, 3), rows([7, 8])[0])

    threads = [threading.Thread(target=want, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(block is not None and (block[:, 0] == [7, 8]).all() for block in items)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
