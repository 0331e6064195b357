"""Configuration of a run: its settings together, as JSON, and the aliases of renamed flags."""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fbpc_ray.core import inputs
from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.ranges import INTEGER
from fbpc_ray.core.settings import Data, Distillation, Evaluation, Experts, Networks, Output, Workers
from fbpc_ray.core.storage import Place, place

NUMBERS: dict[Any, Any] = {int: Integral, float: Real}
"""Type of a setting -> what it may be given as: numpy's numbers, too."""


def _cast(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as the type `kind` of the field `name`. Raises UserError if it is of another type."""
    flag, accepted = f"--{name.replace('_', '-')}", NUMBERS.get(kind, kind)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UserError(f"{flag}: got {value!r}; {closest(str(value), list(get_args(kind)))}")
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
        if kind is int and not INTEGER.holds(value):
            raise UserError(f"{flag}: must be an integer of 64 bits, got one of {len(str(abs(value))[:4300])} digits")
        try:
            return kind(value)
        except OverflowError:
            raise UserError(f"{flag}: must be a finite number, got an integer that is too large") from None
    expected = "tuple" if get_origin(kind) is tuple else kind.__name__
    raise UserError(f"{flag}: must be of type {expected}, got {value!r}")


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep. They use the training and the validation split, and no test image."""

    space: str = ""
    """MODULE:NAME of the search space, a dict of flags, importable from the current folder. Its values are domains of
    ray.tune (loguniform(1, 100), choice([...]), grid_search([...])), functions of the trial's other values, or plain
    values. Empty: T, gamma, lambda_x, lambda_u, N, alpha and B of Table 4, around the values of preset and flags; for
    vbpc and frepo --image-lr, --label-lr, --label-scale and --ridge."""
    grid: tuple[str, ...] = ()
    """FLAG=VALUE,VALUE ...: all combinations, instead of --space or on top of it; alone, each combination once."""
    num_trials: int = 0
    """Configurations drawn (of each combination of a grid), by --seed; 0 means 8, or 1 with --grid alone."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: stop a trial whose metric is worse than the median of the trials at the same step; none: finish all."""
    metric: Literal["nll", "accuracy"] = "nll"
    """Score on the validation split by which the best trial is chosen, the mean over the architectures."""
    val_chain_epochs: int = 0
    """Epochs of a chain that scores a trial on the validation split; 0 means a fifth of --chain-epochs."""
    val_chains: int = 1
    """Chains for each architecture that score a trial on the validation split."""
    workers_per_trial: int = 0
    """Gradient workers of a trial; 0 means as many as fit if all trials run at once, at least one."""


RENAMED = {
    "chain_steps": "chain_epochs", "eval_seeds": "num_chains", "x_cache": "trajectory_cache_gb", "map": "map_init",
    "map_pool": "warm_pool_size", "map_pool_uses": "warm_pool_uses",
    "samples": "num_trials", "evaluate_every": "val_every", "judge_chain_steps": "val_chain_epochs",
    "judge_seeds": "val_chains",
    "nll_of_samples": "mean_sample_nll", "nll_of_batches": "batch_nll",
}  # fmt: skip
"""{old: new} names of flags and metrics. Readers of files, and the command line, take both."""

OLD_NAMES = {new: old for old, new in RENAMED.items()}

RENAMED_SWITCHES = {
    "again": ("resume", "auto"), "no_again": ("resume", "no"), "no_resume": ("resume", "no"),
    "tune_chain": ("protocol", "calibrated"), "no_tune_chain": ("protocol", "paper"),
}  # fmt: skip
"""{flag without a value: (flag, value) in its place}. The command line takes both."""

PRIOR_PRECISION = "prior_precision"
"""Was `precision` until that became the number format of passes: a number by that name is the prior's."""

RENAMED_VALUES: dict[str, dict[str, str]] = {"map": {"fresh": "prior", "pool": "warm"}}
"""{old name: {old: new} values}."""


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names of earlier code, and their values, by those of `RENAMED`. Raises UserError."""
    current = {}
    for name, value in values.items():
        new = PRIOR_PRECISION if name == "precision" and not isinstance(value, str) else RENAMED.get(name, name)
        if new in current or (new != name and new in values):
            raise UserError(f"'{name}' is the old name of '{new}', and both are given; leave out one")
        renamed = RENAMED_VALUES.get(name, {})
        current[new] = renamed.get(value, value) if isinstance(value, str) else value
    return current


def original_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `current_names`. Keys of stored results are computed over these names, so that they never change."""
    original = {}
    for name, value in values.items():
        old = {PRIOR_PRECISION: "precision", "precision": "pass_precision"}.get(name, OLD_NAMES.get(name, name))
        values_of_old = {new: before for before, new in RENAMED_VALUES.get(old, {}).items()}
        original[old] = values_of_old.get(value, value) if isinstance(value, str) else value
    return original


GROUPS = (Data, Networks, Experts, Distillation, Evaluation, Workers, Output)


@dataclass(frozen=True)
class Config:
    """All settings of a run, in their groups."""

    data: Data = field(default_factory=Data)
    networks: Networks = field(default_factory=Networks)
    experts: Experts = field(default_factory=Experts)
    distillation: Distillation = field(default_factory=Distillation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    workers: Workers = field(default_factory=Workers)
    output: Output = field(default_factory=Output)

    def flat(self) -> dict[str, Any]:
        """Return {flag: value} over all groups."""
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
            changes = {name: _cast(name, values[name], hints[name]) for name in hints if name in values}
            groups[group.name] = replace(current, **changes)
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
"""Flags of machines, paths and output, which change no more than the last bits of a result."""


def from_word(word: str, option: str) -> tuple[str, str]:
    """Split FLAG=TEXT, a value of `option`, into (field, text). Raises UserError for an unknown flag."""
    name, equals, text = word.partition("=")
    flag, known = name.removeprefix("--").replace("-", "_"), list(Config().flat())
    name, renamed = RENAMED.get(flag, flag), RENAMED_VALUES.get(flag, {})
    if not equals or name not in known:
        raise UserError(f"{option} {word}: must be FLAG=VALUE; {closest(name, known)}")
    return name, ",".join(renamed.get(part, part) for part in text.split(","))


def from_text(name: str, text: str, source: str) -> Any:
    """Parse `text` as a value of the flag `name`; errors begin with `source`. Raises UserError."""
    default = Config().flat()[name]
    if isinstance(default, str):
        value: Any = text
    else:
        try:
            value = inputs.parse_json(text.lower() if isinstance(default, bool) else text)
        except ValueError:
            raise UserError(f"{source}: must be of type {type(default).__name__}, got {text!r}") from None
    Config().updated(**{name: value})
    return value


def to_json(config: Config) -> str:
    """Return the text of config.json, without its checksum."""
    return json.dumps(config.flat(), indent=2) + "\n"


NOT_STARTED = "check the path, or start one without --resume"
"""Fix for a --resume that finds no run."""


def read_config(folder: Place, fix: str = "give the --out of `fbpc distill`") -> Config:
    """Read the configuration of the run in `folder`. Raises UserError, which ends with `fix`, if there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run (no config.json): {fix}")
    return read_json(path)


def read_json(path: Place) -> Config:
    """Read a configuration or a preset. Raises UserError."""
    try:
        data = inputs.read_bytes(path, inputs.MAX_JSON_BYTES)
    except ValueError as error:
        raise UserError(f"{path} is not a configuration ({error}); restore it") from None
    return from_json(data, str(path))


def started(folder: str) -> bool:
    """Return whether `folder` holds a run, finished or not."""
    return (place(folder) / "config.json").is_file()


def refuse_unasked(stored: Config, flags: Set[str], source: str) -> None:
    """Raise UserError if a stored configuration has code or a destination that the command line doesn't name.

    Such are a network with an import path, a cluster, whose answers are unpickled, and an object store, which gets the
    user's credentials.

    Args:
        flags: Flags on the command line.
        source: The file that holds `stored`.
    """
    for name, words in never_from_a_file(stored).items():
        if name not in flags:
            text = redacted(" ".join(words))
            raise UserError(
                f"{source} asks for {text}, but a file alone {UNASKED[name]}: repeat it on the command line if you "
                "trust the file"
            )


UNASKED = {
    "architectures": "imports no code", "address": "connects to no Ray cluster",
    **dict.fromkeys(("experts", "initial_coreset", "out"), "opens no object store"),
}  # fmt: skip
"""{flag of `never_from_a_file`: what `refuse_unasked` keeps a file from}."""


def never_from_a_file(config: Config) -> dict[str, list[str]]:
    """Return {flag: words} of the settings that `refuse_unasked` wants on the command line."""
    names, address = config.networks.architectures, config.workers.address
    paths = {
        "experts": config.experts.experts, "initial_coreset": config.distillation.initial_coreset,
        "out": config.output.out,
    }  # fmt: skip
    words = {}
    if any(":" in name for name in names):
        words["architectures"] = ["--architectures", *names]
    if address not in ("", "local"):
        words["address"] = ["--address", address]
    return words | {
        name: [f"--{name.replace('_', '-')}", text] for name, text in paths.items() if "://" in text
    }  # fmt: skip


def from_json(text: str | bytes, source: str) -> Config:
    """Invert `to_json`; `source` names the file in errors. Raises UserError."""
    try:
        values = inputs.parse_json(text)
    except ValueError as error:
        raise UserError(f"{source} is not a configuration: must be one JSON object ({error}); restore it") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a configuration: must be one JSON object; restore it")
    try:
        values = inputs.without_checksum(values)
    except ValueError as error:
        raise UserError(
            f"{source}: {error}; restore the file or, if you edited it, delete the line with its checksum"
        ) from None
    try:
        return Config().updated(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
