"""The three jobs: train experts, distil, evaluate. The driver's side, whatever the backend."""

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from fbpc_ray.core.config import Config, Evaluation
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interrupted, Interruption
from fbpc_ray.core.types import Params
from fbpc_ray.data import coreset as coresets
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, Split, tensors
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.expert_store import ExpertStore, Recipe
from fbpc_ray.distillation.expert_training import train_expert
from fbpc_ray.distillation.methods.common import Gradient, Stats
from fbpc_ray.distillation.worker import State, check_finite, check_updated, combine, gradient_tasks, remember, update
from fbpc_ray.evaluation.chains import Chain, feasible, judge, quantities, run_chain, values
from fbpc_ray.evaluation.results import Evaluated
from fbpc_ray.execution.serial import Backend
from fbpc_ray.execution.session import Log
from fbpc_ray.inference.metrics import PredictiveStats
from fbpc_ray.inference.solution import SolverStatus
from fbpc_ray.inference.uncertainty import Uncertainty
from fbpc_ray.models.functional import Network, Spec
from fbpc_ray.models.passes import count_macs


class ExpertTask(NamedTuple):
    spec: Spec
    store: ExpertStore
    number: int


CPU_RATE = 3e10
"""Floating-point operations a second of one core in a training pass, to within a factor of two."""
LOOKED_AT = 1000
"""Training images, spread over all, on which it is said how much an expert learned."""


def _teach(dataset: Dataset, lesson: ExpertTask, device: str) -> float:
    """One task: train a trajectory and write it, unless another run did so meanwhile, and give the share of training
    images that its last epoch gets right."""
    recipe, network = lesson.store.recipe, Network(lesson.spec, device)
    data = DeviceDataset(*tensors(dataset.train, device), dataset.mean, dataset.std)
    if not lesson.store.is_complete(lesson.number):
        snapshots = train_expert(
            network, data, epochs=recipe.epochs, learning_rate=recipe.lr, batch_size=recipe.batch_size,
            augment=recipe.augment, seed=recipe.seed, index=lesson.number,
        )  # fmt: skip
        lesson.store.write(lesson.number, snapshots)
    last = lesson.store.read(lesson.number, recipe.epochs)
    statistics = {name: last[name].to(device) for name in network.buffer_names}
    params, chosen = network.parameters_of(last), torch.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).long()
    right = 0
    for some in map(data.batch, chosen.split(100)):
        right += int((network.predict(params, statistics, some.images).argmax(1) == some.labels).sum())
    return right / len(chosen)


def train_experts(
    stores: Sequence[ExpertStore], chosen: Sequence[Spec], count: int, dataset: Dataset, workers: Backend, log: Log
) -> None:
    """Train what each store lacks of its first `count` trajectories; one store for each of the networks `chosen`."""
    for its in stores:
        its.claim()
    # Trajectory by trajectory over the architectures, so that an interrupted training leaves a little of each.
    lessons = sorted(
        (
            ExpertTask(spec, its, index)
            for spec, its in zip(chosen, stores, strict=True)
            for index in its.missing(count)
        ),
        key=lambda lesson: lesson.number,
    )
    have = count * len(stores) - len(lessons)
    told = f"experts: {have} of {count * len(stores)} trajectories are there"
    if lessons:
        told += f", training {len(lessons)}"
        work = sum(6.0 * count_macs(Network(its.spec)) * its.store.recipe.epochs for its in lessons)
        if workers.device == "cpu" and (hours := work * len(dataset.train.labels) / CPU_RATE / 3600) >= 1:
            told += f", which takes something like {hours:,.0f} hours of a CPU core (fewer: --expert-count, --width)"
    log(told)
    if not lessons:
        return
    for note in {too_short(its.recipe, len(dataset.train.labels)) for its in stores} - {""}:
        log(note)
    right: dict[str, list[float]] = {}
    with progress("experts", len(lessons), "trajectory") as bar:
        for index, share in workers.map(_teach, dataset, lessons):
            right.setdefault(lessons[index].spec.architecture, []).append(share)
            bar.update()
    for name, shares in right.items():
        log(f"experts of {name}: {100 * statistics.fmean(shares):.0f} % of training images right after the last epoch")


FEW_STEPS = 100
"""SGD steps of which an expert learns little."""


