"""A coreset as the memory of a learner that sees digits two classes at a time, against random images of the same size.

    python examples/replay.py                # a few minutes on one core; --quick is shorter

Five tasks follow each other: 0 and 1, 2 and 3, ... When a task ends, its images are gone but for a buffer of a few
images per class: none, random ones, or a coreset distilled from the task's images, which begins at these same random
ones. Two learners use it. One continues its training on the next task's images and on the buffer together (replay).
The other is trained from scratch on the buffer alone (as GDumb is). Both are tested on all ten classes at the end.
Each seed draws networks, batches and random images; within a seed all buffers meet the same learners.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fbpc_ray import Coreset, Dataset, dataset, distill
from fbpc_ray.core.rng import generator
from fbpc_ray.core.types import Batch
from fbpc_ray.data.augment import AUGMENTATIONS
from fbpc_ray.data.datasets import Split, normalise
from fbpc_ray.models.functional import Network, specify

TASKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
BUFFERS = ("none", "random", "distilled")
WIDTH = 16


def of_task(digits: Dataset, classes: tuple[int, ...]) -> Dataset:
    """Return the digits of some classes, with labels that count from 0."""
    train, test = (
        (split.images[rows], torch.tensor(split.labels[rows]) - classes[0])
        for split in (digits.train, digits.test)
        for rows in [(split.labels >= classes[0]) & (split.labels <= classes[-1])]
    )
    names = [digits.classes[label] for label in classes]
    return dataset(train, (test[0], test[1]), classes=names, name="-".join(["digits", *names]))


def as_batch(split: Split, digits: Dataset, first: int = 0) -> Batch:
    """Return normalised images, with labels that count from `first`."""
    images = normalise(torch.tensor(split.images), digits.mean, digits.std)
    return Batch(images, torch.tensor(split.labels) + first)


def in_buffer(coreset: Coreset, classes: tuple[int, ...], digits: Dataset) -> Batch:
    """Return a task's coreset in the normalisation and with the labels of all digits."""
    pixels = coreset.images * coreset.std[0] + coreset.mean[0]
    return Batch((pixels - digits.mean[0]) / digits.std[0], coreset.labels + classes[0])


def merge(buffer: list[Batch]) -> Batch:
    return Batch(*(torch.cat(column) for column in zip(*buffer, strict=True)))


def batches(data: Batch, size: int, source: torch.Generator) -> Iterator[Batch]:
    """Yield shuffled batches without end, augmented by DSA."""
    while True:
        for index in torch.randperm(len(data.labels), generator=source).split(size):
            yield Batch(AUGMENTATIONS["dsa"](len(index), source)(data.images[index]), data.labels[index])


def train(module: torch.nn.Module, streams: list[Iterator[Batch]], steps: int) -> None:
    """Train by Adam on a batch of each stream, weighed equally."""
    optimiser = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(steps):
        loss = torch.stack([cross_entropy(module(images), labels) for images, labels in map(next, streams)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def accuracy(module: torch.nn.Module, test: Batch) -> float:
    return float((module(test.images).argmax(-1) == test.labels).float().mean())


def learn(digits: Dataset, tasks: list[Batch], memories: list[Batch], seed: int, steps: int) -> dict[str, float]:
    """Return each learner's accuracy on all classes at the end; `memories` holds each task's part of the buffer."""
    network = Network(specify("convnet-in", digits.image_shape, len(digits.classes), WIDTH, 0))
    test = as_batch(digits.test, digits)
    continued = network.module(generator(seed, "learner"))
    for number, task in enumerate(tasks):
        source = generator(seed, "learner", number)
        streams = [batches(task, 32, source)]
        if number and memories:
            streams.append(batches(merge(memories[:number]), 32, source))
        train(continued, streams, steps)
    scores = {"replay": accuracy(continued, test)}
    if memories:
        from_scratch = network.module(generator(seed, "anew"))
        train(from_scratch, [batches(merge(memories), 256, generator(seed, "anew", "batches"))], 5 * steps)
        scores["buffer alone"] = accuracy(from_scratch, test)
    return scores


def main(ipc: int, seeds: int, steps: int, experts: str, quick: bool) -> None:
    torch.set_num_threads(1)
    start, digits = time.perf_counter(), dataset("digits")
    parts = [of_task(digits, classes) for classes in TASKS]
    tasks = [
        Batch(
            normalise(torch.tensor(part.train.images), digits.mean, digits.std), torch.tensor(part.train.labels) + at[0]
        )
        for part, at in zip(parts, TASKS, strict=True)
    ]
    settings: dict[str, Any] = {"preset": "digits", "ipc": ipc, "width": WIDTH, "steps": steps, "experts": experts}
    if quick:
        settings |= {"expert_count": 1, "expert_epochs": 5, "gamma": 0.5, "posterior_steps": 3, "mc_samples": 3}
    scores: dict[tuple[str, str], list[float]] = {}
    for seed, buffer in itertools.product(range(seeds), BUFFERS):
        memories: list[Batch] = []
        for part, classes in zip(parts, TASKS, strict=True) if buffer != "none" else ():
            method = "random" if buffer == "random" else "fbpc"
            coreset = distill(part, "convnet-in", method=method, seed=seed, **settings, log=lambda line: None)
            memories.append(in_buffer(coreset, classes, digits))
        for learner, value in learn(digits, tasks, memories, seed, 20 if quick else 100).items():
            scores.setdefault((learner, buffer), []).append(value)
    print(f"\n{'learner':<14}{'buffer':<11}accuracy % on all ten digits, at the end")
    for (learner, buffer), values in sorted(scores.items(), key=lambda each: each[0][0], reverse=True):
        spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        each = " ".join(f"{100 * value:.1f}" for value in values)
        print(f"{learner:<14}{buffer:<11}{100 * statistics.mean(values):.1f}{spread}   ({each})")
    print(
        f"\nbuffer: {ipc} per class, {ipc * len(digits.classes)} images in the end; n = {len(digits.test.labels)} test "
        f"images; seeds 0 to {seeds - 1}, mean +- standard deviation; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipc", type=int, default=1, help="images per class that are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="updates of a coreset")
    parser.add_argument("--experts", default="experts", help="folder that keeps the expert trajectories")
    parser.add_argument("--quick", action="store_true", help="weak experts and short training: no result")
    main(**vars(parser.parse_args()))
