"""An evaluation of one coreset called x."""

import numpy as np

from fbpc_ray.core.config import Evaluation
from fbpc_ray.data.datasets import Dataset, Split
from fbpc_ray.evaluation.chains import CoresetArrays, EvaluationContext, evaluation_context


def context_of(
    dataset: Dataset, split: str, settings: Evaluation, images: np.ndarray, labels: np.ndarray,
    ood: Split | None = None, compiled: str = "off",
) -> EvaluationContext:  # fmt: skip
    """Collect what the chains on the coreset (images, labels) share, with DSA."""
    return evaluation_context(dataset, split, settings, "dsa", {"x": CoresetArrays(images, labels)}, ood, compiled)
