"""Hyperparameter sweeps with Ray Tune. Imports core to reporting."""

import fbpc_ray.execution.ray  # noqa: F401  sets what Ray reads from the environment as it is imported
