"""The command line: `fbpc COMMAND`, `python -m fbpc_ray COMMAND`, and the jobs. Flags are made from config.py."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from fbpc_ray import __version__
from fbpc_ray.commands import help
from fbpc_ray.commands.arguments import current_words
from fbpc_ray.core.config import (
    NOT_STARTED,
    Config,
    Data,
    Evaluation,
    Experts,
    Networks,
    Sweep,
    Workers,
    read_config,
    refuse_unasked,
    started,
)
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.presets import PRESETS, default
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.core.storage import place

Arguments = TypeVar("Arguments")
VALIDATION = 0.1
"""Share of the training images that a sweep holds out where --validation doesn't say."""


@dataclass(frozen=True)
class Job:
    """This call, not the run."""

    preset: str = ""
    """A row of Table 4 (cifar10-ipc1, ... tiny-imagenet-ipc50), digits, or a JSON file, such as the best.json of a
    sweep; other flags change it. Empty: the row of --data and --ipc where there is one, and digits where --data is not
    given."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes: go on with the run in --out from its last checkpoint; --resume alone means yes. auto: go on if --out holds a
    run, else start one, so that every attempt of a job is the same command."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    json: str = ""
    """Also write the result to this file."""


@dataclass(frozen=True)
class DistillArguments:
    """Distil a pseudocoreset over several architectures (Algorithm 1), and evaluate it beside random real images."""

    job: Job = field(default_factory=Job)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class ExpertArguments:
    """Train the expert trajectories that are missing. `distill` does so too; this does only this."""

    preset: str = ""
    """As for `distill`."""
    data: Data = field(default_factory=Data)
    networks: Networks = field(default_factory=Networks)
    experts: Experts = field(default_factory=Experts)
    workers: Workers = field(default_factory=Workers)
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    json: str = ""
    """Also write the folders of the experts to this file."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate the coreset of a run with SGHMC, beside random real images, on any architecture."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run that `distill` made: its folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."""
    architectures: tuple[str, ...] = ()
    """Networks to evaluate on; empty means those of the run."""
    width: int = 0
    """Channels of a convolution; 0 means that of the run."""
    split: str = "test"
    """test | validation."""
    ood: str = ""
    """Another data set, as --data takes it: how well entropy and mutual information tell its test images (AUROC)."""
    ood_resize: bool = False
    """Resize its images to the size of the run's."""
    save_model: str = ""
    """Also save what the first chain on the run's coreset sampled as an MLflow model, in this new folder (and in the
    run's MLflow run): mlflow models serve, mlflow.pyfunc.load_model. Of one network, see --architectures."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    workers: Workers = field(default_factory=Workers)
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    json: str = ""
    """Also write the result to this file."""


@dataclass(frozen=True)
class GivenArguments:
    """Evaluate any coreset with SGHMC, beside as many random real images; writes nothing but --json."""

    coreset: str
    """A file (.safetensors, .npz, .pt, .parquet) or a folder: what `fbpc export` makes, a Hugging Face data set, MTT's
    images_best.pt and labels_best.pt, or images in class folders."""
    data: Data = field(default_factory=lambda: Data(data=""))
    networks: Networks = field(default_factory=Networks)
    pixels: Literal["auto", "normalised", "unit"] = "auto"
    """What floats are, where the file doesn't say: normalised as the data is (--normalisation) | unit: in 0..1 | auto:
    unit where all are in 0..1."""
    split: str = "test"
    """test | validation."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    workers: Workers = field(default_factory=Workers)
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    json: str = ""
    """Write the result to this file."""


@dataclass(frozen=True)
class ExportArguments:
    """Write the coreset of a run in a format that others read: Hugging Face, .pt as MTT's, safetensors, npz, PNG."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run that `distill` made: its folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."""
    format: Literal["hf", "safetensors", "pt", "png", "npz"]
    """hf: a folder for datasets.load_dataset, with a card | safetensors | pt: a folder with images_best.pt and
    labels_best.pt | png: class folders of image files, rounded to 8 bits | npz. All but png are exact; `fbpc evaluate
    --coreset` reads all."""
    out: str = ""
    """Where to, a local path where nothing is; empty means HOME/exports/RUN-FORMAT."""


