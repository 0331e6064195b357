"""Tables and figures of the paper, and the grid, as cells: a coreset, and the network that judges it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset, row_of, with_method
from fbpc_ray.distillation import network_pool
from fbpc_ray.reproduction import grid

METHODS = {
    "Random": "random",
    "BPC-rKL": "bpc-rkl",
    "BPC-fKL": "bpc-fkl",
    "BPC-W": "bpc-w",
    "FBPC-isotropic": "fbpc-isotropic",
    "FBPC": "fbpc",
}
"""Values of `--method` by the paper's names. The paper has BPC-W in no table; we add it to Table 1."""

NORMS = {"IN": "convnet-in", "GN": "convnet-gn", "LN": "convnet-ln", "BN": "convnet-bn"}
NETWORKS = {"ConvNet": "convnet-in", "ResNet18": "resnet18-in", "ResNet34": "resnet34-in", "VGG": "vgg11-in",
            "AlexNet": "alexnet", "LeNet": "lenet"}  # fmt: skip
DATA = {"CIFAR10": "cifar10", "CIFAR100": "cifar100", "Tiny-ImageNet": "tiny-imagenet"}
CONVNET = ("convnet-in",)


class Scale(NamedTuple):
    """Size of a reproduction."""

    changes: dict[str, Any]
    """Settings that differ from the paper's, by flag."""
    most_steps: int | None
    """Upper bound of --steps; if set, --start-epoch is lowered to the last epoch but one."""
    ipc: tuple[int, ...]
    """Images per class, for tables over several sizes."""
    one_ipc: int
    """Images per class, for tables of one size."""
    distill_seeds: int
    num_chains: int
    extra_images: int
    """Out-of-distribution images, and corrupted images, of a grid."""


SCALES = {
    "paper": Scale({}, None, (1, 10, 50), 10, 1, 5, 10_000),
    "small": Scale(
        {"width": 32, "expert_count": 5, "expert_epochs": 6, "real_batch_size": 64},
        300, (1, 10), 1, 2, 3, 1_000,
    ),
}  # fmt: skip


class Cell(NamedTuple):
    """One cell of a table, for one seed of the distillation."""

    row: str
    column: str
    config: Config
    """Settings of the distillation (method, data, networks, seed) and of the evaluation."""
    judged_on: str
    """Network that the coreset is evaluated on."""


class Request(NamedTuple):
    """Options of a reproduction that change its cells."""

    scale: Scale
    sources: dict[str, str]
    """{cifar10 | cifar100 | tiny-imagenet: a value of --data}."""
    ipc: tuple[int, ...]
    """Images per class; empty for those of the scale."""
    overrides: dict[str, Any]
    """Flags that change every cell, applied last."""
    base: Config
    """Settings of workers, output and experts."""

    @property
    def all_ipc(self) -> tuple[int, ...]:
        return self.ipc or self.scale.ipc

    @property
    def one_ipc(self) -> int:
        return self.ipc[0] if self.ipc else self.scale.one_ipc


class Table(NamedTuple):
    """A table or figure of the paper."""

    title: str
    kind: str
    """scores: of the coreset on the test split | grid: the same with out-of-distribution and corrupted images and CPU
    seconds | corruptions: SGHMC on corrupted test images | cost: memory and time of a step | logits: function values at
    one image | picture: images of the coreset."""
    quantities: tuple[str, ...]
    cells: Callable[[Request], list[Cell]]
    figure: str = "bars"
    """Picture of scores. bars: the first quantity | scatter: accuracy against ECE, columns being "ipc N, inference"."""


