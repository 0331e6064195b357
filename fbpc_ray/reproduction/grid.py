"""The grid: coresets of every method, each judged by every kind of inference. No table of the paper."""

from typing import Any, NamedTuple

from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import RECIPES


class Coreset(NamedTuple):
    """A row of the grid."""

    method: str
    """Of `--method`."""
    changes: dict[str, Any]
    """Settings beside the method's own."""


CORESETS: dict[str, Coreset] = {
    "Random": Coreset("random", {}),
    "BPC-fKL": Coreset("bpc-fkl", {}),
    "BPC-W": Coreset("bpc-w", {}),
    "FBPC": Coreset("fbpc", {}),
    "FBPC, averaged images": Coreset("fbpc", {"views": 4, "image_average": 0.98}),
    "FBPC, learned labels": Coreset("fbpc", {"learn_labels": True}),
    "FBPC improved": Coreset("fbpc", RECIPES["improved"]),
    "FRePo": Coreset("frepo", {}),
    "VBPC": Coreset("vbpc", {}),
}

INFERENCES: dict[str, dict[str, Any]] = {
    "SGHMC": {"inference": "sghmc"},
    "SGHMC, strong prior": {"inference": "sghmc", "chain_weight_decay": 3.0},
    "last layer": {"inference": "last-layer"},
    "one network": {"inference": "mse"},
    "ensemble": {"inference": "ensemble"},
}
"""{column: settings}. Of the priors that `--protocol calibrated` tries, 3 has the lowest NLL on random images."""


def judged_by(config: Config, inference: str) -> Config:
    """Return `config` with the settings of a column of the grid."""
    return config.updated(**INFERENCES[inference])
