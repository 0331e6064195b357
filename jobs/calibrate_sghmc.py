"""Which noise and which prior of SGHMC give the paper's Random rows: `python jobs/calibrate_sghmc.py --help`.

The Random rows of the paper's Table 1 (CIFAR-10, real images, nothing distilled) say what an evaluation should give,
and need no distillation. Every setting of the grid is run on the same random coresets, whose spread is larger than
that between settings, and its accuracy and NLL are compared with the paper's:

    misfit = sum over ipc of  (log NLL - log paper's)^2 / variance + (accuracy - paper's)^2 / variance
    variance = (1 + 1/C) s^2 + (paper's +-)^2        s: standard deviation between the C coresets, pooled over settings

with the paper's coreset taken for one more draw. Relative NLL, because its spread grows with it; s is pooled, so that
no setting gains by being noisy (with C = 1 it is 0.1 of the NLL and 0.01 of accuracy). The NLL is taken once per
example and once as the lineage computes it (metrics.batch_nll, batches of 256), which says what the paper printed.

The prior is read twice from the same rows, too. `sum`: one --chain-weight-decay for every ipc, which is divided by m
and so is one Gaussian prior, of one variance, beside the *summed* loss. `mean`: one weight decay on the mean loss for
every ipc, as a --chain-weight-decay that grows with the ipc. They agree at ipc 1.

A row is written as soon as its chain ends; the same command goes on where it stopped, and more coresets, settings or
ipc add rows to the same file. Chains of other lengths are other rows.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import current_words, parse
from fbpc_ray.core import files
from fbpc_ray.core.config import Config, Data, Evaluation, Networks, Workers, current_names
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.progress import progress
from fbpc_ray.core.provenance import capture
from fbpc_ray.core.rng import generator
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import coreset
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation import chains
from fbpc_ray.evaluation.chains import (
    Chain,
    ChainResult,
    CoresetArrays,
    EvaluationContext,
    evaluation_context,
    run_chain,
    without_impossible_compilation,
)
from fbpc_ray.execution import session, validation


class Paper(NamedTuple):
    """A Random cell of Table 1: mean and +- of accuracy in [0, 1] and of NLL."""

    accuracy: float
    accuracy_spread: float
    nll: float
    nll_spread: float


PAPER = {
    1: Paper(0.1630, 0.0074, 4.66, 0.03),
    10: Paper(0.3248, 0.0034, 2.98, 0.03),
    50: Paper(0.4968, 0.0046, 2.06, 0.02),
}
"""ipc -> CIFAR-10, ConvNet."""

DEFINITIONS = ("nll", "batch_nll")
"""What the paper's NLL may be."""

Setting = tuple[str, str, float, str]
"""(prior: sum | mean, noise, --chain-weight-decay at ipc 1, DSA)."""

SPREAD_OF_ONE = {"log_nll": 0.1, "accuracy": 0.01}
"""s where there is one coreset."""


@dataclass(frozen=True)
class Search:
    """The grid, and on what it is scored."""

    ipc: tuple[int, ...] = (1, 10)
    """Images a class: rows of Table 1 (1, 10, 50)."""
    noise: tuple[Literal["consistent", "gradient", "literal"], ...] = ("consistent", "gradient")
    """Readings of the noise (--chain-noise)."""
    weight_decay: tuple[float, ...] = (0.0, 0.005, 0.05, 0.2)
    """Strengths of the prior (--chain-weight-decay)."""
    dsa: tuple[Literal["on", "off"], ...] = ("on", "off")
    """Augmentation inside the chains."""
    coresets: int = 3
    """Random coresets, seeds 0, 1, ...; those of --seed."""
    chain_epochs: tuple[int, ...] = (1000,)
    """Epochs of a chain, one value or one for each --ipc; 10 samples are taken [paper: 1000]."""
    test_images: int = 1000
    """Test images, drawn by class; 0 means all."""
    test_seed: int = 0
    """Seed of that draw."""
    out: str = "benchmarks/results/sghmc-calibration.json"
    """The rows, and what made them."""
    dry_run: bool = False
    """Print the table of the rows that are there, and how many are missing."""


@dataclass(frozen=True)
class Arguments:
    """Calibrate SGHMC on the paper's Random rows."""

    search: Search = field(default_factory=Search)
    data: Data = field(default_factory=lambda: Data(data="cifar10"))
    networks: Networks = field(default_factory=Networks)
    workers: Workers = field(default_factory=Workers)