def _config(
    request: Request, data: str, ipc: int, method: str, architectures: Sequence[str] = CONVNET, augment: str = "dsa"
) -> Config:
    """Return the paper's settings, changed by the scale, then by the request."""
    config = with_method(preset(row_of(data, ipc)).updated(ipc=ipc), method, ipc)
    changes = request.scale.changes | request.overrides
    if method in network_pool.METHODS:  # they need no experts, and their cheap steps stay as they are
        changes = {name: value for name, value in changes.items() if name != "real_batch_size"} | request.overrides
    elif request.scale.most_steps:
        flat = config.flat() | changes
        steps, last = min(flat["steps"], request.scale.most_steps), max(1, flat["expert_epochs"] - 1)
        changes = {"steps": steps, "start_epoch": min(flat["start_epoch"], last)} | changes
    base = request.base
    config = config.updated(
        **changes | {"data": request.sources[data], "architectures": tuple(architectures), "augment": augment}
        | {"data_root": base.data.data_root, "download": base.data.download, "experts": base.experts.experts}
    )  # fmt: skip
    return replace(config, workers=base.workers)


def _table1(request: Request) -> list[Cell]:
    return [
        Cell(name, f"ipc {ipc}", _config(request, "cifar10", ipc, method), CONVNET[0])
        for ipc in request.all_ipc
        for name, method in METHODS.items()
    ]


def _table2(request: Request) -> list[Cell]:
    return [
        Cell(name, f"{title} ipc {ipc}", _config(request, DATA[title], ipc, METHODS[name]), CONVNET[0])
        for title in ("CIFAR100", "Tiny-ImageNet")
        for ipc in request.all_ipc
        for name in ("Random", "BPC-fKL", "FBPC")
    ]


def _table3(request: Request) -> list[Cell]:
    return [
        Cell(name, "", _config(request, "cifar10", request.one_ipc, METHODS[name]), CONVNET[0])
        for name in ("BPC-fKL", "FBPC")
    ]


def _table5(request: Request) -> list[Cell]:
    return [
        Cell(f"ipc {ipc}", column, _config(request, "cifar10", ipc, "fbpc"), NETWORKS[column])
        for ipc in request.all_ipc
        for column in ("ConvNet", "ResNet18", "ResNet34", "VGG", "AlexNet")
    ]


def _table6(request: Request) -> list[Cell]:
    rows = {"ResNet18": ("resnet18-in",), "ResNet18 + ConvNet": ("resnet18-in", "convnet-in")}
    return [
        Cell(row, f"on {column}", _config(request, "cifar10", request.one_ipc, "fbpc", networks), NETWORKS[column])
        for row, networks in rows.items()
        for column in ("ResNet18", "ConvNet")
    ]


def _table7(request: Request) -> list[Cell]:
    return [
        Cell(name, column, _config(request, "cifar10", request.one_ipc, METHODS[name], [network]), network)
        for column, network in ((c, NETWORKS[c]) for c in ("LeNet", "ConvNet", "ResNet18"))
        for name in ("FBPC", "BPC-fKL")
    ]


def _costs_by_ipc(request: Request) -> list[Cell]:
    return [
        Cell(name, f"ipc {ipc}", _config(request, "cifar10", ipc, METHODS[name]), CONVNET[0])
        for ipc in request.all_ipc
        for name in ("BPC-fKL", "FBPC")
    ]


def _table10(request: Request) -> list[Cell]:
    rows = [("BPC-fKL (no DSA)", "BPC-fKL", "none"), ("FBPC (no DSA)", "FBPC", "none"), ("FBPC (DSA)", "FBPC", "dsa")]
    return [
        Cell(row, f"ipc {ipc}", _config(request, "cifar10", ipc, METHODS[name], augment=augment), CONVNET[0])
        for ipc in request.all_ipc
        for row, name, augment in rows
    ]


def _fig2a(request: Request) -> list[Cell]:
    norms = tuple(NORMS.values())
    rows = {"WBPC-single": ("BPC-fKL", CONVNET), "FBPC-single": ("FBPC", CONVNET),
            "WBPC-multi": ("BPC-fKL", norms), "FBPC-multi": ("FBPC", norms)}  # fmt: skip
    return [
        Cell(row, norm, _config(request, "cifar10", request.one_ipc, METHODS[name], networks), network)
        for row, (name, networks) in rows.items()
        for norm, network in NORMS.items()
    ]


def _fig2b(request: Request) -> list[Cell]:
    config = _config(request, "cifar10", request.one_ipc, "fbpc", tuple(NORMS.values()))
    return [Cell(norm, "", config, network) for norm, network in NORMS.items()]


