"""The driver's state between steps, and Algorithm 1's update of the images by the summed gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fbpc_ray.core.config import Distillation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, standardise, tensors, to_unit
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation import network_pool, warm_start
from fbpc_ray.distillation.methods.common import Gradient
from fbpc_ray.distillation.warm_start import Solutions
from fbpc_ray.inference.adam import AdamState, adam_step
from fbpc_ray.inference.last_layer import one_hot_targets
from fbpc_ray.inference.solution import SolverStatus


class GradientTask(NamedTuple):
    """One gradient of a step."""

    architecture: int
    """Index among the run's architectures."""
    draw: int
    """Index among the M independent draws of the architecture."""


def gradient_tasks(architectures: int, draws: int) -> list[GradientTask]:
    """Return the gradients of a step, in the order in which the driver sums them."""
    return [GradientTask(architecture, draw) for architecture in range(architectures) for draw in range(draws)]


class State(NamedTuple):
    """All that the driver holds between two steps."""

    step: int
    """Updates so far."""
    images: Tensor
    """u: (m, c, h, w) float32, normalised, on the CPU."""
    velocity: Tensor
    """Momentum of the pixels' SGD, or the first moment of their Adam, of the shape of `images`."""
    inner_lr: float
    """Learning rate of the SGD steps on u in weight-space methods; bpc-w learns it."""
    inner_velocity: float = 0.0
    """Momentum of `inner_lr`."""
    solutions: Solutions = {}  # noqa: RUF012  a Mapping: nobody changes it
    """MAP solutions at which later solves start (warm starts), or the networks of the pool (vbpc, frepo)."""
    soft_labels: Tensor | None = None
    """(m, d) float32 logits, centred, for methods that learn them, on the CPU."""
    moments: Mapping[str, Tensor] = {}
    """Other moments of Adam, images/second, labels/first and labels/second; and images/average (--image-average)."""


SECOND = "images/second"
"""Name of the second moment of the images' Adam in `State.moments`."""
AVERAGE = "images/average"
"""Name of the average of the images in `State.moments`."""


def coreset_images(state: State) -> Tensor:
    """Return the images of the run's coreset: their average over steps where it is kept, else those of the step."""
    return state.moments.get(AVERAGE, state.images)


def average_images(state: State, before: State, decay: float) -> State:
    """Add the images of `state` to the average that `before` holds, if `decay` is not 0.

    An exponential moving average; of the first 1 / (1 - decay) steps, and with decay 1 of all, the plain mean.
    """
    if not decay:
        return state
    weight = max(1 - decay, 1 / state.step)
    average = before.moments.get(AVERAGE, torch.zeros_like(state.images))
    return state._replace(moments={**state.moments, AVERAGE: average + weight * (state.images - average)})


def initial_state(dataset: Dataset, ipc: int, seed: int, inner_lr: float = 0.0) -> tuple[State, Tensor]:
    """Draw Algorithm 1's first u, real images balanced over classes; return it with (m,) labels."""
    real = DeviceDataset(*tensors(dataset.train, "cpu"), dataset.mean, dataset.std)
    images, labels = real.batch(coreset.balanced(real.labels, ipc, dataset.classes, generator(seed, "coreset")))
    return State(0, images, torch.zeros_like(images), inner_lr), labels


def begin_as(state: State, labels: Tensor, given: Coreset, dataset: Dataset) -> State:
    """Replace the images of a state before step 1 by those of a coreset, and its soft labels where both have some.

    Args:
        labels: (m,), those of `state`, class by class.
        given: a coreset of the classes and the image size of `dataset`, in any order.

    Raises UserError for a coreset of another number of images per class.
    """
    order = given.labels.argsort(stable=True)
    if not torch.equal(given.labels[order], labels):
        ipc = len(labels) // len(dataset.classes)
        counts = given.labels.bincount(minlength=len(dataset.classes))
        least, most = int(counts.min()), int(counts.max())
        has, fix = (
            (f"{least}", f"give --ipc {least}") if least == most else (f"{least} to {most}", "choose another one")
        )
        raise UserError(f"--initial-coreset: it has {has} images per class, --ipc is {ipc}: {fix}")
    images = given.images
    if (given.mean, given.std) != (dataset.mean, dataset.std):
        images = standardise(to_unit(images, given.mean, given.std), dataset.mean, dataset.std)
    state = state._replace(images=images[order])
    if state.soft_labels is None or given.soft_labels is None:
        return state
    logits = given.soft_labels[order]
    return state._replace(soft_labels=logits - logits.mean(1, keepdim=True))


