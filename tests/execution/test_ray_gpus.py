"""Ray workers that share a GPU, a simulated one: the bits of one process without a GPU."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from support import simulated_gpu
from support.runs import assert_same, run_on, train_experts

from fbpc_ray.core.config import Workers
from fbpc_ray.core.signals import Interruption
from fbpc_ray.execution.ray.ray_backend import RayBackend
from fbpc_ray.execution.serial import Serial

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def one_gpu():
    """A backend on a cluster of two CPUs and a GPU."""
    folder = tempfile.mkdtemp(prefix="fr", dir="/tmp")  # short: Ray puts sockets under it
    path = os.pathsep.join(
        [str(Path(simulated_gpu.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    backend = RayBackend(
        Workers(address="local", device="auto"), Interruption(), num_cpus=2, num_gpus=1, include_dashboard=False,
        _temp_dir=folder, object_store_memory=200_000_000,
        runtime_env={"worker_process_setup_hook": "support.simulated_gpu.enter", "env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip
    yield backend
    backend.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_on_one_gpu_give_the_bits_of_the_cpu(one_gpu, small, digits, tmp_path):
    def trained_and_distilled(backend, folder):
        own = {"experts": str(folder / "experts"), "architectures": ("convnet-in", "convnet-bn"), "augment": "none"}
        config = small.updated(**own)
        train_experts(config, digits, backend)
        return run_on(backend, config, digits, folder)

    assert one_gpu.device == "cuda" and one_gpu.need(2, 1).gpus == 0.5
    assert one_gpu.describe() == "simulated GPU; 1 Ray node, 2 CPU, 1 GPU"
    ours = trained_and_distilled(one_gpu, tmp_path / "ray")
    assert_same(ours, trained_and_distilled(Serial("cpu", Interruption()), tmp_path / "serial"))
