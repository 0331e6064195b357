"""Every setting, documented field by field; the command line's flags are made from these classes.

`PRESETS` are the rows of the paper's Table 4, plus `digits`, the small default that runs anywhere; a file can be one.
Values marked [paper] are the paper's; [method] are readings of what the paper leaves open.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.storage import Place, place


@dataclass(frozen=True)
class Data:
    """What is distilled."""

    data: str = "digits"
    """digits | cifar10 | cifar100 | tiny-imagenet | parquet:PATH | folder:PATH | npz:PATH."""
    data_root: str = "data"
    """Folder of the torchvision data sets and of tiny-imagenet-200."""
    download: bool = False
    """Fetch cifar10 or cifar100 into --data-root where it is missing."""
    normalisation: str = "auto"
    """Per-channel mean and std: auto (known or computed) | computed | cifar10 | cifar100 | tiny-imagenet."""
    validation: float = 0.0
    """Fraction of the training set held out, drawn by --data-seed and by class."""
    data_seed: int = 0
    """Seed of the validation split."""


@dataclass(frozen=True)
class Networks:
    """On what it is distilled."""

    architectures: tuple[str, ...] = ("convnet-in",)
    """One gradient worker each (Algorithm 1): convnet | vgg11 | resnet18 | resnet34, each with -in (as without suffix)
    | -gn | -ln | -bn | -none; lenet | alexnet; or MODULE:FUNCTION, your own function of ((c, h, w), classes) that
    returns a torch.nn.Module, importable from the current folder (give a changed network another name)."""
    width: int = 128
    """Channels of each ConvNet convolution [paper: 128]; the others, but lenet and your own, scale by width / 128."""
    depth: int = 0
    """Blocks of ConvNet; 0 means 3 at 32x32, 4 at 64x64 [paper], 2 at 8x8."""
    augment: Literal["dsa", "none"] = "dsa"
    """Augmentation, everywhere it acts [paper: dsa; none is its Table 10]."""


@dataclass(frozen=True)
class Experts:
    """Expert trajectories (App. C.1)."""

    experts: str = ""
    """Holds the experts of all data sets and architectures: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; empty
    means HOME/experts."""
    expert_count: int = 100
    """Trajectories for each architecture [paper: 100]."""
    expert_epochs: int = 50
    """Epochs of a trajectory, a snapshot each [paper: 50]."""
    expert_lr: float = 0.01
    """SGD learning rate, no momentum, no decay [paper: 0.01]."""
    expert_batch_size: int = 256
    """Images a batch [method]."""
    expert_dtype: Literal["float32", "float16"] = "float32"
    """How snapshots are stored; float16 halves the disk and moves Psi^(1/2) by 7e-5."""
    expert_seed: int = 0
    """Seed of the trajectories; runs with different --seed share experts."""


@dataclass(frozen=True)
class Distillation:
    """Algorithm 1. Letters are the paper's."""

    method: Literal["fbpc", "fbpc-isotropic", "bpc-fkl", "bpc-rkl", "bpc-w", "random"] = "fbpc"
    """fbpc | fbpc-isotropic (Psi = I, no K steps) | the weight-space baselines bpc-fkl, bpc-rkl, bpc-w, whose defaults
    are those of their own paper | random (real images, nothing is learned)."""
    ipc: int = 1
    """Images a class; m = ipc x classes."""
    steps: int = 1000
    """N: updates of the pseudocoreset [Table 4]."""
    seed: int = 0
    """Seed of the distillation: initial images and every draw."""
    alpha: float = 100.0
    """alpha: SGD learning rate of the pixels, in normalised pixel space [Table 4]."""
    momentum: float = 0.5
    """Momentum of that SGD [method]."""
    batch_size: int = 10
    """B: pseudocoreset images in one gradient; all of them where m <= B [Table 4]."""
    start_epoch: int = 1
    """T: experts are sampled from this epoch onwards [Table 4]."""
    start_rule: Literal["from", "before"] = "from"
    """from: epochs T..last [App. C.2]; before: epochs 0..T-1, the reading of earlier code."""
    gamma: float = 0.01
    """gamma: the MAP solve stops at this mean loss, nats an image [Table 4]."""
    map_lr: float = 0.001
    """Adam learning rate of the MAP solve [App. C.2]."""
    map_max_steps: int = 2000
    """Adam steps after which an unfinished MAP solve is taken as it is, and reported [method]."""
    map_init: Literal["prior", "warm"] = "prior"
    """Where a MAP solve begins: prior: at a draw of the prior [Algorithm 1]; warm: at one of --warm-pool-size earlier
    solutions, in turn: fewer steps, but not the paper's method."""
    warm_pool_size: int = 10
    """With --map-init warm: solutions kept for each architecture and draw, in the checkpoint too."""
    warm_pool_uses: int = 3
    """With --map-init warm: uses after which a solution is begun anew from the prior. More are faster, and worse."""
    posterior_steps: int = 30
    """K: SGD steps whose logits give Psi, Eq. 16 [App. C.2]."""
    lambda_x: float = 0.05
    """lambda_x: learning rate of the K steps on real images [Table 4]."""
    lambda_u: float = 0.01
    """lambda_u: learning rate of the K steps on the pseudocoreset [Table 4]."""
    real_batch_size: int = 256
    """Real images a step of the K steps [method]."""
    mc_samples: int = 30
    """S: Monte-Carlo draws, of logits in Eq. 17 [method], of weights in Eq. 7."""
    syn_steps: int = 50
    """bpc-*: SGD steps on the pseudocoreset from theta_0 to mu_u."""
    inner_lr: float = 0.01
    """bpc-*: learning rate of those steps; bpc-w learns it, from this value."""
    inner_alpha: float = 1e-5
    """bpc-w: learning rate of that learning rate."""
    weight_noise: float = 0.01
    """bpc-fkl, bpc-rkl: standard deviation of the weights under q_x and q_u, Eq. 6."""
    draws_per_step: int = 1
    """M: independent draws of (theta_x, theta_u) for each architecture and step, whose gradients are averaged; 1 is the
    paper, more use more workers."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Evaluation:
    """SGHMC on a coreset (Eq. 27, App. C.2)."""

    num_chains: int = 3
    """Chains for each architecture, one a seed; every seed's value is kept."""
    chain_epochs: int = 1000
    """Epochs of a chain [paper: 1000]."""
    chain_every: int = 100
    """A posterior sample every so many epochs [paper: 100]."""
    chain_eta: float = 0.03
    """eta: step size [paper: 0.03]."""
    chain_friction: float = 0.1
    """alpha of Eq. 27: friction [paper: 0.1]."""
    chain_d: float = 0.01
    """d x m of Eq. 27, d = 0.01 / m [paper: 0.01]."""
    chain_noise: Literal["consistent", "gradient", "literal"] = "consistent"
    """Reading of Eq. 27's noise by its variance: 2 alpha eta d | eta^2 2d | 2d (unstable) [method]."""
    chain_weight_decay: float = 0.05
    """Strength of the Gaussian prior: weight decay on the mean loss, times m as --chain-d is, so that one prior serves
    every ipc. Calibrated on the paper's Random rows [jobs/calibrate_sghmc.py]."""
    chain_augment: bool = True
    """Use --augment inside the chains too."""
    chain_batch_size: int = 256
    """Images a step where m is above --chain-full-batch [method]."""
    chain_full_batch: int = 500
    """Largest m for which a step takes all images at once [method]."""