def with_soft_labels(state: State, labels: Tensor, classes: int, scale: float) -> State:
    """Add the soft labels with which a method begins: `scale` times (one-hot - 1/classes)."""
    return state._replace(soft_labels=one_hot_targets(labels, classes, scale))


def scale_of_confidence(confidence: float, classes: int) -> float:
    """Return the scale at which the softmax of the soft labels gives `confidence` to their class. Raises UserError."""
    if not 1 / classes < confidence < 1:
        raise UserError(
            f"--label-confidence: must be above 1/{classes} = {1 / classes:g} and below 1 for {classes} classes, got "
            f"{confidence:g}"
        )
    return math.log(confidence * (classes - 1) / (1 - confidence))


class SummedGradient(NamedTuple):
    """The gradient of one architecture, averaged over its draws."""

    value: Tensor
    """(m, c, h, w) float32."""
    inner_lr: float = 0.0
    """With respect to the inner learning rate."""
    soft_labels: Tensor | None = None
    """(m, d) float32, where the method learns them."""


def combine(tasks: Sequence[GradientTask], gradients: Sequence[Gradient | None]) -> list[SummedGradient]:
    """Average each architecture's gradients over its draws; architectures without one are left out.

    The others are scaled such that their sum still estimates the sum over all architectures.
    """
    by_architecture: dict[int, list[Gradient]] = {task.architecture: [] for task in tasks}
    for task, gradient in zip(tasks, gradients, strict=True):
        if gradient is not None:
            by_architecture[task.architecture].append(gradient)
    present = [draws for draws in by_architecture.values() if draws]
    if not present:
        raise ValueError("a step needs at least one gradient")
    share = len(by_architecture) / len(present)
    return [_scaled_sum(draws, share / len(draws)) for draws in present]


def _scaled_sum(gradients: list[Gradient], factor: float) -> SummedGradient:
    """Sum the gradients and scale the sum; a single one times 1 keeps its bits."""
    first, *rest = (gradient.value for gradient in gradients)
    labels = [gradient.soft_labels for gradient in gradients if gradient.soft_labels is not None]
    inner_lr = sum(gradient.inner_lr for gradient in gradients) * factor
    return SummedGradient(sum(rest, first) * factor, inner_lr, sum(labels[1:], labels[0]) * factor if labels else None)


def update(
    state: State, gradients: Sequence[SummedGradient | Gradient], *, alpha: float, momentum: float,
    inner_alpha: float, label_lr: float = 0.0,
) -> State:  # fmt: skip
    """Apply Algorithm 1's last line: g = sum_a g^(a) in the given order, then SGD with momentum on the pixels.

    The inner learning rate moves alike, with the learning rate `inner_alpha`; its gradient is 0 if no method learns it.
    Soft labels, if there are any, move by Adam with the rate `label_lr`.
    """
    after = state if state.soft_labels is None else _with_moved_labels(state, gradients, label_lr)
    total = sum((gradient.value for gradient in gradients), torch.zeros_like(state.images))
    velocity = momentum * state.velocity + total
    inner = momentum * state.inner_velocity + sum(gradient.inner_lr for gradient in gradients)
    return after._replace(
        step=state.step + 1, images=state.images - alpha * velocity, velocity=velocity,
        inner_lr=state.inner_lr - inner_alpha * inner, inner_velocity=inner,
    )  # fmt: skip


def image_rate(settings: Distillation, step: int) -> float:
    """Return alpha of the step after `step` steps. It doesn't depend on --steps."""
    return settings.alpha * ((1 + step / settings.alpha_decay) ** -0.5 if settings.alpha_decay else 1.0)


def adam_rates(settings: Distillation, step: int) -> tuple[float, float]:
    """Return the learning rates of images and soft labels of the step after `step` steps.

    They don't depend on --steps, which may be raised for a run that is resumed.
    """
    factor = (1 + step / settings.lr_decay) ** -0.5 if settings.lr_decay else 1.0
    return settings.image_lr * factor, settings.label_lr * factor


def update_by_adam(state: State, gradients: Sequence[SummedGradient], *, image_lr: float, label_lr: float) -> State:
    """Sum the gradients of the architectures in the given order, and move images and soft labels by Adam.

    The gradients must have parts for the soft labels; those are centred after the step: softmax ignores a constant.
    """
    by_images = sum((gradient.value for gradient in gradients), torch.zeros_like(state.images))
    second = state.moments.get(SECOND, torch.zeros_like(state.images))
    images = adam_step(AdamState(state.images, state.velocity, second, state.step), by_images, image_lr)
    after = _with_moved_labels(state, gradients, label_lr)
    return after._replace(
        step=state.step + 1, images=images.value, velocity=images.first,
        moments={SECOND: images.second, **after.moments},
    )  # fmt: skip