@dataclass(frozen=True)
class TuneArguments:
    """Sweep hyperparameters with Ray Tune, choose on the validation split, and judge the best on test, once."""

    job: Job = field(default_factory=Job)
    sweep: Sweep = field(default_factory=Sweep)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class ReproduceArguments:
    """Make a table or figure of the paper from scratch; the same command goes on where it stopped."""

    table: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """table1 | table2 | table3 | table5 | table6 | table7 | table8 | table9 | table10 | fig2a | fig2b | fig3."""
    scale: Literal["paper", "small"] = "small"
    """paper: its sizes, for a GPU; small: width 32, 5 experts of 6 epochs, at most 300 steps, for two CPU cores."""
    cifar10: str = "cifar10"
    """What stands for CIFAR10: anything that --data takes."""
    cifar100: str = "cifar100"
    """What stands for CIFAR100."""
    tiny_imagenet: str = "tiny-imagenet"
    """What stands for Tiny-ImageNet."""
    ipc: tuple[int, ...] = ()
    """Images a class; empty means those of the table at this scale."""
    distill_seeds: int = 0
    """Coresets for each cell; 0 means those of the scale (1 | 2)."""
    num_chains: int = 0
    """Chains for each coreset; 0 means those of the scale (5 | 3)."""
    only: tuple[str, ...] = ()
    """Only cells that have one of these in their ROW/COLUMN, e.g. FBPC/ or 'CIFAR100 ipc 1'."""
    override: tuple[str, ...] = ()
    """FLAG=VALUE for every cell, e.g. steps=100 width=64; the table's title says so."""
    corruptions: str = ""
    """Folder of the official CIFAR-10-C (table3); empty generates the corruptions."""
    cost_steps: int = 5
    """Timed steps of a cell (table7, table8, table9)."""
    out: str = "reproduction"
    """Folder of coresets, rows, tables and figures."""
    data_root: str = "data"
    """As for `distill`."""
    download: bool = False
    """As for `distill`."""
    experts: str = ""
    """As for `distill`."""
    workers: Workers = field(default_factory=Workers)
    tracking: bool = True
    """Log the table to MLflow, as for `distill`."""
    experiment: str = "fbpc"
    """MLflow experiment."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""


@dataclass(frozen=True)
class ReportArguments:
    """Write one HTML page about a run, or about several beside each other; and the same as Markdown."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Runs that `distill` made: folders, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."""
    out: str = "report.html"
    """The page; FILE.md and FILE-files/ lie beside it. An earlier report there is replaced, nothing else."""


@dataclass(frozen=True)
class UiArguments:
    """Show the runs in MLflow's pages, on this machine alone: compare them, see the images step by step."""

    port: int = 0
    """Of 127.0.0.1; 0 means 5000, or a free one where that is taken."""
    tracking_uri: str = ""
    """The store; empty means the one that runs are logged to: MLFLOW_TRACKING_URI, else SQLite at HOME/mlflow.db."""


@dataclass(frozen=True)
class DoctorArguments:
    """Say whether all that is needed is here and works, and how to mend what doesn't."""


