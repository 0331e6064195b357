"""Register the drawings of `Coreset.plot` and `Prediction.plot`; the first one imports matplotlib."""

import numpy as np
from torch import Tensor

from fbpc_ray.core.drawing import draw_png
from fbpc_ray.core.errors import UserError
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import denormalise
from fbpc_ray.evaluation.ensemble import Prediction


@draw_png.register(Coreset)
def coreset_png(coreset: Coreset, title: str = "", max_per_class: int = 10, max_classes: int = 20) -> bytes:
    """Draw the images by class. Raises UserError for images that are neither grey nor in colour."""
    from fbpc_ray.reporting import image_grids

    for name, count in (("max_per_class", max_per_class), ("max_classes", max_classes)):
        if count < 1:
            raise UserError(f"{name}: must be 1 or more, got {count}")
    if coreset.image_shape[0] not in image_grids.PICTURED:
        raise UserError(f"images of {coreset.image_shape[0]} channels cannot be drawn: they must have 1 or 3 channels")
    pixels = denormalise(coreset.images, coreset.mean, coreset.std).numpy()
    return image_grids.coreset_png(
        pixels, coreset.labels.numpy(), coreset.classes, title, max_per_class, max_classes
    )  # fmt: skip


@draw_png.register(Prediction)
def prediction_png(prediction: Prediction, labels: Tensor | np.ndarray | None = None, title: str = "") -> bytes:
    """Draw the reliability diagram against true labels (n,), or without them a histogram of the uncertainties."""
    from fbpc_ray.reporting.charts import histograms, reliability
    from fbpc_ray.reporting.run_pictures import png_of

    if labels is not None:
        stats = {title or "prediction": prediction.stats(labels)}
        return png_of(lambda path: reliability.reliability_diagram(stats, path))
    entropy, mutual_information = prediction.entropy.numpy(), prediction.mutual_information.numpy()
    return png_of(
        lambda path: histograms.entropy_histogram(
            entropy, mutual_information, path, title, prediction.probabilities.shape[1], "uncertainty",
            ("entropy", "mutual information"),
        )
    )  # fmt: skip
