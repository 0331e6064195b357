"""What `--help` says beside the flags: what each command is for, examples, and field docstrings as whole sentences.

tests/test_docs.py runs every example.
"""

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import NamedTuple, get_args, get_type_hints

import docstring_parser


class Page(NamedTuple):
    """The help of one command, before its flags."""

    about: str
    """Beside its first line."""
    examples: tuple[tuple[str, str], ...]
    """(command, what it does)."""


FIRST = (
    ("fbpc doctor", "is all that is needed here?"),
    ("fbpc distill --dry-run", "what a run would do; writes nothing"),
    ("fbpc distill --out runs/first", "ten images that stand for 1,437 digits; minutes, no download"),
    ("fbpc report runs/first", "a page about it: report.html"),
    ("fbpc ui", "all runs in MLflow's pages: compare them, see the images change"),
)
"""What `fbpc --help` says to somebody new."""

PAGES = {
    "distill": Page(
        "Trains the experts that are missing, learns the images, samples Bayesian networks on them and on as many "
        "real ones, and leaves a folder: coreset, pictures, result.json, metrics.parquet, and a run in MLflow. Ctrl-C "
        "leaves a checkpoint. The defaults below are those of what is asked for: without --data of the small digits "
        "preset; for your own images they are the paper's, meant for a GPU, and `fbpc distill --data folder:my-images "
        "--help` shows them.",
        (
            ("fbpc distill --out runs/first", "handwritten digits, four networks"),
            ("fbpc distill --out runs/first --resume", "go on after Ctrl-C or a crash"),
            ("fbpc distill --preset cifar10-ipc10 --download", "a row of the paper's Table 4; for a GPU"),
            (
                "fbpc distill --data folder:my-images --width 32 --expert-count 5 --expert-epochs 10 "
                "--expert-batch-size 32 --expert-lr 0.05 --steps 200",
                "a few thousand images of your own, at a laptop's size",
            ),
            ("fbpc distill --method bpc-w --architectures convnet-in convnet-bn", "a baseline, over two networks"),
        ),
    ),
    "experts": Page(
        "An expert is a network trained on the real images, with a snapshot of its weights after each epoch. Runs on "
        "the same data and networks share them.",
        (
            ("fbpc experts --preset cifar10-ipc1 --download", "100 for the paper's ConvNet; hours on a GPU"),
            ("fbpc experts --architectures convnet-in resnet18 --width 32 --expert-count 5", "five each, narrow"),
        ),
    ),
    "evaluate": Page(
        "Any other coreset, whoever made it: `fbpc evaluate --coreset PATH --data DATA`, with flags that "
        "`fbpc evaluate --coreset PATH --help` explains.",
        (
            ("fbpc evaluate runs/first --architectures convnet-ln", "on a network that it never met"),
            ("fbpc evaluate runs/first --num-chains 10", "more chains, a smaller error bar"),
            ("fbpc evaluate runs/mine --ood digits --ood-resize", "can it tell strange images?"),
        ),
    ),
    "evaluate --coreset": Page(
        "",
        (
            ("fbpc evaluate --coreset my-coreset --data digits --width 32", "what `fbpc export` wrote"),
            ("fbpc evaluate --coreset images_best.pt --data cifar10", "MTT's pair, labels_best.pt beside it"),
        ),
    ),
    "export": Page(
        "No file is replaced.",
        (
            ("fbpc export runs/first --format hf --out my-coreset", "for datasets.load_dataset"),
            ("fbpc export runs/first --format png", "one folder a class, to look at"),
        ),
    ),
    "tune": Page(
        "Trials never see a test image. `--out` then holds trials.md, best.json (a preset) and a run for each trial.",
        (
            ("fbpc tune --preset cifar10-ipc1 --num-trials 16 --out sweeps/first", "16 draws around the preset"),
            ("fbpc tune --out sweeps/first --resume", "go on after Ctrl-C or a crash"),
            ("fbpc tune --grid alpha=10,100,1000 start-epoch=1,5 --scheduler none", "all six combinations"),
            ("fbpc distill --preset sweeps/first/best.json --validation 0", "the best, from all training images"),
        ),
    ),
    "reproduce": Page(
        "Rows, a Markdown table beside the paper's values and a picture go to --out. What is there is not made again.",
        (
            ("fbpc reproduce table1 --cifar10 digits --dry-run", "how much is missing"),
            ("fbpc reproduce table1 --download --ipc 1", "small: hours on two cores"),
            ("fbpc reproduce table1 --scale paper --download", "the paper's size: for GPUs"),
            ("fbpc reproduce fig2a --cifar10 digits --override steps=20 width=16", "other settings, and it says so"),
        ),
    ),
    "report": Page(
        "",
        (
            ("fbpc report runs/first", "report.html and report.md"),
            ("fbpc report runs/first runs/second --out both.html", "two beside each other, and where they differ"),
        ),
    ),
    "ui": Page(
        "Prints the address and serves until Ctrl-C. A run's page has its scores and settings, Model metrics its "
        "course and the images with a slider over the steps; runs that are ticked in the list can be compared.",
        (
            ("fbpc ui", "the runs of this folder, or of $FBPC_HOME"),
            ("fbpc ui --port 5001", "elsewhere than at 5000"),
            ("fbpc ui --tracking-uri sqlite:////home/me/runs/mlflow.db", "another store"),
        ),
    ),
    "doctor": Page("", (("fbpc doctor", "leaves with 1 where something must be mended"),)),
}


def description(command: str, kind: type) -> str:
    """What stands above the flags of `command`, whose arguments are a `kind`. Indented: other lines tyro joins."""
    page, width = PAGES[command], min(shutil.get_terminal_size().columns, 110)
    first = (kind.__doc__ or "").strip().splitlines()[0]
    about = textwrap.indent(textwrap.fill(page.about, width - 2), "  ")
    return first + (f"\n{about}" if page.about else "") + f"\n\nFor example\n{listed(page.examples)}"


def listed(examples: Iterable[tuple[str, str]]) -> str:
    """An indented line for each command, what it does beside it, or below where there is no room."""
    lines = []
    for command, what in examples:
        if len(command) > 46:
            lines += [f"  {command}", f"{'':<8}# {what}"]
        else:
            lines += [f"  {command:<48}# {what}"]
    return "\n".join(lines)


def whole_sentences(kind: type) -> None:
    """Give tyro the docstring of each field of `kind`, and of what is nested in it, without its line breaks: tyro keeps
    those before an indented line, in the midst of a sentence."""
    written = {each.arg_name: each.description or "" for each in docstring_parser.parse_from_object(kind).params}
    hints = get_type_hints(kind)
    for each in fields(kind):
        if text := " ".join(written.get(each.name, "").split()):
            each.metadata = MappingProxyType({**each.metadata, "help": text})
        for nested in (hints[each.name], *get_args(hints[each.name])):
            if is_dataclass(nested) and isinstance(nested, type):
                whole_sentences(nested)