def too_short(recipe: Recipe, count: int) -> str:
    """What is wrong with training on `count` images by `recipe`, and what helps; empty where an expert can learn."""
    steps = -(-count // recipe.batch_size) * recipe.epochs
    if steps >= FEW_STEPS:
        return ""
    return (
        f"note: an expert takes {steps} SGD steps ({count} images in batches of {recipe.batch_size}, {recipe.epochs} "
        f"epochs), of which it hardly learns: try --expert-batch-size {max(1, min(32, count // 10))} --expert-lr 0.05, "
        "or more --expert-epochs"
    )


def first_state(dataset: Dataset, ipc: int, seed: int, inner_lr: float = 0.0) -> tuple[State, torch.Tensor]:
    """A class-balanced draw of real images as the pseudocoreset before step 1, and its labels."""
    real = DeviceDataset(*tensors(dataset.train, "cpu"), dataset.mean, dataset.std)
    images, labels = real.batch(coresets.balanced(real.labels, ipc, dataset.classes, generator(seed, "coreset")))
    return State(0, images, torch.zeros_like(images), inner_lr), labels


def metrics_of(names: Sequence[str], stats: Sequence[Stats], seconds: float, skipped: int = 0) -> dict[str, float]:
    """One step as flat metrics, `quantity/architecture`: the mean over an architecture's draws, whose name stands in
    `names` once for each. `loss` is the sum over architectures, and first."""
    found: dict[str, list[float]] = {}
    for name, s in zip(names, stats, strict=True):
        for key, value in s.items():
            if isinstance(value, int | float):
                found.setdefault(f"{key}/{name}", []).append(float(value))
        if "map_ending" in s:
            found.setdefault(f"map_converged/{name}", []).append(float(s["map_ending"] == SolverStatus.CONVERGED))
    means = {key: statistics.fmean(each) for key, each in found.items()}
    # What is compared goes first: MLflow's plot of several runs begins with the first metric that they have.
    values = {"loss": sum(means[f"loss/{name}"] for name in dict.fromkeys(names)), "seconds/step": seconds, **means}
    if skipped:
        values["skipped"] = float(skipped)
    return values


class Step(NamedTuple):
    """One step of Algorithm 1."""

    state: State
    """After it."""
    gradients: list[tuple[str, int, Gradient]]
    """(architecture, draw, gradient), in the order in which they were summed."""
    skipped: int
    """Gradients that were left out as too slow."""


def step(config: Config, state: State, workers: Backend) -> Step:
    """One step from `state`. Raises UserError for one that isn't finite, or where a cluster can't go on."""
    d, names = config.distillation, config.networks.architectures
    units = gradient_tasks(len(names), d.draws_per_step)
    gradients = workers.gradients(state)
    there = [
        (names[unit.architecture], unit.draw, gradient)
        for unit, gradient in zip(units, gradients, strict=True)
        if gradient is not None
    ]
    check_finite([name for name, _, _ in there], [gradient for _, _, gradient in there], state.step)
    parts = combine(units, gradients)
    after = update(state, parts, alpha=d.alpha, momentum=d.momentum, inner_alpha=d.inner_alpha)
    check_updated(after)
    after = remember(after, state.step, units, gradients, d)
    return Step(after, there, len(units) - len(there))


class Checkpointer(Protocol):
    """Where checkpoints go: a `RunDirectory`, or nowhere."""

    def save(self, state: State, rows: list[dict[str, Any]]) -> None: ...


def distill(
    config: Config,
    run: Checkpointer,
    state: State,
    rows: list[dict[str, Any]],
    workers: Backend,
    interruption: Interruption,
    on_step: Callable[[dict[str, float], int], None],
    on_checkpoint: Callable[[State], None],
    look: Callable[[State], dict[str, dict[str, float]]] = lambda state: {},
) -> State:
    """Algorithm 1 from `state` to the last step; `rows` grows by one dict a step, architecture and draw. What `look`
    says of the images after a step, by architecture, is added to the step's.

    A signal ends it with Interrupted after a checkpoint. Raises UserError for a non-finite step or a cluster that can't
    go on, after a checkpoint of the last good step, and OSError for a checkpoint that can't be written; then the
    checkpoint before is kept.
    """
    d = config.distillation
    with progress("distil", d.steps, "step", state.step) as bar:
        while state.step < d.steps:
            start = time.perf_counter()
            try:
                done = step(config, state, workers)
            except (UserError, Interrupted):
                if state.step and rows:
                    run.save(state, rows)
                raise
            state, seconds = done.state, time.perf_counter() - start
            rows += [
                {"step": state.step, "architecture": name, "draw": draw, **gradient.stats, "seconds_step": seconds}
                for name, draw, gradient in done.gradients
            ]
            names, stats = [name for name, _, _ in done.gradients], [each.stats for _, _, each in done.gradients]
            values = metrics_of(names, stats, seconds, done.skipped)
            on_step(values, state.step)
            try:
                found = look(state)
            except (UserError, Interrupted):
                run.save(state, rows)
                raise
            for row in rows[len(rows) - len(names) :]:
                row |= found.get(row["architecture"], {})
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            bar.update()
            if state.step % d.checkpoint_every == 0 or state.step == d.steps or interruption.number:
                run.save(state, rows)
                on_checkpoint(state)
            interruption.check()
    return state


class EvaluationResult(NamedTuple):
    """What an evaluation found."""

    table: Evaluated
    stats: dict[tuple[str, str], PredictiveStats]
    """{(coreset, architecture): the sums of all its chains}, for a reliability diagram; none where all diverged."""
    uncertainty: dict[tuple[str, str], tuple[Uncertainty, Uncertainty]]
    """{(coreset, architecture): of familiar and strange images, of the first chain}, where strange ones are given."""
    samples: dict[tuple[str, str], list[Params]]
    """{(coreset, architecture): of the first chain}, of the coreset whose samples are kept."""


def evaluate(
    candidates: dict[str, Coreset], chosen: Sequence[Spec], dataset: Dataset, split: str, config: Config,
    workers: Backend, log: Log, ood: Split | None = None, keep: str = "",
) -> EvaluationResult:  # fmt: skip
    """SGHMC on every coreset and architecture, scored on `split` and, by its uncertainty, against `ood`. The samples of
    the first chain on the coreset called `keep` are kept.

    A chain that left the finite numbers gives None, and a line in the log.
    """
    settings = config.evaluation
    judged = judge(dataset, split, settings, config.networks.augment, ood, config.workers.compiled_chains)
    if not len(judged.split.labels):
        raise UserError(
            f"the {split} split is empty: "
            + ("give --validation 0.1" if split == "validation" else "choose another data set")
        )
    chains = [
        Chain(name, c.images.numpy(), c.labels.numpy(), spec, seed, keep=name == keep and seed == 0)
        for name, c in candidates.items()
        for spec in chosen
        for seed in range(settings.num_chains)
    ]
    judged = feasible(judged, chains, workers.device, log)
    table: Evaluated = {
        name: {s.architecture: {field: [None] * settings.num_chains for field in quantities(judged)} for s in chosen}
        for name in candidates
    }
    verdict = EvaluationResult(table, {}, {}, {})
    with progress("evaluate", len(chains), "chain") as bar:
        for index, result in workers.map(run_chain, judged, chains):
            bar.update()
            chain = chains[index]
            if result.stats is None:
                who = f"{chain.coreset} on {chain.spec.architecture}, seed {chain.seed}"
                log(f"warning: a chain diverged ({who}): lower --chain-eta, or use --chain-noise consistent")
                continue
            who = chain.coreset, chain.spec.architecture
            for field, value in values(result).items():
                table[chain.coreset][chain.spec.architecture][field][chain.seed] = value
            verdict.stats[who] = result.stats if who not in verdict.stats else verdict.stats[who] + result.stats
            if chain.seed == 0 and result.familiar is not None and result.strange is not None:
                verdict.uncertainty[who] = result.familiar, result.strange
            if result.samples is not None:
                verdict.samples[who] = result.samples
    return verdict


def judging(candidates: Sized, chosen: Sized, split: str, settings: Evaluation) -> str:
    """What `evaluate` is about to do, in words: it may take longer than the distillation."""
    parts = ((len(candidates), "coreset"), (len(chosen), "network"), (settings.num_chains, "seed"))
    product = " x ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in parts)
    count = len(candidates) * len(chosen) * settings.num_chains
    return f"judging on the {split} split: {count} chains ({product}) of {settings.chain_epochs:,} epochs"


def progress(what: str, total: int, unit: str, done: int = 0) -> Any:
    """A progress bar on the terminal or in a notebook; nothing where there is neither."""
    bar, disable = tqdm, None
    if "ipykernel" in sys.modules:
        with warnings.catch_warnings(action="ignore"):  # without ipywidgets it is a line of text, which will do
            from tqdm.auto import tqdm as bar
        disable = False
    return bar(desc=what, total=total, initial=done, unit=f" {unit}", disable=disable, dynamic_ncols=True, leave=False)