def _with_moved_labels(state: State, gradients: Sequence[SummedGradient | Gradient], rate: float) -> State:
    """Move the soft labels by Adam; the other moments of the state are left out, and `step` stays."""
    assert state.soft_labels is not None
    total = torch.zeros_like(state.soft_labels)
    for gradient in gradients:
        assert gradient.soft_labels is not None
        total = total + gradient.soft_labels
    first, second = (state.moments.get(f"labels/{name}", torch.zeros_like(total)) for name in ("first", "second"))
    labels = adam_step(AdamState(state.soft_labels, first, second, state.step), total, rate)
    return state._replace(
        soft_labels=labels.value - labels.value.mean(1, keepdim=True) if rate else state.soft_labels,
        moments={"labels/first": labels.first, "labels/second": labels.second},
    )


RATES = {
    "fbpc": "--alpha, --lambda-x or --lambda-u",
    "fbpc-isotropic": "--alpha",
    **dict.fromkeys(("bpc-fkl", "bpc-rkl", "bpc-w"), "--alpha or --inner-lr"),
    **dict.fromkeys(network_pool.METHODS, "--image-lr or --label-lr, or raise --ridge"),
}
"""{method: what to lower where its gradient is not finite}."""


def check_gradients(architectures: Sequence[str], gradients: Sequence[Gradient], step: int, method: str) -> None:
    """Raise UserError for a gradient of `method` that is not finite."""
    for name, gradient in zip(architectures, gradients, strict=True):
        status = gradient.stats.map_status
        parts = (gradient.value, torch.tensor(gradient.inner_lr), gradient.soft_labels)
        finite = all(bool(torch.isfinite(part).all()) for part in parts if part is not None)
        if status == SolverStatus.NONFINITE or not finite:
            solve = f" (MAP {status}, loss {gradient.stats.map_loss:g})" if status else ""
            raise UserError(
                f"non-finite loss at step {step + 1} on {name}{solve}: lower {RATES[method]}; the last checkpoint is "
                "kept"
            )


def check_state(state: State) -> None:
    """Raise UserError for values that the next step can't start from."""
    if not torch.isfinite(state.images).all():
        flag = "--image-lr" if SECOND in state.moments else "--alpha"
        raise UserError(f"non-finite pixels after step {state.step}: lower {flag}; the last checkpoint is kept")
    if state.soft_labels is not None and not torch.isfinite(state.soft_labels).all():
        raise UserError(f"non-finite labels after step {state.step}: lower --label-lr; the last checkpoint is kept")
    if state.inner_velocity and not state.inner_lr > 0:
        raise UserError(
            f"the learned inner learning rate is {state.inner_lr:g} after step {state.step}: lower --inner-alpha; "
            "the last checkpoint is kept"
        )


def labels_of(state: State) -> np.ndarray | None:
    """Return the soft labels as an array, (m, d), for methods that learn them."""
    return None if state.soft_labels is None else state.soft_labels.numpy()


def map_start(state: State, task: GradientTask, settings: Distillation) -> np.ndarray | None:
    """Return where the task's MAP solve starts in the next step: (P,), or None for a draw of the prior.

    For methods with a pool it is the network of the task's slot.
    """
    if settings.method in network_pool.METHODS:
        member = state.solutions.get(_pool_name(task, state.step, settings))
        return None if member is None else member.numpy()
    if settings.map_init == "prior":
        return None
    start = warm_start.start_of(state.solutions, *task, state.step, settings.warm_pool_size, settings.warm_pool_uses)
    return None if start is None else start.numpy()


def keep_solutions(
    state: State,
    step: int,
    tasks: Sequence[GradientTask],
    gradients: Sequence[Gradient | None],
    settings: Distillation,
) -> State:
    """Add the MAP solutions of the gradients of `step` to `state`, if later solves start at earlier ones.

    For methods with a pool, put its networks back.
    """
    if settings.method in network_pool.METHODS:
        names = [_pool_name(task, step, settings) for task in tasks]
    elif settings.map_init == "warm":
        names = [warm_start.slot_of(*task, step, settings.warm_pool_size) for task in tasks]
    else:
        return state
    solutions = [gradient.solution if gradient else None for gradient in gradients]
    return state._replace(
        solutions=warm_start.with_solutions(state.solutions, list(zip(names, solutions, strict=True)))
    )


def _pool_name(task: GradientTask, step: int, settings: Distillation) -> str:
    return network_pool.name(task.architecture, network_pool.slot(settings, step, task.draw))
