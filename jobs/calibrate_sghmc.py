"""Which settings of SGHMC give the paper's Random rows: `python jobs/calibrate_sghmc.py --help`.

The Random rows of the paper's Table 1 (CIFAR-10, real images, nothing distilled) say what an evaluation should give,
and need no distillation. Every setting of the grid runs on the same random coresets; the table compares its accuracy
and NLL with the paper's:

    distance = root mean square, over ipc and {accuracy, NLL}, of (ours - paper's) / tolerance
    tolerance: 1.5 points of accuracy, 0.15 nats of NLL

The NLL is taken once per example and once as earlier code computes it (metrics.batch_nll, batches of 128).

--grid lists the values of each knob (d, eta, prior, init, dsa, noise, friction); the first one is the base. A number
followed by m is multiplied by m = ipc x classes: eta=0.0009m is the step size of earlier code, prior=0.0005m a weight
decay of 0.0005 on the mean loss (without m, one Gaussian prior for every ipc). init is own or the standard deviation of
N(0, s^2); eta=auto is the default of `fbpc evaluate`.

    --grid d=0.01,0,1e-3 eta=0.03,0.0009m prior=0.05,3 init=own,0.1 dsa=on,off --search one-at-a-time

A row is appended to --out, a file of JSON lines, as soon as its chain ends. The same command continues where it
stopped; more coresets, settings or ipc add rows to the same file. Chains of other lengths are other rows.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import current_words, parse
from fbpc_ray.core.config import Config, Data, Evaluation, Networks, Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log, progress
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
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.reproduction.calibration import KNOBS, name_of, report, settings_of, value_of


@dataclass(frozen=True)
class Search:
    """The grid, and on what it is scored."""

    grid: tuple[str, ...] = ("d=0.01,0,1e-4,1e-3", "dsa=on,off")
    """KNOB=VALUE,VALUE ...: d, eta, prior, init, dsa, noise, friction. The first value of a knob is the base; a number
    followed by m is multiplied by m; other knobs keep the default of `fbpc evaluate`."""
    search: Literal["product", "one-at-a-time"] = "product"
    """product: all combinations; one-at-a-time: the base, and each other value with all else at the base."""
    ipc: tuple[int, ...] = (1, 10)
    """Images per class: rows of Table 1 (1, 10, 50)."""
    coresets: int = 3
    """Random coresets, seeds 0, 1, ...; those of --seed."""
    chain_epochs: tuple[int, ...] = (1000,)
    """Epochs of a chain, one value or one for each --ipc; 10 samples are taken [paper: 1000]."""
    test_images: int = 2000
    """Test images, drawn by class; 0 means all."""
    test_seed: int = 0
    """Seed of that draw."""
    out: str = "benchmarks/results/sghmc-calibration.jsonl"
    """JSON lines, one for each chain."""
    dry_run: bool = False
    """Print the settings, how many chains are missing, and the table of the rows that exist; run nothing."""


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
    """All that decides its numbers: its row begins with it."""
    settings: Evaluation
    chain: Chain
    arrays: CoresetArrays


def run_trial(shared: EvaluationContext, trial: Trial, device: str) -> ChainResult:
    """Run one chain under the settings of its trial."""
    return run_chain(shared._replace(settings=trial.settings), trial.chain, device)


def calibrate(argv: Sequence[str]) -> None:
    """Run the missing chains of a search, append their rows, and print the table."""
    argv = current_words(argv, [Arguments])
    args = parse(Arguments, argv, "jobs/calibrate_sghmc.py", about=__doc__)
    search, config = args.search, Config(data=args.data, networks=args.networks, workers=args.workers)
    _check(search, config)
    dataset = session.load_data(config, print)
    trials = plan_trials(search, config, dataset)
    path = Path(search.out)
    rows = read_rows(path)
    missing = [trial for trial in trials if not any(trial.key.items() <= row.items() for row in rows)]
    print(f"{len(trials) - len(missing)} of {len(trials)} chains are in {path}, {len(missing)} to run", flush=True)
    if missing and not search.dry_run:
        with open_backend(config, Interruption(), print) as workers:
            provenance = capture(workers.describe())
            origin = {"commit": provenance.commit, "torch": provenance.versions["torch"], "device": provenance.device}
            shared = _context(search, config, dataset, missing, workers.device)
            with progress("calibrate", len(missing), "chain") as bar:
                for index, result in workers.map(run_trial, shared, missing):
                    rows.append({**missing[index].key, **_numbers(result), **origin})
                    append_row(path, rows[-1])
                    bar.update()
                    log(_line(rows[-1]))
    if comparable := _comparable(rows, trials):
        print(report(comparable))


def _context(
    search: Search, config: Config, dataset: Dataset, missing: Sequence[Trial], device: str
) -> EvaluationContext:
    """Collect what all chains share; each replaces the settings by its own."""
    coresets = {trial.chain.coreset: trial.arrays for trial in missing}
    compiled = config.workers.compiled_chains
    shared = evaluation_context(
        dataset, "test", missing[0].settings, config.networks.augment, coresets, compiled=compiled
    )
    shared = shared._replace(split=some(shared.split, search.test_images, dataset, search.test_seed))
    return without_impossible_compilation(shared, [trial.chain for trial in missing], device, print)


def plan_trials(search: Search, config: Config, dataset: Dataset) -> list[Trial]:
    """List the chains of the search, coreset by coreset, so that an interrupted search compares all settings."""
    (spec,) = session.network_specs(config, dataset)
    lengths = search.chain_epochs * (len(search.ipc) if len(search.chain_epochs) == 1 else 1)
    trials = []
    for number, (ipc, epochs) in product(range(search.coresets), zip(search.ipc, lengths, strict=True)):
        state, labels = initial_state(dataset, ipc, number)
        chain = Chain(f"random-{ipc}-{number}", spec, number)
        arrays = CoresetArrays(state.images.numpy(), labels.numpy())
        for setting in settings_of(search.grid, search.search):
            values = {KNOBS[knob]: value_of(knob, text, len(labels)) for knob, text in setting.items()}
            settings = Config().updated(chain_epochs=epochs, chain_every=max(1, epochs // 10), **values).evaluation
            key = {
                "ipc": ipc, "coreset": number, **setting,
                "chain_epochs": epochs, "chain_every": settings.chain_every,
                "architecture": spec.architecture, "width": spec.width, "depth": spec.depth,
                "augment": config.networks.augment, "data": _name(dataset.name), "fingerprint": dataset.fingerprint,
                "test_images": search.test_images, "test_seed": search.test_seed,
                "lineage_batch": chains.LINEAGE_BATCH,
            }  # fmt: skip
            trials.append(Trial(key, settings, chain, arrays))
    return trials


def some(split: Split, count: int, dataset: Dataset, seed: int) -> Split:
    """Draw `count` images, as many of each class, in the order of the split; all of them for 0."""
    if not count:
        return split
    labels, per_class = torch.from_numpy(split.labels), max(1, count // len(dataset.classes))
    index = coreset.balanced(labels, per_class, dataset.classes, generator(seed, "calibration", "test"))
    index = index.sort().values.numpy()
    return Split(np.ascontiguousarray(split.images[index]), np.ascontiguousarray(split.labels[index]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that a killed writer left incomplete is removed. Raises UserError."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete)
    try:
        rows = [json.loads(line) for line in complete.splitlines()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: expected one JSON object a line; restore it, or give another --out") from None
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def _comparable(rows: Sequence[dict[str, Any]], trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the rows of the planned chains' data, network, lengths and images, of all settings and coresets."""
    free = ("coreset", *KNOBS)
    kinds = {json.dumps({k: v for k, v in trial.key.items() if k not in free}) for trial in trials}
    key_items = [json.loads(kind).items() for kind in sorted(kinds)]
    return [row for row in rows if any(items <= row.items() for items in key_items)]


