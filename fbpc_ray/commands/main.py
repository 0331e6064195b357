"""The command line: `fbpc COMMAND`, `python -m fbpc_ray COMMAND`, and the jobs.

A command's defaults depend on its words (the run that it resumes, the preset, the data set), so each command parses its
own words; modules that import torch are imported after that, and --help answers at once.
"""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import NoReturn

from fbpc_ray import __version__
from fbpc_ray.commands import help
from fbpc_ray.commands.arguments import (
    KINDS,
    CoresetArguments,
    DistillArguments,
    DoctorArguments,
    EvaluateArguments,
    ExpertArguments,
    ExportArguments,
    ReportArguments,
    ReproduceArguments,
    TuneArguments,
    UiArguments,
)
from fbpc_ray.commands.parsing import current_words, flags_in, flags_of, parse, resumes, start_of
from fbpc_ray.core import phases, progress
from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import Config, read_config, refuse_unasked, started
from fbpc_ray.core.errors import UserError, closest, escape_controls
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.core.sizes import LEVELS, SizeRequest
from fbpc_ray.core.storage import place

VALIDATION = 0.1
"""Fraction of the training images that a sweep holds out without --validation."""

FIXES = {
    errno.ENOSPC: "free some space, then {again}",
    errno.EDQUOT: "raise the quota or free some space, then {again}",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then {again}",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "check the disk or the network, then {again}"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n), then {again}"),
    **dict.fromkeys((errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO, errno.ENODEV), "check the path"),
    errno.EROFS: "choose a writable folder{out}",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose a writable folder{out}, or fix its permissions"),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR),
        "a file, or a link to nowhere, is in the place of a folder: choose another one",
    ),
}
"""Errors of the file system that a user can fix; others keep their traceback. {again}: see `_again`; {out}: the flag
where the command has it."""

RESUME = re.compile(r"run (the same command|again) with --resume")
"""Advice of the workers and of an object store, which don't know the command."""


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status: 0 done, 2 bad input, 1 failed, 128 + n ended by signal n."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"fbpc-ray {__version__}")
        return
    run(_command, words, watched=words[0] != "ui")


def _command(words: Sequence[str]) -> None:
    name, *rest = words
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}': {closest(name, list(COMMANDS))}")
    COMMANDS[name](current_words(rest, KINDS[name]))