class Trial(NamedTuple):
    """One chain to run."""

    key: dict[str, Any]
    """All that decides its numbers: what its row begins with, and what tells whether it is there."""
    settings: Evaluation
    chain: Chain
    arrays: CoresetArrays


def run_trial(shared: EvaluationContext, trial: Trial, device: str) -> ChainResult:
    """One task: a chain under the settings of its trial."""
    return run_chain(shared._replace(settings=trial.settings), trial.chain, device)


def calibrate(argv: Sequence[str]) -> None:
    argv = current_words(argv, [Arguments])
    args = parse(Arguments, argv, "jobs/calibrate_sghmc.py", about=__doc__)
    search, config = args.search, Config(data=args.data, networks=args.networks, workers=args.workers)
    _check(search, config)
    dataset = session.load_data(config, print)
    trials = plan_trials(search, config, dataset)
    path = Path(search.out)
    done: dict[str, list[dict[str, Any]]] = {"runs": [], "rows": []}
    if path.exists():
        with undamaged(path, "restore it, or give another --out"):
            found = json.loads(path.read_text())
            done = {name: [current_names(each) for each in found[name]] for name in done}
    missing = [trial for trial in trials if not any(trial.key.items() <= row.items() for row in done["rows"])]
    print(f"{len(trials) - len(missing)} of {len(trials)} chains are in {path}, {len(missing)} to run", flush=True)
    if missing and not search.dry_run:
        with session.open_backend(config, Interruption(), print) as workers:
            provenance = capture(workers.describe())
            number = len(done["runs"])
            words = [word.replace(config.data.data, _name(config.data.data)) for word in argv]
            done["runs"].append({**provenance._asdict(), "command": " ".join(["jobs/calibrate_sghmc.py", *words])})
            how = config.workers.compiled_chains
            coresets = {trial.chain.coreset: trial.arrays for trial in missing}
            augment = config.networks.augment
            shared = evaluation_context(dataset, "test", missing[0].settings, augment, coresets, compiled=how)
            shared = shared._replace(split=some(shared.split, search.test_images, dataset, search.test_seed))
            shared = without_impossible_compilation(shared, [trial.chain for trial in missing], workers.device, print)
            with progress("calibrate", len(missing), "chain") as bar:
                for index, result in workers.map(run_trial, shared, missing):
                    row = {**missing[index].key, **_numbers(result), "run": number}
                    done["rows"].append(row)
                    _write(path, done)
                    bar.update()
                    bar.write(_line(row))
    keys = [trial.key for trial in trials]
    print(report([row for row in done["rows"] if any(key.items() <= row.items() for key in keys)]))


