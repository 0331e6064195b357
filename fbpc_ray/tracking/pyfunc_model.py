"""MLflow model of posterior samples; MLflow copies this file into the model and runs it on loading.

In: images (n, c, h, w) uint8, as they are in an image file. Out: one row per image, its most probable class, the
probabilities of all classes, entropy and mutual information (nats). Weights come from a safetensors file: there is no
pickle in the model, and MLflow's own rule holds that who loads a model runs its code.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from fbpc_ray.evaluation import ensemble


class Posterior(PythonModel):
    """The model average of an `Ensemble`."""

    _skip_type_hint_validation = True  # MLflow would warn that there are none; the signature says what goes in

    def load_context(self, context: Any) -> None:
        path = Path(context.artifacts["samples"])
        self.samples = ensemble.load(path, (context.model_config or {}).get("network", ""))

    def predict(self, context, model_input, params=None):  # type: ignore[override]
        prediction = self.samples.predict(np.asarray(model_input))
        return pd.DataFrame({
            "class": [self.samples.classes[label] for label in prediction.labels.tolist()],
            "probabilities": prediction.probabilities.tolist(),
            "entropy": prediction.entropy.numpy(),
            "mutual_information": prediction.mutual_information.numpy(),
        })  # fmt: skip


set_model(Posterior())
