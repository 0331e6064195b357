"""Function-space Bayesian pseudocoresets on Ray: `from fbpc_ray import dataset, distill, posterior`.

The public functions and classes are those of `fbpc_ray.api`. Importing this package imports no torch: the first use of
a public name does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fbpc_ray.api import (
        Coreset,
        Dataset,
        Ensemble,
        Prediction,
        UserError,
        auroc,
        dataset,
        distill,
        evaluate,
        load_coreset,
        load_posterior,
        posterior,
        save,
        save_model,
    )

__version__ = "0.1.0"

__all__ = [
    "Coreset", "Dataset", "Ensemble", "Prediction", "UserError",
    "auroc", "dataset", "distill", "evaluate", "load_coreset", "load_posterior", "posterior", "save",
    "save_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fbpc_ray import api

    value = globals()[name] = getattr(api, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
