"""`Tracker`, the interface of every tracking store."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from fbpc_ray.core.storage import Place


class Tracker(Protocol):
    """A run in a tracking store. No method raises because of the store."""

    @property
    def run_id(self) -> str | None:
        """Id of the run; None until the store has answered."""
        ...

    @property
    def uri(self) -> str:
        """Address of the store; empty without one."""
        ...

    @property
    def in_store(self) -> bool:
        """Whether the store has the run."""
        ...

    @property
    def delivered(self) -> bool:
        """Whether the store has the end of the run and every record."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait until the run has an id, `seconds` at most; return whether it has one."""
        ...

    def log_metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log an image (h, w, 3) uint8 of a series."""
        ...

    def log_artifact(self, path: Place, folder: str | None = None) -> None: ...

    def log_dataset(self, name: str, source: str, images: np.ndarray, labels: np.ndarray, context: str) -> None: ...

    def set_tags(self, values: Mapping[str, str]) -> None: ...

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        ...


class NullTracker:
    """A tracker that logs nothing."""

    run_id: str | None = None
    uri: str = ""
    in_store: bool = False
    delivered: bool = False

    def wait(self, seconds: float) -> bool:
        return False

    def log_metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def log_image(self, key: str, image: np.ndarray, step: int) -> None: ...

    def log_artifact(self, path: Place, folder: str | None = None) -> None: ...

    def log_dataset(self, name: str, source: str, images: np.ndarray, labels: np.ndarray, context: str) -> None: ...

    def set_tags(self, values: Mapping[str, str]) -> None: ...

    def finish(self, status: str) -> None: ...
