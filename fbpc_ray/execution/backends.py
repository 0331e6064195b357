"""Open the backend of a configuration: Ray, or this process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import Log
from fbpc_ray.core.settings import Workers
from fbpc_ray.core.signals import Interruption, deferred_interrupt
from fbpc_ray.distillation.worker import Backend
from fbpc_ray.execution.serial import Serial


@contextmanager
def open_backend(config: Config, interruption: Interruption, log: Log) -> Iterator[Backend]:
    """Open the backend of a configuration and catch signals; at the end, close it and give the signals back.

    Raises UserError.
    """
    opened: Backend | None = None
    try:
        with deferred_interrupt("Stopping once the backend has started"):
            opened = _backend(config.workers, interruption, log)
        interruption.install()
        yield opened
    finally:
        if opened:
            opened.close()
        interruption.uninstall()


def _backend(settings: Workers, interruption: Interruption, log: Log) -> Backend:
    """Make the backend of the settings. Raises UserError."""
    if settings.backend == "serial":
        return Serial(settings.device, interruption)
    if "ray" not in sys.modules:
        log("loading Ray ...")
    try:
        from fbpc_ray.execution.ray.ray_backend import RayBackend
    except ImportError as error:
        raise UserError(
            f"ray is not installed ({error}): pip install 'ray[default]', or use --backend serial"
        ) from None
    return RayBackend(settings, interruption, log)