def plan_trials(search: Search, config: Config, dataset: Dataset) -> list[Trial]:
    """Every chain of the search, coreset by coreset, so that an interrupted search compares all settings."""
    (spec,) = session.network_specs(config, dataset)
    lengths = search.chain_epochs * (len(search.ipc) if len(search.chain_epochs) == 1 else 1)
    trials = []
    for number, (ipc, steps) in product(range(search.coresets), zip(search.ipc, lengths, strict=True)):
        state, labels = initial_state(dataset, ipc, number)
        chain = Chain(f"random-{ipc}-{number}", spec, number)
        arrays = CoresetArrays(state.images.numpy(), labels.numpy())
        for noise, decay, dsa in product(search.noise, search.weight_decay, search.dsa):
            settings = Evaluation(
                chain_epochs=steps, chain_every=max(1, steps // 10),
                chain_noise=noise, chain_weight_decay=decay, chain_augment=dsa == "on",
            )  # fmt: skip
            key = {
                "ipc": ipc, "noise": noise, "weight_decay": decay, "prior": "weight_decay / m", "dsa": dsa,
                "coreset": number, "chain_seed": number,
                "chain_epochs": steps, "chain_every": settings.chain_every, "chain_eta": settings.chain_eta,
                "chain_friction": settings.chain_friction, "chain_d": settings.chain_d,
                "architecture": spec.architecture, "width": spec.width, "depth": spec.depth,
                "augment": config.networks.augment, "data": _name(dataset.name), "fingerprint": dataset.fingerprint,
                "test_images": search.test_images, "test_seed": search.test_seed,
                "lineage_batch": chains.LINEAGE_BATCH,
            }  # fmt: skip
            trials.append(Trial(key, settings, chain, arrays))
    return trials


def some(split: Split, count: int, dataset: Dataset, seed: int) -> Split:
    """`count` images, as many of each class, in the order of the split; all of them for 0."""
    if not count:
        return split
    labels, each = torch.from_numpy(split.labels), max(1, count // len(dataset.classes))
    index = coreset.balanced(labels, each, dataset.classes, generator(seed, "calibration", "test"))
    index = index.sort().values.numpy()
    return Split(np.ascontiguousarray(split.images[index]), np.ascontiguousarray(split.labels[index]))


class Fit(NamedTuple):
    """How a setting compares, under one definition of the NLL."""

    setting: Setting
    definition: str
    misfit: float
    """Infinite where a chain diverged."""


def fits(rows: Sequence[dict[str, Any]], definition: str) -> list[Fit]:
    """Every setting that has rows at each ipc that the paper has, best first."""
    by = _grouped(rows)
    ipcs = sorted({ipc for _, ipc in by} & PAPER.keys())
    found = []
    for setting in sorted({setting for setting, _ in by}):
        cells = [by.get((setting, ipc), []) for ipc in ipcs]
        if ipcs and all(cells):
            found.append(Fit(setting, definition, sum(_misfit(rows, ipc, cell, definition) for ipc, cell in zip(
                ipcs, cells, strict=True))))  # fmt: skip
    return sorted(found, key=lambda fit: fit.misfit)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The fits as a Markdown table, best first, the paper's values beside ours, and the winner in words."""
    by = _grouped(rows)
    ipcs = sorted({ipc for _, ipc in by} & PAPER.keys())
    ranked = {definition: {fit.setting: fit.misfit for fit in fits(rows, definition)} for definition in DEFINITIONS}
    order = sorted(ranked["nll"], key=lambda setting: min(each[setting] for each in ranked.values()))
    if not order:
        return "no setting has rows at every ipc yet"
    head = ["prior", "noise", "weight decay x m at ipc 1", "DSA", "misfit by NLL", "misfit by NLL of batches"]
    for ipc in ipcs:
        p = PAPER[ipc]
        steps = "/".join(str(each) for each in sorted({row["chain_epochs"] for row in rows if row["ipc"] == ipc}))
        head += [
            f"ipc {ipc}: n", f"accuracy % (paper {100 * p.accuracy:.2f}; {steps} epochs)", f"NLL (paper {p.nll:.2f})",
            f"NLL of batches (paper {p.nll:.2f})", "NLL of a sample",
        ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for setting in order:
        prior, noise, decay, dsa = setting
        cells = [prior, noise, f"{decay:g}", dsa, *(f"{ranked[definition][setting]:.1f}" for definition in DEFINITIONS)]
        for ipc in ipcs:
            its = [row for row in by[setting, ipc] if row["nll"] is not None]
            cells += [f"{len(its)} of {len(by[setting, ipc])}" if len(its) < len(by[setting, ipc]) else str(len(its))]
            cells += [_mean([100 * row["accuracy"] for row in its], 1)]
            cells += [_mean([row[name] for row in its], 2) for name in (*DEFINITIONS, "mean_sample_nll")]
        lines.append(cells)
    prior, noise, decay, dsa = order[0]
    decays = [decay if prior == "sum" else decay * ipc for ipc in ipcs]
    shown = f"{decay:g}" if len(set(decays)) == 1 else " / ".join(f"{each:g}" for each in decays)
    definition = min(DEFINITIONS, key=lambda each: ranked[each][order[0]])
    winner = (
        f"winner: --chain-noise {noise} --chain-weight-decay {shown} {'' if dsa == 'on' else '--no-chain-augment '}"
        f"(misfit {ranked[definition][order[0]]:.1f} over {2 * len(ipcs)} values, by {definition})"
    )
    best = []
    for name, each in ranked.items():
        setting = min(each, key=each.__getitem__)
        best.append(f"best by {name}: {' '.join(map(str, setting))}, misfit {each[setting]:.1f}")
    return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines), "", *best, winner])