@dataclass(frozen=True)
class Workers:
    """Where it runs. Nothing here changes a result, except --device, --threads and --compiled in the last bits, and
    --skip-stragglers."""

    backend: Literal["ray", "serial"] = "ray"
    """ray: one actor for each architecture and draw, or fewer that take turns where there is no room, here or on a
    cluster; serial: this process alone, to the same bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto | cpu | cuda. auto takes CUDA where a worker has it."""
    threads: int = 0
    """CPU threads of a gradient; 0 means half the cores of this machine / architectures. Part of the bits."""
    compiled: Literal["auto", "on", "off"] = "auto"
    """Compile the networks' passes for the CPU (kept in $FBPC_CACHE, else the user's cache folder); auto: where the run
    is long enough to earn it back. Part of the bits."""
    compiled_chains: Literal["auto", "on", "off"] = "auto"
    """The same for the passes of the chains that judge a coreset, and for their predictions."""
    trajectory_cache_gb: float = 20.0
    """Gigabytes of each node's disk, in the same place, that keep theta_x and its K steps for every run that shares the
    experts; 0: none."""
    address: str = ""
    """Ray cluster: empty joins RAY_ADDRESS or a running cluster, else starts one here; local always starts one."""
    gpus_per_actor: float = 0.0
    """GPUs of a gradient worker where the cluster has GPUs; 0 means one each where there are as many, else a fraction
    such that at most four share one."""
    cpus_per_actor: float = 0.0
    """CPUs of a gradient worker; 0 means one for each of its threads, one beside a GPU."""
    autoscale: bool = False
    """The cluster starts nodes by itself: wait for them (--placement-timeout) instead of refusing what it lacks now."""
    placement_timeout: float = 300.0
    """Seconds to wait for a first worker, or for a new one after the last was lost, before the run ends."""
    prefetch: int = 2
    """Steps whose theta_x and K steps workers to spare compute ahead; 0: none. Bounded by the object store, too."""
    step_deadline: float = 0.0
    """Seconds after which a worker that doesn't answer is replaced and its gradient asked again, with twice the time;
    0 means 20 times its longest answer so far and 300 at least, 1,800 for the first."""
    skip_stragglers: float = 0.0
    """Leave out a gradient that takes so many times its usual time, the others standing in for it; 0: wait. With it, a
    run depends on timing and doesn't repeat to the bit."""