def _fig3(request: Request) -> list[Cell]:
    return [Cell("FBPC", "", _config(request, "cifar10", request.ipc[0] if request.ipc else 1, "fbpc"), CONVNET[0])]


def _grid(request: Request, data: str, sizes: tuple[int, ...]) -> list[Cell]:
    return [
        Cell(row, f"ipc {ipc}, {column}", grid.judged_by(config, column), CONVNET[0])
        for ipc in sizes
        for row, (method, changes) in grid.CORESETS.items()
        for config in [_config(request, data, ipc, method).updated(**changes)]
        for column in grid.INFERENCES
    ]


SCORES = ("accuracy", "nll")
GRID = (
    "accuracy", "nll", "ece", "brier", "ood_auroc_entropy", "corruption_accuracy", "make_seconds", "judge_seconds",
)  # fmt: skip
TABLES: dict[str, Table] = {
    "table1": Table("Table 1: test accuracy and NLL, CIFAR10", "scores", SCORES, _table1),
    "table2": Table("Table 2: test accuracy and NLL, CIFAR100 and Tiny-ImageNet", "scores", SCORES, _table2),
    "table3": Table("Table 3: corrupted test images", "corruptions", ("accuracy", "degradation"), _table3),
    "table5": Table("Table 5: FBPC distilled on ConvNet, judged on other networks", "scores", SCORES, _table5),
    "table6": Table("Table 6: FBPC distilled on ResNet18, alone and with ConvNet", "scores", SCORES, _table6),
    "table7": Table("Table 7: peak memory of a step, over networks", "cost", ("peak_gb", "parameters"), _table7),
    "table8": Table("Table 8: peak memory of a step, over ipc", "cost", ("peak_gb",), _costs_by_ipc),
    "table9": Table("Table 9: seconds per step, over ipc", "cost", ("seconds",), _costs_by_ipc),
    "table10": Table("Table 10: with and without DSA", "scores", SCORES, _table10),
    "fig2a": Table("Fig. 2a: distilled on one or four norms, judged on each", "scores", SCORES, _fig2a),
    "fig2b": Table("Fig. 2b: function values at one image, over networks", "logits", ("logit",), _fig2b),
    "grid": Table("Coresets and inference, CIFAR10", "grid", GRID, lambda r: _grid(r, "cifar10", r.all_ipc), "scatter"),
    "grid-cifar100": Table(
        "Coresets and inference, CIFAR100",
        "grid",
        GRID,
        lambda r: _grid(r, "cifar100", r.ipc or (1,)),
        "scatter",
    ),
    "fig3": Table("Fig. 3: the pseudocoreset", "picture", (), _fig3),
}


SET_BY_TABLES = ("data", "architectures", "method", "ipc", "seed", "augment", "val_every")
SET_BY_THE_COMMAND = ("num_chains", "data_root", "download", "experts", "out", "tracking", "experiment")


def set_by_table(name: str) -> tuple[str, ...]:
    """Return the settings that a table sets, so that no override can."""
    return (*SET_BY_TABLES, *(["inference"] if TABLES[name].kind == "grid" else []))


def cells_of(name: str, request: Request) -> list[Cell]:
    """Return the cells of a table for seed 0 of the distillation. Raises UserError for a bad override."""
    for flag in set_by_table(name):
        if flag in request.overrides:
            raise UserError(f"--override {flag}=...: the table sets {flag}; leave the override out")
    for flag in SET_BY_THE_COMMAND:
        if flag in request.overrides:
            raise UserError(f"--override {flag}=...: changes no cell; give --{flag.replace('_', '-')} itself")
    return TABLES[name].cells(request)


def positions(name: str) -> dict[tuple[str, str], int]:
    """Return {(row, column): its position} for the cells of a table, in the order in which it prints them."""
    request = Request(SCALES["paper"], {source: source for source in DATA.values()}, (), {}, Config())
    return {(cell.row, cell.column): index for index, cell in enumerate(TABLES[name].cells(request))}
