"""What Ray reads from the environment is the same whichever of the two packages is imported first."""

import shutil
import subprocess
import sys
import tempfile

import pytest
from support.processes import processes_naming, soon
from support.runs import ENVIRONMENT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

START = """
import {first}
import {second}
from ray._private import ray_constants
from ray._raylet import AuthenticationMode, get_authentication_mode
from fbpc_ray.core.config import Workers
from fbpc_ray.core.signals import Interruption
from fbpc_ray.execution.ray.ray_backend import RayBackend

backend = RayBackend(Workers(address="local", device="cpu"), Interruption(), num_cpus=1, object_store_memory=80_000_000)
backend.close()
print("started", get_authentication_mode() == AuthenticationMode.TOKEN, ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)
"""


def environment_with_token(home, ray_folder: str) -> dict[str, str]:
    """The environment of a user who has a token in ~/.ray/auth_token and has set no variable of Ray."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")}
    return environment | {"HOME": str(home), "RAY_TMPDIR": ray_folder}


@pytest.mark.parametrize("first, second", [("ray", "fbpc_ray.execution.ray"), ("fbpc_ray.execution.ray", "ray")])
def test_a_local_cluster_starts_in_either_order_of_the_imports(tmp_path, first, second):
    """With a token: Ray copies RAY_AUTH_MODE as it is imported, and its cluster reads the variable as it starts."""
    ray_folder = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    try:
        process = subprocess.run(
            [sys.executable, "-c", START.format(first=first, second=second)], capture_output=True, text=True,
            timeout=300, env=environment_with_token(tmp_path, ray_folder),
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert process.stdout.split()[-3:] == ["started", "True", "False"]
        assert soon(lambda: not processes_naming(ray_folder))
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