@dataclass(frozen=True)
class Output:
    """What it leaves."""

    out: str = ""
    """Of the run: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; empty makes a new folder under HOME/outputs."""
    tracking: bool = True
    """Log to MLflow: MLFLOW_TRACKING_URI, else SQLite at HOME/mlflow.db."""
    experiment: str = "fbpc"
    """MLflow experiment."""
    val_every: int = 0
    """Steps between two evaluations on the validation split (val/nll and val/accuracy over the steps), by chains of a
    fifth of --chain-epochs; 0 means none, or in a sweep a quarter of --steps. Needs --validation."""


def _fitting(name: str, value: Any, kind: Any) -> Any:
    """`value` as a field of type `kind` holds it. Raises UserError where it doesn't fit."""
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UserError(f"--{name.replace('_', '-')} is {value!r}: {closest(str(value), list(get_args(kind)))}")
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(value)
    elif isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool):
        return kind(value)
    expected = "tuple" if get_origin(kind) is tuple else kind.__name__
    raise UserError(f"--{name.replace('_', '-')} is {value!r}: it must be of type {expected}")


@dataclass(frozen=True)
class Sweep:
    """What a sweep tries, and how it chooses. Trials see the training images and the validation split alone."""

    space: str = ""
    """MODULE:NAME of {flag: what to try}, importable from the current folder: domains of ray.tune (loguniform(1, 100),
    choice([...]), grid_search([...])), functions of the trial's other values, or plain values. Empty: T, gamma,
    lambda_x, lambda_u, N, alpha and B of Table 4, around the values of the preset and the flags."""
    grid: tuple[str, ...] = ()
    """FLAG=VALUE,VALUE ...: all combinations, instead of --space or on top of it; alone, each combination once."""
    num_trials: int = 0
    """Configurations drawn (of each combination of a grid), by --seed; 0 means 8, or 1 with --grid alone."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: a trial whose metric is worse than the median of those that came as far is stopped; none: all end."""
    metric: Literal["nll", "accuracy"] = "nll"
    """On the validation split, the mean over the architectures."""
    val_chain_epochs: int = 0
    """Epochs of a chain that scores a trial on the validation split; 0 means a fifth of --chain-epochs."""
    val_chains: int = 1
    """Chains for each architecture that score a trial on the validation split."""
    workers_per_trial: int = 0
    """Gradient workers of a trial; 0 means as many as leave room for all trials at once, and one at least."""


RENAMED = {
    "chain_steps": "chain_epochs", "eval_seeds": "num_chains", "x_cache": "trajectory_cache_gb", "map": "map_init",
    "map_pool": "warm_pool_size", "map_pool_uses": "warm_pool_uses",
    "samples": "num_trials", "evaluate_every": "val_every", "judge_chain_steps": "val_chain_epochs",
    "judge_seeds": "val_chains",
    "nll_of_samples": "mean_sample_nll", "nll_of_batches": "batch_nll",
}  # fmt: skip
"""{old: new} names of flags and metrics. Readers of files, and the command line, take both."""

RENAMED_VALUES: dict[str, dict[str, str]] = {"map": {"fresh": "prior", "pool": "warm"}}
"""{old name: {old: new} values}."""


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names of earlier code, and their values, by those of `RENAMED`. Raises UserError."""
    current = {}
    for name, value in values.items():
        new = RENAMED.get(name, name)
        if new in current or (new != name and new in values):
            raise UserError(f"'{name}' is the old name of '{new}', and both are given; leave out one")
        renamed = RENAMED_VALUES.get(name, {})
        current[new] = renamed.get(value, value) if isinstance(value, str) else value
    return current


def original_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `current_names`. Keys of stored results are computed over these names, so that they never change."""
    original = {}
    for name, value in values.items():
        old = OLD_NAMES.get(name, name)
        values_of_old = {new: before for before, new in RENAMED_VALUES.get(old, {}).items()}
        original[old] = values_of_old.get(value, value) if isinstance(value, str) else value
    return original


