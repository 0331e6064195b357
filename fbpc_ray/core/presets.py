"""Presets: rows of Table 4, `digits`, defaults of each method; which data get chosen sizes."""

import json
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from fbpc_ray.core.config import Config, read_json
from fbpc_ray.core.durations import parse_duration
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.settings import Output, Workers
from fbpc_ray.core.sizes import LEVELS, SizeRequest
from fbpc_ray.core.storage import place


def _table4(data: str, ipc: int, T: int, gamma: float, lambda_x: float, lambda_u: float, N: int, alpha: int, B: int):
    return dict(  # noqa: C408
        data=data, ipc=ipc, start_epoch=T, gamma=gamma, lambda_x=lambda_x, lambda_u=lambda_u,
        steps=N, alpha=float(alpha), batch_size=B,
    )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    #                                                    T  gamma   l_x   l_u     N alpha     B
    "cifar10-ipc1":        _table4("cifar10", 1,         1, 0.01, 0.05, 0.01, 1000,  100,   10),
    "cifar10-ipc10":       _table4("cifar10", 10,        2,  0.1, 0.05, 0.01, 1000, 1000,  100),
    "cifar10-ipc50":       _table4("cifar10", 50,       10,  0.2, 0.05, 0.01, 1000, 1000,  500),
    "cifar100-ipc1":       _table4("cifar100", 1,        2,  0.1,  0.1,  0.1, 5000, 1000,  100),
    "cifar100-ipc10":      _table4("cifar100", 10,      40,  0.1,  0.1,  0.1, 5000, 1000, 1000),
    "cifar100-ipc50":      _table4("cifar100", 50,      20,  0.2, 0.01, 0.01,  300, 1000, 5000),
    "tiny-imagenet-ipc1":  _table4("tiny-imagenet", 1,   2,  0.1,  0.1,    3, 5000, 1000,  100),
    "tiny-imagenet-ipc10": _table4("tiny-imagenet", 10, 40,    1,  0.1,    3,  500, 1000,  100),
    "tiny-imagenet-ipc50": _table4("tiny-imagenet", 50, 40,    1,  0.1,    3,  500, 1000,  100),
    "digits": dict(  # noqa: C408
        data="digits", architectures=("convnet-in", "convnet-gn", "convnet-ln", "convnet-bn"), width=32, ipc=1,
        steps=60, alpha=10.0, batch_size=10, gamma=0.1, map_lr=0.005, lambda_x=0.05, lambda_u=0.01, start_epoch=5,
        expert_count=4, expert_epochs=20, expert_lr=0.05, expert_batch_size=64, real_batch_size=64,
    ),
}  # fmt: skip


TABLE_4_DATA = ("cifar10", "cifar100", "tiny-imagenet")
PAPER = "paper"
"""The --preset that takes the paper's sizes for any data: the row of Table 4, or the defaults of the settings."""


def preset(name: str) -> Config:
    """Return a preset, by its name in `PRESETS` or from a JSON file of {flag: value}. Raises UserError."""
    if name in PRESETS:
        return Config().updated(**PRESETS[name])
    if name.endswith(".json") or "/" in name:
        if (path := place(name)).exists():
            return read_json(path)
        raise UserError(f"--preset: file {name} not found; give the best.json of a sweep, or a name")
    raise UserError(f"--preset: got '{name}'; {closest(name, [*PRESETS, *LEVELS, PAPER])}")


def default(data: str | None, ipc: str | None, row: str, method: str | None) -> Config:
    """Return the configuration before flags: the preset `row`, else that of `data` and `ipc`, else the paper's.

    Raises UserError.

    Args:
        data: name of the data set; None: digits.
        ipc: images per class, as the command line has them; None: 1.
        row: name or file of a preset; a key of `LEVELS`, whose sizes are chosen later; PAPER; or "".
        method: a method other than the preset's brings its own settings.
    """
    count = int(ipc) if ipc and ipc.isdecimal() and len(ipc) < 19 else 1
    of_data = "digits" if not row and data in (None, "digits") else row_of(data or "", count)
    name = of_data if row in ("", PAPER) else "" if row in LEVELS else row
    base = preset(name) if name else Config()
    if method in (None, base.distillation.method):
        return base
    return with_method(base, method, count if ipc else base.distillation.ipc)