def _misfit(rows: Sequence[dict[str, Any]], ipc: int, cell: Sequence[dict[str, Any]], definition: str) -> float:
    """The squared z-distances of one setting at one ipc; see the head of this file."""
    if any(row[definition] is None for row in cell):
        return math.inf
    paper = PAPER[ipc]
    count = 1 + 1 / len(cell)
    total = 0.0
    for name, of, target, spread in (
        ("log_nll", lambda row: math.log(row[definition]), math.log(paper.nll), paper.nll_spread / paper.nll),
        ("accuracy", lambda row: row["accuracy"], paper.accuracy, paper.accuracy_spread),
    ):
        between = _pooled([row for row in rows if row["ipc"] == ipc and row[definition] is not None], of)
        variance = count * (SPREAD_OF_ONE[name] ** 2 if between is None else between) + spread**2
        total += (statistics.mean(of(row) for row in cell) - target) ** 2 / variance
    return total


def _pooled(rows: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float | None:
    """Variance between coresets within a setting, pooled over settings; None where no setting has two."""
    # Rows of one ipc: one prior, so that none is counted twice.
    groups = [[of(row) for row in cell] for cell in _grouped(rows).values() if len(cell) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    return sum((len(group) - 1) * statistics.variance(group) for group in groups) / freedom if freedom else None


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[Setting, int], list[dict[str, Any]]]:
    """{(setting, ipc): its rows}: each row under both priors, but for those without one, where they are the same."""
    by: dict[tuple[Setting, int], list[dict[str, Any]]] = {}
    several = len({row["ipc"] for row in rows}) > 1
    for row in rows:
        decays = {"sum": row["weight_decay"]}
        if several and row["weight_decay"]:
            decays["mean"] = float(f"{row['weight_decay'] / row['ipc']:.6g}")
        for prior, decay in decays.items():
            by.setdefault(((prior, row["noise"], decay, row["dsa"]), row["ipc"]), []).append(row)
    return by


def _numbers(result: ChainResult) -> dict[str, float | None]:
    found = chains.values(result)
    names = ("accuracy", "nll", "batch_nll", "mean_sample_nll", "ece", "brier")
    finite = all(math.isfinite(value) for value in found.values())
    return {**{name: found.get(name) if finite else None for name in names}, "seconds": round(result.seconds, 2)}


def _name(data: str) -> str:
    """A data set without the folder it lies in: parquet:/somewhere/cifar10 -> parquet:cifar10."""
    kind, colon, path = data.partition(":")
    return f"{kind}{colon}{Path(path).name}"


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "diverged"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _line(row: dict[str, Any]) -> str:
    said = f"ipc {row['ipc']} coreset {row['coreset']} {row['noise']} wd {row['weight_decay']:g} DSA {row['dsa']}: "
    if row["nll"] is None:
        return f"{said}diverged ({row['seconds']:.0f} s)"
    return (
        f"{said}accuracy {100 * row['accuracy']:.1f} %, NLL {row['nll']:.2f}, of batches {row['batch_nll']:.2f}, "
        f"of a sample {row['mean_sample_nll']:.2f} ({row['seconds']:.0f} s)"
    )


def _write(path: Path, found: dict[str, Any]) -> None:
    """One line a row, so that a diff shows what came."""
    lines = [",\n".join(f"  {json.dumps(each, allow_nan=False)}" for each in found[name]) for name in ("runs", "rows")]
    files.write_text(path, f'{{\n "runs": [\n{lines[0]}\n ],\n "rows": [\n{lines[1]}\n ]\n}}\n')


def _check(search: Search, config: Config) -> None:
    validation.check(config)
    if len(config.networks.architectures) != 1:
        raise UserError("the Random rows are of one network: give --architectures one name")
    if len(search.chain_epochs) not in (1, len(search.ipc)):
        raise UserError(f"--chain-epochs has {len(search.chain_epochs)} values: give one, or one for each --ipc")
    for name, values in (("ipc", search.ipc), ("chain-epochs", search.chain_epochs), ("coresets", [search.coresets])):
        if min(values, default=0) < 1:
            raise UserError(f"--{name} is {' '.join(map(str, values))}: it must be 1 or more")
    for grid in ("noise", "weight_decay", "dsa"):
        if not getattr(search, grid):
            raise UserError(f"--{grid.replace('_', '-')} is empty: give at least one value")
    if search.test_images < 0 or min(search.weight_decay) < 0:
        raise UserError("--test-images and --weight-decay must be 0 or more")


if __name__ == "__main__":
    main.run(calibrate, sys.argv[1:])
