"""The only folder that imports Ray. Ray reads its environment as it is imported, so what it must know is set here."""

import os
from pathlib import Path

if (
    any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    or (Path.home() / ".ray" / "auth_token").exists()
):
    # A cluster started where there is a token asks for it, but a driver sends it only when told to.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # a driver under `uv run` would rebuild its workers
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without a GPU sees none
