"""Arguments of each command: tyro makes flags and help from these classes and core/settings.py."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fbpc_ray.core.config import Config, Sweep
from fbpc_ray.core.settings import Data, Evaluation, Experts, Networks, Workers


@dataclass(frozen=True)
class Job:
    """Options of this command, which config.json does not hold."""

    preset: str = ""
    """quick | laptop | gpu: sizes chosen from the data, for about a minute, 4 minutes, or an hour on a GPU | paper: the
    paper's, of any data | a row of Table 4 (cifar10-ipc1, ... tiny-imagenet-ipc50) | digits | a JSON file, such as the
    best.json of a sweep; other flags change it. Empty: digits for --data digits, paper for cifar10, cifar100 and
    tiny-imagenet, else laptop, or gpu where the run uses one."""
    time_budget: str = ""
    """90s, 20m, 2h: choose the largest sizes whose run takes no longer, by a short timing of this machine. The estimate
    leaves out the start of Ray and compilation, and is right to within a factor of two."""
    recipe: Literal["paper", "improved"] = "paper"
    """paper: as printed; improved: --views 8 --learn-labels. Other flags change it."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes (or --resume alone): continue the run in --out from its last checkpoint. auto: continue the run if --out
    holds one, else start it, so that every attempt of a job is the same command."""
    dry_run: bool = False
    """Print the plan: data, networks, seconds of each part, disk, memory, warnings, files. Write nothing."""
    print_config: bool = False
    """Print all settings as JSON, which --preset FILE takes, and end."""
    json: str = ""
    """Also write the result to this file."""


@dataclass(frozen=True)
class DistillArguments:
    """Distil a pseudocoreset over several architectures (Algorithm 1), and evaluate it beside random real images."""

    job: Job = field(default_factory=Job)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class ExpertArguments:
    """Train the expert trajectories that are missing, as `distill` does before its first step."""

    preset: str = ""
    """As for `distill`."""
    time_budget: str = ""
    """As for `distill`."""
    ipc: int = 1
    """Images per class of the distillation that will use these experts: chosen sizes depend on it."""
    data: Data = field(default_factory=Data)
    networks: Networks = field(default_factory=Networks)
    experts: Experts = field(default_factory=Experts)
    workers: Workers = field(default_factory=Workers)
    dry_run: bool = False
    """Print the plan: data, networks, missing experts and their seconds. Write nothing."""
    json: str = ""
    """Also write the folders of the experts to this file."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate the coreset of a run by SGHMC or trained networks, beside random real images, on any architecture."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run directory of `distill`: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."""
    architectures: tuple[str, ...] = ()
    """Networks to evaluate on; empty means those of the run."""
    width: int = 0
    """Channels of a convolution; 0 means that of the run."""
    split: str = "test"
    """test | validation."""
    protocol: Literal["paper", "calibrated"] = "paper"
    """paper: chains with the defaults, which are fitted to the paper's Random rows, or as other flags say | calibrated:
    besides, choose --chain-d and --chain-weight-decay for the run's coreset on its validation split, never on test
    images, and report those chains beside the paper's."""
    ood: str = ""
    """A second data set, as --data takes it: also score how well entropy and mutual information separate its test
    images from those of the run (AUROC)."""
    ood_resize: bool = False
    """Resize the images of --ood to the size of the run's; of several sizes, as --image-size of `distill` does."""
    data_root: str = ""
    """As for `distill`; empty means that of the run."""
    download: bool = False
    """As for `distill`."""
    tracking: bool = True
    """Log the scores to MLflow, as a run below that of the distillation; by default as the distillation did."""
    tracking_uri: str = ""
    """MLflow store; empty: MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in $FBPC_HOME, else in the current
    folder; never one that only a file of the run names."""
    save_model: str = ""
    """Also save the posterior samples of the first chain on the run's coreset as an MLflow model, in this new folder
    (and in the run's MLflow run), for mlflow models serve and mlflow.pyfunc.load_model. Needs one network, see
    --architectures."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    workers: Workers = field(default_factory=Workers)
    dry_run: bool = False
    """Print the plan: data, networks, chains and their seconds. Write nothing."""
    json: str = ""
    """Also write the result to this file."""


@dataclass(frozen=True)
class CoresetArguments:
    """Evaluate any coreset by SGHMC or trained networks, beside as many random real images; write only --json."""

    coreset: str
    """A file (.safetensors, .npz, .pt, .parquet) or a folder: a run, what `fbpc export` writes, a Hugging Face data
    set, MTT's images_best.pt and labels_best.pt, or images in class folders. Of s3:// and gs:// a run or a file."""
    data: Data = field(default_factory=lambda: Data(data=""))
    networks: Networks = field(default_factory=Networks)
    pixels: Literal["auto", "normalised", "unit"] = "auto"
    """Range of float pixels where the file doesn't tell: normalised as the data is (--normalisation) | unit: in 0..1 |
    auto: unit if all pixels are in 0..1."""
    split: str = "test"
    """test | validation."""
    protocol: Literal["paper", "calibrated"] = "paper"
    """As for `fbpc evaluate RUN`; calibrated needs --validation 0.1."""
    random: bool = True
    """Evaluate as many random real images beside it; --no-random halves the time."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    workers: Workers = field(default_factory=Workers)
    dry_run: bool = False
    """Print the plan: data, networks, chains and their seconds. Write nothing."""
    json: str = ""
    """Write the result to this file."""


@dataclass(frozen=True)
class ExportArguments:
    """Write the coreset of a run in a common format: Hugging Face, .pt as MTT's, safetensors, npz, PNG."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run directory of `distill`: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."""
    format: Literal["hf", "safetensors", "pt", "png", "npz"]
    """hf: a folder for datasets.load_dataset, with a card | safetensors | pt: a folder with images_best.pt and
    labels_best.pt | png: class folders of image files, rounded to 8 bits | npz. All but png are exact; `fbpc evaluate
    --coreset` reads all."""
    out: str = ""
    """A new local file or folder; empty: exports/RUN-FORMAT in $FBPC_HOME, else in the current folder. safetensors and
    npz, each one file, get their suffix where the name lacks it; the others are folders."""