def main(argv: list[str] | None = None) -> None:
    """Run one command and leave with its exit status: 0 done, 2 bad input, 1 failed, 128 + n ended by signal n."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"fbpc-ray {__version__}")
        return
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command '{argv[0]}': {closest(argv[0], list(COMMANDS))}")
        COMMANDS[argv[0]](current_words(argv[1:], KINDS.get(argv[0], ())), f"fbpc {argv[0]}")
    except UserError as error:
        _leave(str(error), error.code)
    except Interrupted as stop:
        sys.exit(stop.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `fbpc ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _leave(f"{os.strerror(error.errno)}{where}: {MENDABLE[error.errno]}", 1)


MENDABLE = {
    errno.ENOSPC: "free some space, then run the same command with --resume",
    errno.EDQUOT: "raise the quota or free some space, then run the same command with --resume",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then run the same command with --resume",
    errno.EROFS: "choose a folder that can be written with --out",
    errno.EACCES: "choose a folder that can be written with --out, or mend its permissions",
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR),
        "there is a file, or a link to nowhere, in the place of a folder: choose another one",
    ),
}
"""Errors of the file system whose mend is known; others are shown whole."""


def distill(argv: list[str], program: str) -> None:
    args = _parse(DistillArguments, argv, program, DistillArguments(config=_base(argv)))
    job, out = args.job, args.config.output.out
    if job.resume == "auto" and not out:
        raise UserError("--resume auto needs the folder of the run: add --out DIR")
    from fbpc_ray.commands import distill as commands

    resume = job.resume == "yes" or (job.resume == "auto" and started(out))
    commands.distill(args.config, resume=resume, dry_run=job.dry_run, json=job.json)


def experts(argv: list[str], program: str) -> None:
    base = _base(argv)
    default = ExpertArguments(data=base.data, networks=base.networks, experts=base.experts, workers=base.workers)
    args = _parse(ExpertArguments, argv, program, default)
    from fbpc_ray.commands import distill as commands

    config = replace(base, data=args.data, networks=args.networks, experts=args.experts, workers=args.workers)
    commands.experts(config, dry_run=args.dry_run, json=args.json)


def evaluate(argv: list[str], program: str) -> None:
    if any(word.split("=")[0] == "--coreset" for word in argv):
        _evaluate_given(argv, program)
        return
    stored = read_config(place(_parse(EvaluateArguments, argv, program).run))
    args = _parse(EvaluateArguments, argv, program, EvaluateArguments("", evaluation=stored.evaluation))
    networks = replace(
        stored.networks,
        architectures=args.architectures or stored.networks.architectures,
        width=args.width or stored.networks.width,
    )
    config = replace(stored, networks=networks, evaluation=args.evaluation, workers=args.workers)
    refuse_unasked(config, {"address"} | ({"architectures"} if args.architectures else set()), args.run)
    from fbpc_ray.commands import distill as commands

    commands.evaluate(
        place(args.run), config, args.split, ood=args.ood, ood_resize=args.ood_resize,
        save_model=args.save_model, dry_run=args.dry_run, json=args.json,
    )  # fmt: skip


def _evaluate_given(argv: list[str], program: str) -> None:
    args = _parse(GivenArguments, argv, f"{program} --coreset" if {"-h", "--help"} & set(argv) else program)
    if not args.data.data:
        raise UserError("--data is missing: name the data set whose images judge the coreset")
    from fbpc_ray.commands import export as exports

    config = Config(data=args.data, networks=args.networks, evaluation=args.evaluation, workers=args.workers)
    exports.evaluate(args.coreset, config, args.split, args.pixels, dry_run=args.dry_run, json=args.json)


def export(argv: list[str], program: str) -> None:
    args = _parse(ExportArguments, argv, program)
    from fbpc_ray.commands import export as exports

    exports.export(place(args.run), args.format, args.out)


def tune(argv: list[str], program: str) -> None:
    base = _base(argv)
    if not base.data.validation:
        base = base.updated(validation=VALIDATION)
    args = _parse(TuneArguments, argv, program, TuneArguments(config=base))
    job, out, trusted = args.job, args.config.output.out, bool(args.sweep.space)
    if job.resume != "no" and not out:
        raise UserError("--resume needs the folder of the sweep: add --out DIR")
    from fbpc_ray.tuning import sweep as tuning

    resume = job.resume == "yes" or (job.resume == "auto" and started(out))
    if resume:
        base = base if job.preset else tuning.read_base(place(out))
        stored = tuning.read_plan(place(out)).settings
        args = _parse(TuneArguments, argv, program, TuneArguments(sweep=stored, config=base))
    tuning.tune(args.config, args.sweep, resume=resume, trusted=trusted, dry_run=job.dry_run, json=job.json)


def reproduce(argv: list[str], program: str) -> None:
    args = _parse(ReproduceArguments, argv, program)
    from fbpc_ray.commands import reproduce as reproduction

    given = vars(args)
    names = {"cifar10": "cifar10", "cifar100": "cifar100", "tiny-imagenet": "tiny_imagenet"}
    sources = {data: given.pop(name) for data, name in names.items()}
    places = {name: given.pop(name) for name in ("data_root", "download", "experts", "tracking", "experiment")}
    base = Config(workers=given.pop("workers")).updated(**places)
    reproduction.reproduce(given.pop("table"), base, sources, **given)


def report(argv: list[str], program: str) -> None:
    args = _parse(ReportArguments, argv, program)
    if not args.runs:
        raise UserError("name a run: fbpc report RUN [RUN ...]")
    from fbpc_ray.reporting import report

    report.report(args.runs, args.out, lambda line: print(line, flush=True))


def ui(argv: list[str], program: str) -> None:
    args = _parse(UiArguments, argv, program)
    from fbpc_ray.commands import ui

    ui.ui(args.tracking_uri, args.port, lambda line: print(line, flush=True))


def doctor(argv: list[str], program: str) -> None:
    _parse(DoctorArguments, argv, program)
    from fbpc_ray.commands import doctor

    sys.exit(doctor.doctor(lambda line: print(line, flush=True)))


COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "distill": distill,
    "experts": experts,
    "evaluate": evaluate,
    "export": export,
    "tune": tune,
    "reproduce": reproduce,
    "report": report,
    "ui": ui,
    "doctor": doctor,
}


KINDS: dict[str, tuple[type, ...]] = {
    "distill": (DistillArguments,), "experts": (ExpertArguments,), "evaluate": (EvaluateArguments, GivenArguments),
    "export": (ExportArguments,), "tune": (TuneArguments,), "reproduce": (ReproduceArguments,),
    "report": (ReportArguments,), "ui": (UiArguments,), "doctor": (DoctorArguments,),
}  # fmt: skip
"""The arguments of each command."""


def _usage() -> str:
    lines = [f"  {name:<10}{(KINDS[name][0].__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    usage = "usage: fbpc COMMAND [OPTIONS]    (fbpc COMMAND --help explains each option, with examples)"
    return "\n".join([usage, "", *lines, "", "To begin", "", help.listed(help.FIRST), "", "Docs: README.md, docs/"])


def _base(argv: list[str]) -> Config:
    """The configuration that the flags in `argv` change: the stored one on --resume, a preset, or the defaults."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--preset", "--data", "--ipc", "--out", "--method", "--address"):
        early.add_argument(flag)
    early.add_argument("--architectures", nargs="*")
    early.add_argument("--resume", nargs="?", const="yes", default="no")
    try:
        known, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:
        return Config()  # a flag without its value: the full parser says so
    given = {name for name, value in vars(known).items() if value is not None}
    if known.out and not known.preset and (known.resume == "yes" or (known.resume == "auto" and started(known.out))):
        stored = read_config(place(known.out), NOT_STARTED)
        refuse_unasked(stored, given, known.out)
        return stored
    base = default(known.data, known.ipc, known.preset or "", known.method)
    if known.preset and known.preset not in PRESETS:
        refuse_unasked(base, given, known.preset)
    return base


def _parse(kind: type[Arguments], argv: list[str], program: str, default: Arguments | None = None) -> Arguments:
    extra: dict[str, Any] = {} if default is None else {"default": default}
    if {"-h", "--help"} & set(argv):
        help.whole_sentences(kind)
        extra["description"] = help.description(program.removeprefix("fbpc "), kind)
    return tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=argv, prog=program, **extra)  # type: ignore[return-value]


def _leave(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
