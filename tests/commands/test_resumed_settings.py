"""Settings that --resume takes from config.json where the command leaves them open: those that change last bits."""

import pytest

from fbpc_ray.commands import distill
from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.run_directory import RunDirectory

STORED = {"threads": 3, "compiled": "on", "memory_budget": "6GB", "chunk_images": 7}
OPEN = {"threads": 0, "compiled": "auto", "chunk_images": 0}


@pytest.fixture
def stored(small, tmp_path):
    """A run's configuration, as another machine has written it."""
    config = small.updated(**STORED, out=str(tmp_path))
    RunDirectory(tmp_path).write_config(config)
    return config


def test_a_machine_with_other_cores_compiler_and_memory_goes_on_with_the_stored_values(stored):
    _, config = distill._open_run(stored.updated(**OPEN), resume=True)
    assert {name: config.flat()[name] for name in STORED} == STORED


@pytest.mark.parametrize("change", [{"chunk_images": 5}, {"memory_budget": ""}, {"seed": 8}])
def test_another_value_that_is_given_is_refused(stored, change):
    (name,) = change
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was"):
        distill._open_run(stored.updated(**change), resume=True)
