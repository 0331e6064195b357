"""Text of --help above the flags: the purpose of each command, and examples that tests run."""

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import NamedTuple, get_args, get_type_hints

import docstring_parser


class Page(NamedTuple):
    """The help of one command, above its flags."""

    about: str
    """What follows the first line of its arguments' docstring."""
    examples: tuple[tuple[str, str], ...]
    """(command, comment)."""


FIRST = (
    ("fbpc doctor", "check the installation"),
    ("fbpc distill --dry-run", "print the plan of a run, and write nothing"),
    ("fbpc distill --out runs/first", "distil 1,437 digits into ten images; minutes, no download"),
    ("fbpc report runs/first", "write a page about the run: report.html"),
    ("fbpc ui", "show all runs in MLflow's pages: compare them, see the images change"),
)
"""Examples of `fbpc --help`."""

SOURCES = (
    "Where values are from: [paper], [App. C.2], [Table 4]: the paper; [method]: our choice where it is silent; "
    "[earlier code]: the baselines' code; [tuned]: validation images; [calibrated]: the paper's Random rows."
)

PAGES = {
    "distill": Page(
        "Trains the missing experts, learns the images, samples Bayesian networks on them and on as many real images, "
        "and writes a run directory (coreset, pictures, result.json, metrics.parquet) and a run in MLflow. Ctrl-C "
        "saves a checkpoint first. For your own images the run chooses its sizes from the data and this machine, and "
        "prints them; flags override them, and docs/settings.md says how. The defaults below depend on the other "
        "flags: those of the small digits preset for --data digits, else the paper's, before sizes are chosen. "
        f"{SOURCES}",
        (
            ("fbpc distill --out runs/first", "handwritten digits, four networks"),
            ("fbpc distill --out runs/first --resume", "continue after Ctrl-C or a crash"),
            ("fbpc distill --preset cifar10-ipc10 --download", "a row of the paper's Table 4; for a GPU"),
            ("fbpc distill --data folder:my-images --dry-run", "the plan for your own images, in 20 seconds"),
            ("fbpc distill --data folder:my-images", "your own images, in sizes that fit"),
            ("fbpc distill --data folder:my-images --time-budget 20m", "the largest sizes that take no longer"),
            ("fbpc distill --method bpc-w --architectures convnet-in convnet-bn", "a baseline, over two networks"),
        ),
    ),
    "experts": Page(
        "An expert is a network trained on the real images, with a snapshot of its weights after each epoch. Runs on "
        "the same data and networks share experts.",
        (
            ("fbpc experts --preset cifar10-ipc1 --download", "100 for the paper's ConvNet; hours on a GPU"),
            ("fbpc experts --architectures convnet-in resnet18 --width 32 --expert-count 5", "five each, narrow"),
        ),
    ),
    "evaluate": Page(
        "Data, networks and settings of the evaluation are those of the run, whatever default is printed below, and "
        "your flags win; settings of the machine, such as --backend, are not kept. For the coreset of another program: "
        "`fbpc evaluate --coreset PATH --data DATA`; `fbpc evaluate --coreset PATH --help` prints its flags. "
        f"{SOURCES}",
        (
            ("fbpc evaluate runs/first --architectures convnet-ln", "on a network that it was not distilled with"),
            ("fbpc evaluate runs/first --num-chains 10", "more chains, a smaller error bar"),
            ("fbpc evaluate runs/mine --protocol calibrated", "temperature and prior chosen on its validation split"),
            ("fbpc evaluate runs/mine --ood digits --ood-resize", "detection of out-of-distribution images"),
        ),
    ),
    "evaluate --coreset": Page(
        "Networks, width, depth, augmentation, image size, inference and its settings are those that the coreset was "
        "distilled with, where its file has them; a line names them, and your flags win.",
        (
            ("fbpc evaluate --coreset my-coreset --data digits", "what `fbpc export` wrote"),
            ("fbpc evaluate --coreset images_best.pt --data cifar10", "MTT's pair, labels_best.pt beside it"),
        ),
    ),
    "export": Page(
        "Replaces no file.",
        (
            ("fbpc export runs/first --format hf --out my-coreset", "for datasets.load_dataset"),
            ("fbpc export runs/first --format png", "image files, one folder per class"),
        ),
    ),
    "tune": Page(
        "Trials never see a test image. --out gets trials.md, best.json (a preset) and a run directory for each trial.",
        (
            ("fbpc tune --preset cifar10-ipc1 --num-trials 16 --out sweeps/first", "16 draws around the preset"),
            ("fbpc tune --out sweeps/first --resume", "continue after Ctrl-C or a crash"),
            ("fbpc tune --grid alpha=10,100,1000 start-epoch=1,5 --scheduler none", "all six combinations"),
            (
                "fbpc distill --preset sweeps/first/best.json --validation 0",
                "the best trial, on all training images",
            ),
        ),
    ),
    "reproduce": Page(
        "Writes rows, a Markdown table beside the paper's values, and a picture to --out; keeps the rows that --out "
        "has.",
        (
            (
                "fbpc reproduce table1 --cifar10 digits --dry-run",
                "print how many rows are missing, and how long they take",
            ),
            ("fbpc reproduce table1 --download --ipc 1", "small: hours on two cores"),
            ("fbpc reproduce table1 --scale paper --download", "the paper's size: for GPUs"),
            (
                "fbpc reproduce fig2a --cifar10 digits --override steps=20 width=16",
                "settings of your own",
            ),
        ),
    ),
    "report": Page(
        "",
        (
            ("fbpc report runs/first", "report.html and report.md"),
            ("fbpc report runs/first runs/second --out both.html", "two runs, and the settings in which they differ"),
        ),
    ),
    "ui": Page(
        "Prints the address and serves until Ctrl-C. A run's page has its scores and settings; its Model metrics have "
        "the curves, and the images with a slider over the steps. Tick runs in the list to compare them.",
        (
            ("fbpc ui", "the runs of this folder, or of $FBPC_HOME"),
            ("fbpc ui --port 5001", "another port than 5000"),
            ("fbpc ui --tracking-uri sqlite:////home/me/runs/mlflow.db", "another store"),
        ),
    ),
    "doctor": Page("", (("fbpc doctor", "exits with 1 if a problem must be fixed"),)),
}


