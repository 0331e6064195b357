"""Where it runs: jobs that are submitted, stopped and submitted again; the files for `ray up` and KubeRay."""

import pytest
import torch
from conftest import flags
from test_run import distil, images_of, refused, start, wait_for

from fbpc_ray.run import Run


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run of 12 steps without any trouble, on the serial backend."""
    folder = tmp_path_factory.mktemp("deploy") / "whole"
    distil(*flags(small, backend="serial", steps=12, out=str(folder)))
    return folder


def test_the_same_command_starts_goes_on_and_is_done(whole, small, tmp_path, capsys):
    """--again, killed with -9 amid the run, then twice to the end: a job that is repeated needs no other command."""
    folder = tmp_path / "again"
    words = [*flags(small, backend="serial", steps=12, threads=0, out=str(folder), checkpoint_every=2), "--again"]
    process = start("distill", *words)
    wait_for(Run(folder).state_path, process)
    process.kill()
    process.communicate()
    assert not Run(folder).result_path.exists()
    distil(*words)
    assert "resumed at step" in capsys.readouterr().out
    assert torch.equal(images_of(folder), images_of(whole))
    before = Run(folder).result_path.stat().st_mtime_ns
    distil(*words)
    assert "this run is complete" in capsys.readouterr().out
    assert Run(folder).result_path.stat().st_mtime_ns == before


def test_again_goes_on_where_nothing_but_the_configuration_is(whole, small, tmp_path):
    """Killed before its first checkpoint; and while the configuration was written, of which a kill leaves a part."""
    folder = tmp_path / "early"
    words = flags(small, backend="serial", steps=12, out=str(folder))
    Run(folder).folder.mkdir()
    (folder / ".config.json.0a1b2c3d.tmp").write_text("{")
    distil(*words, "--again")
    assert torch.equal(images_of(folder), images_of(whole))
    for path in (Run(folder).state_path, Run(folder).metrics_path, Run(folder).result_path):
        path.unlink()
    distil(*words, "--again")
    assert torch.equal(images_of(folder), images_of(whole))


def test_again_is_refused_without_a_folder_or_with_another_configuration(whole, small, capsys):
    assert "--out DIR" in refused(capsys, "--again", "--backend", "serial")
    words = flags(small, backend="serial", steps=12, out=str(whole), alpha=3.0)
    assert "--alpha was 10.0, now 3.0" in refused(capsys, *words, "--again")


def test_again_goes_on_with_a_preset_too(small, tmp_path, capsys):
    """What the preset and the flags say is compared with what the run began with."""
    folder = tmp_path / "preset"
    changed = flags(small, backend="serial", steps=2, out=str(folder))
    distil("--preset", "digits", *changed, "--again")
    distil("--preset", "digits", *changed, "--again")
    assert "this run is complete" in capsys.readouterr().out
    assert "--data was" in refused(capsys, "--preset", "cifar10-ipc1", "--again", "--out", str(folder))
