"""A gradient of a batch of a large coreset travels as the rows of the batch, and is the same gradient."""

import numpy as np
import pytest
import torch

from fbpc_ray.core.signals import Interruption
from fbpc_ray.distillation.methods.common import Gradient, GradientStats
from fbpc_ray.distillation.state import GradientTask
from fbpc_ray.distillation.worker import METHODS, Worker
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial, gradient_of
from fbpc_ray.execution.session import Session

M, TASK = 40, GradientTask(0, 0)


@pytest.fixture(scope="module")
def batched(small, digits) -> Session:
    """40 images, 10 of them in each gradient."""
    config = small.updated(
        ipc=4, batch_size=10, posterior_steps=2, map_max_steps=4, compiled="off", backend="serial", threads=1,
        device="cpu",
    )  # fmt: skip
    specs = session.network_specs(config, digits)
    return Session(config, digits, specs, [session.expert_store(config, digits, spec) for spec in specs])


@pytest.mark.parametrize("method", ["fbpc", "bpc-fkl"])
def test_the_rows_of_the_batch_travel_and_make_the_whole_gradient(batched, method, monkeypatch):
    config = batched.config.updated(method=method)
    run = Session(config, batched.dataset, batched.specs, batched.stores)
    whole: list[torch.Tensor] = []
    exact = METHODS[method]

    def recorded(*arguments, **optional) -> Gradient:
        gradient = exact(*arguments, **optional)
        whole.append(gradient.value)
        return gradient

    monkeypatch.setitem(METHODS, method, recorded)
    (state, _), group = run.initial, run.worker_group()
    answer = Worker(**group.worker._asdict(), device="cpu").gradient(TASK, 0, state.images.numpy(), 0.01)
    assert answer.value.shape[0] == 10
    assert answer.rows is not None
    rebuilt = gradient_of(answer)
    assert torch.equal(rebuilt.value, whole[0])
    assert rebuilt.value.shape == (M, 1, 8, 8)
    assert rebuilt.value.flatten(1).any(1).sum() == 10
    serial = Serial("cpu", Interruption(()))
    serial.start_workers(group)
    first = serial.gradients(state)[0]
    assert first is not None
    assert torch.equal(first.value, whole[0])


def test_a_gradient_of_most_images_travels_whole(batched):
    group = batched.worker_group()
    images = batched.initial[0].images
    settings = group.worker.settings
    for size, rows in ((20, 20), (21, M), (M, M)):
        changed = group.worker._replace(settings=type(settings)(**{**vars(settings), "batch_size": size}))
        answer = Worker(**changed._asdict(), device="cpu").gradient(TASK, 0, images.numpy(), 0.0)
        assert len(answer.value) == rows
        assert (answer.rows is None) == (rows == M)
        assert gradient_of(answer).value.flatten(1).any(1).sum() == size


def test_a_row_that_is_not_finite_travels(batched, monkeypatch):
    """Else the run would not end with the line that names --alpha."""
    value = torch.zeros(M, 1, 8, 8)
    value[3, 0, 0, 0] = float("nan")
    monkeypatch.setitem(METHODS, "fbpc", lambda *_, **__: Gradient(value, GradientStats(loss=0.0)))
    worker = Worker(**batched.worker_group().worker._asdict(), device="cpu")
    answer = worker.gradient(TASK, 0, np.zeros((M, 1, 8, 8), np.float32), 0.0)
    assert answer.rows is not None
    assert answer.rows.tolist() == [3]
    assert gradient_of(answer).value[3, 0, 0, 0].isnan()