def description(command: str, kind: type) -> str:
    """Return the text above the flags of `command`, whose arguments are a `kind`.

    Lines are indented, since tyro joins those that are not.
    """
    page, width = PAGES[command], min(shutil.get_terminal_size().columns, 110)
    first = (kind.__doc__ or "").strip().splitlines()[0]
    about = textwrap.indent(textwrap.fill(page.about, width - 2), "  ")
    return first + (f"\n{about}" if page.about else "") + f"\n\nFor example\n{format_examples(page.examples)}"


def format_examples(examples: Iterable[tuple[str, str]]) -> str:
    """Format (command, comment) pairs, the comment beside a short command and below a long one."""
    lines = []
    for command, comment in examples:
        if len(command) > 46:
            lines += [f"  {command}", f"{'':<8}# {comment}"]
        else:
            lines += [f"  {command:<48}# {comment}"]
    return "\n".join(lines)


def whole_sentences(kind: type) -> None:
    """Join the lines in the docstrings of the fields of `kind` and of its groups, for tyro.

    tyro keeps a line break before an indented line, in the middle of a sentence.
    """
    docstrings = {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(kind).params}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if text := " ".join(docstrings.get(field.name, "").split()):
            field.metadata = MappingProxyType({**field.metadata, "help": text})
        for nested in (hints[field.name], *get_args(hints[field.name])):
            if is_dataclass(nested) and isinstance(nested, type):
                whole_sentences(nested)