OLD_NAMES = {new: old for old, new in RENAMED.items()}


GROUPS = (Data, Networks, Experts, Distillation, Evaluation, Workers, Output)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: Data = field(default_factory=Data)
    networks: Networks = field(default_factory=Networks)
    experts: Experts = field(default_factory=Experts)
    distillation: Distillation = field(default_factory=Distillation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    workers: Workers = field(default_factory=Workers)
    output: Output = field(default_factory=Output)

    def flat(self) -> dict[str, Any]:
        """{flag: value} over all groups."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def updated(self, **values: Any) -> "Config":
        """Return a copy with flags changed, whichever group they are in; old names are taken too. Raises UserError."""
        known, values = self.flat(), current_names(values)
        for name in values:
            if name not in known:
                raise UserError(f"unknown setting '{name}': {closest(name, list(known))}")
        groups = {}
        for group in fields(self):
            current = getattr(self, group.name)
            hints = get_type_hints(type(current))
            mine = {name: _fitting(name, values[name], hints[name]) for name in hints if name in values}
            groups[group.name] = replace(current, **mine)
        return Config(**groups)


MAY_CHANGE_ON_RESUME = {
    *(
        f.name
        for group in (Evaluation, Workers, Output)
        for f in fields(group)
        if f.name not in ("threads", "device", "compiled")
    ),
    *("data_root", "download", "experts", "checkpoint_every", "steps"),
}
"""Flags that don't change the steps already taken."""

ELSEWHERE = {f.name for group in (Workers, Output) for f in fields(group)} | {
    "data_root", "download", "experts", "checkpoint_every",
}  # fmt: skip
"""Where it runs, what it reads and what it leaves: flags that change no result, but for its last bits."""


def from_word(word: str, option: str) -> tuple[str, str]:
    """FLAG=TEXT as (field, text); `option` is where it was given. Raises UserError for an unknown flag."""
    name, equals, text = word.partition("=")
    given, known = name.removeprefix("--").replace("-", "_"), list(Config().flat())
    name, renamed = RENAMED.get(given, given), RENAMED_VALUES.get(given, {})
    if not equals or name not in known:
        raise UserError(f"{option} {word}: write FLAG=VALUE; {closest(name, known)}")
    return name, ",".join(renamed.get(part, part) for part in text.split(","))


def from_text(name: str, text: str, said: str) -> Any:
    """`text` as a value of the flag `name`; `said` is what was given, for the error. Raises UserError."""
    default = Config().flat()[name]
    if isinstance(default, str):
        value: Any = text
    else:
        try:
            value = json.loads(text.lower() if isinstance(default, bool) else text)
        except ValueError:
            raise UserError(f"{said}: {text!r} is no {type(default).__name__}") from None
    Config().updated(**{name: value})
    return value


def to_json(config: Config) -> str:
    return json.dumps(config.flat(), indent=2) + "\n"


NOT_STARTED = "check the path, or start one without --resume"
"""What helps where --resume finds no run."""


def read_config(folder: Place, mend: str = "give what `fbpc distill` got as --out") -> Config:
    """The configuration of the run in `folder`. Raises UserError, with `mend`, where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (no config.json): {mend}")
    return from_json(path.read_bytes(), str(path))


def started(folder: str) -> bool:
    """Whether there is a run in `folder`, whole or not."""
    return (place(folder) / "config.json").is_file()


def refuse_unasked(stored: Config, given: Set[str], source: str) -> None:
    """Raise UserError where a configuration out of a file would have code run that nobody asked for: a network by its
    import path, or a cluster to connect to, whose answers are unpickled. `given` are the flags on the command line.
    """
    for name, words in never_from_a_file(stored).items():
        if name not in given:
            what = "imports no code" if name == "architectures" else "connects to no Ray cluster"
            raise UserError(f"{source} asks for {' '.join(words)}, but a file alone {what}: repeat it if you trust it")


def never_from_a_file(config: Config) -> dict[str, list[str]]:
    """{flag: its words} of what `refuse_unasked` wants repeated."""
    names, address = config.networks.architectures, config.workers.address
    own = any(":" in name for name in names)
    found = {"architectures": ["--architectures", *names]} if own else {}
    return found | ({"address": ["--address", address]} if address not in ("", "local") else {})


def from_json(text: str | bytes, source: str) -> Config:
    """The inverse of `to_json`; `source` names the file in errors. Raises UserError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a configuration: it must hold one JSON object; restore or delete it")
    try:
        return Config().updated(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
