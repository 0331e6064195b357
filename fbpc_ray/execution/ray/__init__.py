"""The only folder that imports Ray. May import execution/serial.py and every room below execution."""

import os
import sys
from pathlib import Path


def set_environment() -> None:
    """Set the environment variables that Ray reads, unless the user has set them.

    Ray caches some of them when it is imported. If that has happened, and Ray is not connected yet, read them again.
    """
    if (
        any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        or (Path.home() / ".ray" / "auth_token").exists()
    ):
        # A cluster that was started where there is a token requires it; a driver sends it only in this mode.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # a driver under `uv run` would rebuild its workers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # hides the GPUs from a worker without a GPU
    ray = sys.modules.get("ray")
    if ray is not None and hasattr(ray, "is_initialized") and not ray.is_initialized():
        from ray import _raylet
        from ray._private import ray_constants

        use_uv = os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"].lower() in ("1", "true")  # as ray_constants.env_bool
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = use_uv
        _raylet.Config.initialize("")  # type: ignore[attr-defined]  the C++ copy of RAY_AUTH_MODE


set_environment()
