"""--resume where the files behind --data are not those that the run or the sweep began with."""

import pytest
from support.data_files import write_classes
from support.runs import SMALL_VBPC, distil, flags

from fbpc_ray.core.config import Config, Sweep
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.execution import session
from fbpc_ray.tuning import sweep
from fbpc_ray.tuning.plan import write_plan

CAUSES = (
    "the data has changed, a relative path is of another folder, or another version of a decoder or another kind of "
    "CPU read the files"
)


@pytest.fixture
def prints(tmp_path, monkeypatch, capsys):
    """Two folders of images of the same classes, `first` the current one; their fingerprints as `folder:.`."""
    result = []
    for number, name in enumerate(("second", "first")):
        write_classes(tmp_path / name, count=8, first=50 * number)
        monkeypatch.chdir(tmp_path / name)
        result.append(session.load_data(Config().updated(data="folder:.", validation=0.1), print).fingerprint)
    capsys.readouterr()
    return result[::-1]


def notes(text: str) -> list[str]:
    return [line for line in text.splitlines() if "training images" in line and line.startswith("note")]


def test_a_run_notes_that_its_images_have_changed_and_takes_the_new_ones(prints, tmp_path, monkeypatch, capsys):
    """Each change is noted, and an earlier checkpoint, which has no fingerprint, is taken as it was."""
    run = RunDirectory(tmp_path / "run")
    settings = SMALL_VBPC | {"architectures": ("convnet-in",), "num_chains": 1, "chain_epochs": 2, "chain_every": 1}
    config = Config().updated(**settings | {"steps": 1, "checkpoint_every": 1, "ipc": 1})
    resumed = ("--out", str(run.folder), "--resume", "--backend", "serial", "--steps")
    distil(*flags(config, data="folder:.", validation=0.1, backend="serial", out=str(run.folder)))
    assert run.read_fingerprint() == prints[0]
    capsys.readouterr()
    distil(*resumed, "2", "--dry-run")
    assert notes(capsys.readouterr().out) == []
    monkeypatch.chdir(tmp_path / "second")
    expected = (
        f"note: the training images of folder:. are not those of the run (fingerprint {prints[1]}, then {prints[0]}): "
        f"{CAUSES}; the run goes on with these images: stop it if it should not"
    )
    distil(*resumed, "2", "--dry-run")
    assert notes(capsys.readouterr().out) == [expected]
    assert run.read_fingerprint() == prints[0]
    distil(*resumed, "2")
    assert notes(capsys.readouterr().out) == [expected]
    assert run.read_fingerprint() == prints[1]
    opened = session.open_session(config.updated(data="folder:.", validation=0.1), print)
    state, rows = run.restore(opened.labels, opened.dataset.image_shape) or (None, [])
    assert state is not None and state.step == 2
    run.save(state, rows)  # as earlier code
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "first")
    distil(*resumed, "3", "--dry-run")
    assert run.read_fingerprint() == "" and notes(capsys.readouterr().out) == []


def test_a_sweep_notes_that_its_images_have_changed(small, prints, tmp_path, monkeypatch, capsys):
    folder, settings = tmp_path / "sweep", Sweep(grid=("alpha=1,10",))
    base = small.updated(data="folder:.", validation=0.1, out=str(folder))
    opened = sweep._prepare(base, settings, folder, False, False, False)
    write_plan(opened.folder, opened.plan, opened.base)
    sweep._prepare(opened.base, settings, folder, True, False, False)
    assert notes(capsys.readouterr().out) == []
    monkeypatch.chdir(tmp_path / "second")
    sweep._prepare(opened.base, settings, folder, True, False, False)
    assert notes(capsys.readouterr().out) == [
        f"note: the training images of folder:. are not those of the sweep (fingerprint {prints[1]}, then {prints[0]}):"
        f" {CAUSES}; the trials go on with these images: do not compare their scores with earlier ones"
    ]
    write_plan(opened.folder, opened.plan._replace(fingerprint=""), opened.base)  # as read from an earlier file
    sweep._prepare(opened.base, settings, folder, True, False, False)
    assert notes(capsys.readouterr().out) == []