@dataclass(frozen=True)
class TuneArguments:
    """Sweep hyperparameters with Ray Tune, choose on the validation split, score the best once on the test split."""

    job: Job = field(default_factory=Job)
    sweep: Sweep = field(default_factory=Sweep)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class ReproduceArguments:
    """Make a table or figure of the paper from scratch; run the same command again to continue."""

    table: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """table1 | table2 | table3 | table5 | table6 | table7 | table8 | table9 | table10 | fig2a | fig2b | fig3 |
    grid | grid-cifar100 (every method by every --inference; not of the paper)."""
    scale: Literal["paper", "small"] = "small"
    """paper: its sizes, for a GPU; small: width 32, 5 experts of 6 epochs, at most 300 steps, for two CPU cores."""
    cifar10: str = "cifar10"
    """Data set in the place of CIFAR10, as --data takes it."""
    cifar100: str = "cifar100"
    """Data set in the place of CIFAR100."""
    tiny_imagenet: str = "tiny-imagenet"
    """Data set in the place of Tiny-ImageNet."""
    ipc: tuple[int, ...] = ()
    """Images per class; empty means those of the table at this scale."""
    distill_seeds: int = 0
    """Coresets for each cell; 0 means those of the scale (1 | 2)."""
    num_chains: int = 0
    """Chains for each coreset; 0 means those of the scale (5 | 3)."""
    only: tuple[str, ...] = ()
    """Only cells whose ROW/COLUMN contains one of these, e.g. FBPC/ or 'CIFAR100 ipc 1'."""
    override: tuple[str, ...] = ()
    """FLAG=VALUE for every cell, e.g. steps=100 width=64; the table's title names them."""
    corruptions: str = ""
    """Folder of the official CIFAR-10-C (table3, grid); empty generates the corruptions."""
    ood: str = ""
    """Data set whose test images are out of distribution (grid), as --data takes it; empty: no AUROC."""
    ood_resize: bool = False
    """Resize the images of --ood to the size of the data; as for `fbpc evaluate`."""
    coreset_row: tuple[str, ...] = ()
    """NAME=PATH (grid): a row NAME of a coreset that others made, soft labels too, as `evaluate --coreset` takes it."""
    whitening: tuple[str, ...] = ()
    """NAME=FILE (grid): the images of --coreset-row NAME are whitened (ZCA); an .npz file with mean (p,) and matrix
    (p, p), p = channels x height x width, that maps a normalised image x to (x - mean) matrix."""
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
    """Print how much is missing and a rough estimate of its time, and write nothing."""


@dataclass(frozen=True)
class ReportArguments:
    """Write one HTML page about a run, or about several beside each other; and the same as Markdown."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories of `distill`: folders, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."""
    out: str = "report.html"
    """The page; FILE.md and FILE-files/ lie beside it. An earlier report at this path is replaced, nothing else."""


@dataclass(frozen=True)
class UiArguments:
    """Serve MLflow's pages of the runs, on this machine alone: compare runs, see the images step by step."""

    port: int = 0
    """Port on 127.0.0.1; 0 means 5000, or a free one if 5000 is taken."""
    tracking_uri: str = ""
    """MLflow store; empty: the one that runs are logged to, MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in
    $FBPC_HOME, else in the current folder."""
    timeout: float = 0.0
    """Seconds to wait for the server's first answer; 0 waits as long as the server lives."""


@dataclass(frozen=True)
class DoctorArguments:
    """Check the installation and print how to fix each problem."""

    deep: bool = False
    """Also import Ray and compile a small library, and wait up to 3 minutes for each library; without, 15 s for all."""


KINDS: dict[str, tuple[type, ...]] = {
    "distill": (DistillArguments,), "experts": (ExpertArguments,), "evaluate": (EvaluateArguments, CoresetArguments),
    "export": (ExportArguments,), "tune": (TuneArguments,), "reproduce": (ReproduceArguments,),
    "report": (ReportArguments,), "ui": (UiArguments,), "doctor": (DoctorArguments,),
}  # fmt: skip
"""Command -> the classes of its arguments; `evaluate --coreset` has the second."""