def _numbers(result: ChainResult) -> dict[str, float | None]:
    numbers = chains.values(result)
    names = ("accuracy", "nll", "batch_nll", "mean_sample_nll", "ece", "brier")
    finite = all(math.isfinite(value) for value in numbers.values())
    return {**{name: numbers.get(name) if finite else None for name in names}, "seconds": round(result.seconds, 2)}


def _name(data: str) -> str:
    """Return a data set without the folder it lies in: parquet:/somewhere/cifar10 -> parquet:cifar10."""
    kind, colon, path = data.partition(":")
    return f"{kind}{colon}{Path(path).name}"


def _line(row: dict[str, Any]) -> str:
    title = f"ipc {row['ipc']} coreset {row['coreset']}, {name_of({knob: row[knob] for knob in KNOBS})}: "
    if row["nll"] is None:
        return f"{title}diverged ({row['seconds']:.0f} s)"
    return (
        f"{title}accuracy {100 * row['accuracy']:.1f} %, NLL {row['nll']:.2f}, batch NLL {row['batch_nll']:.2f}, "
        f"sample NLL {row['mean_sample_nll']:.2f}, ECE {row['ece']:.3f} ({row['seconds']:.0f} s)"
    )


def _check(search: Search, config: Config) -> None:
    validation.check(config)
    if len(config.networks.architectures) != 1:
        raise UserError("the Random rows are of one network: give --architectures one name")
    if len(search.chain_epochs) not in (1, len(search.ipc)):
        raise UserError(f"--chain-epochs has {len(search.chain_epochs)} values: give one, or one for each --ipc")
    for name, values in (("ipc", search.ipc), ("chain-epochs", search.chain_epochs), ("coresets", [search.coresets])):
        if min(values, default=0) < 1:
            raise UserError(f"--{name} is {' '.join(map(str, values))}: it must be 1 or more")
    if search.test_images < 0:
        raise UserError(f"--test-images is {search.test_images}: it must be 0 or more")
    settings_of(search.grid, search.search)


if __name__ == "__main__":
    main.run(calibrate, sys.argv[1:])
