"""Read what an MLflow run holds."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fbpc_ray.tracking.tracker import MlflowClient

PICTURE = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def images(client: MlflowClient, run_id: str) -> list[str]:
    """Names of the full pictures, up to the time stamp, in order."""
    return sorted(
        Path(file.path).name.split("+timestamp")[0]
        for file in client.list_artifacts(run_id, "images")
        if file.path.endswith(".png")
    )


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
