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
    "FBPC improved": Coreset("fbpc", RECIPES["improved"]),
    "FRePo": Coreset("frepo", {}),
    "VBPC": Coreset("vbpc", {}),
}

INFERENCES: dict[str, dict[str, Any]] = {
    "SGHMC": {"inference": "sghmc"},
    "cold SGHMC": {"inference": "sghmc", "chain_d": 0.0, "chain_init": 0.1},
    "last layer": {"inference": "last-layer"},
    "one network": {"inference": "mse"},
    "ensemble": {"inference": "ensemble"},
}
"""{column: settings of the evaluation}. Cold SGHMC has no noise (d = 0) and weight decay 5e-4 on the mean loss."""

COLD_DECAY = 5e-4
"""Weight decay of cold SGHMC on the mean loss, for each image of the coreset."""


def judged_by(config: Config, inference: str, classes: int) -> Config:
    """Return `config` with the settings of a column of the grid."""
    changes = dict(INFERENCES[inference])
    if inference == "cold SGHMC":
        changes["chain_weight_decay"] = COLD_DECAY * classes * config.distillation.ipc
    return config.updated(**changes)