def row_of(data: str, ipc: int) -> str:
    """Return the row of Table 4 for `ipc` images per class of `data`, that of 1, 10 or 50 up to ipc; or ""."""
    return f"{data}-ipc{1 if ipc < 10 else 10 if ipc < 50 else 50}" if data in TABLE_4_DATA else ""


def size_request(data: str | None, row: str, budget: str | float, flags: Collection[str]) -> SizeRequest | None:
    """Return the request to choose sizes; None where a preset fixes them.

    Without --preset, sizes are chosen for data that is a path or arrays; cifar10 and other names of Table 4 have the
    paper's sizes, digits those of its preset. Raises UserError.
    """
    seconds = parse_duration(budget) if budget else 0.0
    if seconds and row:
        raise UserError(f"--time-budget chooses all sizes, and --preset {row} is given: leave out one of them")
    if seconds or row in LEVELS or (not row and data not in (None, "digits", *TABLE_4_DATA)):
        return SizeRequest(row, frozenset(flags), seconds)
    return None


def to_preset(config: Config) -> str:
    """Return the text of a preset file: the settings that make a result, without paths and machines."""
    left_out = {f.name for group in (Workers, Output) for f in fields(group)} - {"threads"} | {"data_root", "download"}
    return json.dumps({name: value for name, value in config.flat().items() if name not in left_out}, indent=2) + "\n"


def _bpc(max_start: int, syn_steps: int, inner_lr: float, **more: Any) -> dict[str, Any]:
    return dict(  # noqa: C408
        start_rule="before", start_epoch=max_start, syn_steps=syn_steps, inner_lr=inner_lr, alpha=1000.0, steps=5000,
    ) | more  # fmt: skip


BPC: dict[int, dict[str, Any]] = {1: _bpc(2, 50, 0.01), 10: _bpc(20, 30, 0.03), 20: _bpc(30, 30, 0.03)}
"""{ipc: settings of the weight-space baselines, from their paper's code}; 20 is for all ipc from 20."""

BPC_RKL: dict[int, dict[str, Any]] = {
    ipc: {"mc_samples": samples, "alpha": 1.0} for ipc, samples in ((1, 10), (10, 30), (20, 10))
}
"""{ipc: settings of the rKL alone}. alpha: its gradient scales with the number of real images; 1000 and 10 ruin the
images on CIFAR-10 [method]."""


def _vbpc(image_lr: float, lr_decay: int, label_scale: float, steps: int, target_scale: float) -> dict[str, Any]:
    return dict(  # noqa: C408
        image_lr=image_lr, label_lr=0.03, lr_decay=lr_decay, label_scale=label_scale, steps=steps, ridge=0.01,
        real_batch_size=256, inference="last-layer", net_label_scale=label_scale, net_ridge=0.01,
        net_target_scale=target_scale,
    )  # fmt: skip


VBPC: dict[int, dict[str, Any]] = {1: _vbpc(0.1, 100, 3.0, 3000, 1.0), 10: _vbpc(0.03, 200, 5.0, 2000, 1.4)}
"""{ipc: settings of vbpc}, chosen on a validation split of CIFAR-10 at width 32; 10 is for all ipc from 10."""

FREPO = {"ridge": 1e-6, "label_scale": 1.0, "net_label_scale": 1.0, "net_target_scale": 1.0}
"""Settings of frepo that differ from vbpc's: its own paper's, not tuned."""


def with_method(config: Config, method: str, ipc: int) -> Config:
    """Return `config` for another method, with the settings that it brings."""
    if method in ("vbpc", "frepo"):
        return config.updated(method=method, **VBPC[1 if ipc < 10 else 10] | (FREPO if method == "frepo" else {}))
    if not method.startswith("bpc-"):
        return config.updated(method=method)
    row = 1 if ipc < 10 else 10 if ipc < 20 else 20
    return config.updated(method=method, **BPC[row] | (BPC_RKL[row] if method == "bpc-rkl" else {}))


RECIPES: dict[str, dict[str, Any]] = {"paper": {}, "improved": {"views": 8, "learn_labels": True}}
"""{--recipe: settings beside the paper's}."""


def start_of(config: Config) -> tuple[str, Config]:
    """Return (name, preset) for the data set and ipc of a configuration; ("", defaults) if there is none."""
    data = config.data.data
    row = "digits" if data == "digits" else row_of(data, config.distillation.ipc)
    return (row, preset(row)) if row in PRESETS else ("", Config())