def run(function: Callable[[Sequence[str]], None], words: Sequence[str], watched: bool = True) -> None:
    """Call `function` with `words`; print an error that a user can fix as one line, and exit with its status.

    `watched`: where there is no terminal, a line tells of each minute in which `function` prints none.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an ASCII terminal gets escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        with progress.watched() if watched else nullcontext():
            function(words)
    except UserError as error:
        message = str(error)
        _exit(message if _has("resume", words) else RESUME.sub("run the same command again", message), error.code)
    except Interrupted as stop:
        sys.exit(stop.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `fbpc ... | head` has closed its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FIXES:
            raise
        where = f" ({error.filename})" if error.filename else ""
        out = " with --out" if _has("out", words) else ""
        _exit(f"{os.strerror(error.errno)}{where}: {FIXES[error.errno].format(again=_again(words), out=out)}", 1)
    finally:
        progress.log_to_stderr(False)


def _has(flag: str, words: Sequence[str]) -> bool:
    """Return whether a command has `flag`; a job, whose words begin with a flag, may have it."""
    name = words[0] if words else ""
    return name.startswith("-") or any(flag in flags_of(kind) for kind in KINDS.get(name, ()))


def _again(words: Sequence[str]) -> str:
    """Return how to continue a command: with --resume only if its --out holds a run by now."""
    out = next((word.partition("=")[2] or after for word, after in zip(words, [*words[1:], ""], strict=True)
                if word.partition("=")[0] == "--out"), "")  # fmt: skip
    with suppress(UserError, OSError):
        if _has("resume", words) and (not out or started(out)):
            return "run the same command with --resume"
    return "run the same command again"


def _loading() -> None:
    """Print the first line of a command before it imports torch, which takes seconds."""
    phases.begin()
    if "torch" not in sys.modules:
        progress.log("loading torch ...")


def _exit(message: str, code: int) -> NoReturn:
    print(f"error: {escape_controls(redacted(message))}", file=sys.stderr)
    sys.exit(code)


def distill(words: Sequence[str]) -> None:
    base, sizes = start_of(words)
    args = parse(DistillArguments, words, "fbpc distill", DistillArguments(config=base))
    job, out = args.job, args.config.output.out
    if job.resume == "auto" and not out:
        raise UserError("--resume auto needs the folder of the run: add --out DIR")
    if job.print_config:
        _print_config(args.config, sizes)
        return
    _loading()
    from fbpc_ray.commands import distill as commands

    commands.distill(args.config, sizes, resume=resumes(job.resume, out), dry_run=job.dry_run, json=job.json)


def _print_config(config: Config, sizes: SizeRequest | None) -> None:
    progress.log_to_stderr(True)
    _loading()
    from fbpc_ray.commands import distill as commands

    commands.print_config(config, sizes)


def experts(words: Sequence[str]) -> None:
    base, sizes = start_of(words, unused={"initial_coreset", "out"})
    default = ExpertArguments(
        ipc=base.distillation.ipc, data=base.data, networks=base.networks, experts=base.experts, workers=base.workers
    )
    args = parse(ExpertArguments, words, "fbpc experts", default)
    _loading()
    from fbpc_ray.commands import experts as commands

    config = replace(base, data=args.data, networks=args.networks, experts=args.experts, workers=args.workers)
    config = config.updated(ipc=args.ipc)
    commands.experts(config, sizes, dry_run=args.dry_run, json=args.json)


def evaluate(words: Sequence[str]) -> None:
    if any(word.split("=")[0] == "--coreset" for word in words):
        _evaluate_coreset(words)
        return
    program = "fbpc evaluate"
    stored = read_config(place(parse(EvaluateArguments, words, program).run))
    defaults = EvaluateArguments("", tracking=stored.output.tracking, evaluation=stored.evaluation)
    args = parse(EvaluateArguments, words, program, defaults)
    networks = replace(
        stored.networks,
        architectures=args.architectures or stored.networks.architectures,
        width=args.width or stored.networks.width,
    )
    data = replace(stored.data, data_root=args.data_root or stored.data.data_root, download=args.download)
    config = replace(stored, data=data, networks=networks, evaluation=args.evaluation, workers=args.workers)
    config = config.updated(tracking=args.tracking)
    unused = {"experts", "initial_coreset", "out"}
    refuse_unasked(config, {"address"} | unused | ({"architectures"} if args.architectures else set()), args.run)
    _loading()
    from fbpc_ray.commands import evaluate as commands

    options = commands.Options(args.split, args.ood, args.ood_resize, args.save_model, args.tracking_uri, args.protocol)
    commands.evaluate(place(args.run), config, options, dry_run=args.dry_run, json=args.json)


def _evaluate_coreset(words: Sequence[str]) -> None:
    program = "fbpc evaluate --coreset"
    args = parse(CoresetArguments, words, program)
    if not args.data.data:
        raise UserError("--data: missing; name the data set whose test images score the coreset")
    if not args.coreset:
        raise UserError("--coreset: the path is empty; give a file or a folder")
    _loading()
    from fbpc_ray.commands import evaluate_coreset as commands

    base = Config().updated(data="", **commands.stored_settings(args.coreset, flags_in(words)))
    default = CoresetArguments("", data=base.data, networks=base.networks, evaluation=base.evaluation)
    args = parse(CoresetArguments, words, program, default)
    config = Config(data=args.data, networks=args.networks, evaluation=args.evaluation, workers=args.workers)
    options = commands.Options(args.split, args.pixels, args.protocol, args.random)
    commands.evaluate(args.coreset, config, options, dry_run=args.dry_run, json=args.json)


def export(words: Sequence[str]) -> None:
    args = parse(ExportArguments, words, "fbpc export")
    _loading()
    from fbpc_ray.commands import export as exports

    exports.export(place(args.run), args.format, args.out)


def tune(words: Sequence[str]) -> None:
    base, sizes = start_of(words)
    if not base.data.validation:
        base = base.updated(validation=VALIDATION)
    args = parse(TuneArguments, words, "fbpc tune", TuneArguments(config=base))
    job, out, trusted = args.job, args.config.output.out, bool(args.sweep.space or args.sweep.grid)
    if job.resume != "no" and not out:
        raise UserError(f"--resume {job.resume} needs the folder of the sweep: add --out DIR")
    progress.log_to_stderr(job.print_config or job.json == "-")
    _loading()
    from fbpc_ray.tuning import sweep as tuning

    resume = resumes(job.resume, out)
    if resume:
        stored = tuning.read_plan(place(out)).settings
        if not job.preset or job.preset in LEVELS:
            base = base.updated(val_every=tuning.read_base(place(out)).output.val_every)  # of earlier code
        args = parse(TuneArguments, words, "fbpc tune", TuneArguments(sweep=stored, config=base))
    if job.print_config:
        _print_config(args.config, None if resume else sizes)
        return
    tuning.tune(
        args.config, args.sweep, sizes, given=flags_in(words), resume=resume, trusted=trusted, dry_run=job.dry_run,
        json=job.json,
    )  # fmt: skip


def reproduce(words: Sequence[str]) -> None:
    args = parse(ReproduceArguments, words, "fbpc reproduce")
    _loading()
    from fbpc_ray.commands import reproduce as reproduction

    reproduction.reproduce(args)


def report(words: Sequence[str]) -> None:
    args = parse(ReportArguments, words, "fbpc report")
    if not args.runs:
        raise UserError("name a run: fbpc report RUN [RUN ...]")
    _loading()
    from fbpc_ray.reporting import report

    report.report(args.runs, args.out, lambda line: print(line, flush=True))


def ui(words: Sequence[str]) -> None:
    args = parse(UiArguments, words, "fbpc ui")
    from fbpc_ray.commands import ui

    ui.ui(args.tracking_uri, args.port, args.timeout, lambda line: print(line, flush=True))


def doctor(words: Sequence[str]) -> None:
    args = parse(DoctorArguments, words, "fbpc doctor")
    from fbpc_ray.commands import doctor

    sys.exit(doctor.doctor(lambda line: print(line, flush=True), args.deep))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
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


def _usage() -> str:
    lines = [f"  {name:<10}{(KINDS[name][0].__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    usage = "usage: fbpc COMMAND [OPTIONS]    (fbpc COMMAND --help explains each option, with examples)"
    return "\n".join(
        [usage, "", *lines, "", "To begin", "", help.format_examples(help.FIRST), "", "Docs: README.md, docs/"]
    )
