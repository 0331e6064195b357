"""Runs that are refused: bad input, folders that hold another run, files that are damaged."""

import shutil
from pathlib import Path

import pytest
import torch
from support.data_files import write_classes
from support.runs import flags, refused

from fbpc_ray.commands import distill, main
from fbpc_ray.core.config import to_json
from fbpc_ray.distillation.run_directory import RunDirectory


def test_a_run_that_began_at_the_same_time_and_is_through_is_not_overwritten(small, tmp_path, monkeypatch, capsys):
    """Both found an empty folder; the other loaded its data, ran and left while this one loads its own."""
    folder, open_session = tmp_path / "run", distill.open_sized_session
    chains = {"num_chains": 1, "chain_epochs": 2, "chain_every": 1, "architectures": ("convnet-in",)}
    words = flags(small, backend="serial", method="random", out=str(folder), **chains)

    def slow(*arguments, **options):
        monkeypatch.undo()
        main.main(["distill", *words])
        before.update({path: path.stat().st_ino for path in folder.rglob("*")})
        return open_session(*arguments, **options)

    before: dict[Path, int] = {}
    monkeypatch.setattr(distill, "open_sized_session", slow)
    with pytest.raises(SystemExit):
        main.main(["distill", *words])
    assert capsys.readouterr().err.endswith(
        f"error: {folder} is not empty: pass --resume to go on with it, or another --out\n"
    )
    assert before == {path: path.stat().st_ino for path in folder.rglob("*")}
    assert RunDirectory(folder).result_path in before


def test_a_folder_that_is_removed_as_one_looks_into_it_is_free(tmp_path, monkeypatch):
    """By another run, which came to no good end and leaves no empty folder behind."""
    look = Path.iterdir

    def late(path):
        path.rmdir()
        return look(path)

    monkeypatch.setattr(Path, "iterdir", late)
    RunDirectory(tmp_path).refuse_if_taken()
    assert not tmp_path.exists()


def test_a_file_as_out_is_refused_as_such(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    message = refused(capsys, *SERIAL, "--method", "random", "--out", str(tmp_path / "run"))
    assert message == f"error: {tmp_path / 'run'} is a file: give a folder as --out"
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_run_without_a_validation_split_is_not_evaluated_on_it(finished_run, dry, capsys):
    """Refused before an MLflow run is made."""
    before = set(finished_run.rglob("*"))
    words = (str(finished_run), "--backend", "serial", "--split", "validation", *dry)
    message = refused(capsys, *words, command="evaluate")
    assert message == "error: the validation split is empty: distil with --validation 0.1"
    assert set(finished_run.rglob("*")) == before


def test_a_run_on_a_relative_path_is_not_silently_evaluated_on_other_images(tmp_path, small, monkeypatch, capsys):
    """Two folders of the same classes; the run's data is `folder:.`."""
    for number, name in enumerate(("first", "second")):
        write_classes(tmp_path / name, count=8, first=50 * number)
    monkeypatch.chdir(tmp_path / "first")
    run = tmp_path / "run"
    chains = {"num_chains": 1, "chain_epochs": 2, "chain_every": 1, "architectures": ("convnet-in",)}
    main.main(["distill", *flags(small, data="folder:.", method="random", backend="serial", out=str(run), **chains)])
    for name, is_noted in (("first", False), ("second", True)):
        monkeypatch.chdir(tmp_path / name)
        capsys.readouterr()
        main.main(["evaluate", str(run), "--backend", "serial", "--dry-run"])
        noted = (
            "note: the training images of folder:. are not those of the run (fingerprint " in capsys.readouterr().out
        )
        assert noted == is_noted


SERIAL = ("--backend", "serial", "--no-tracking")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "digit"], "did you mean digits"),
        (["--architectures", "convnet-im"], "did you mean convnet-in"),
        (["--preset", "cifar10-ipc2"], "did you mean cifar10-ipc1"),
        (["--architectures", "convnet-in", "convnet-in"], "name each network once"),
        (["--ipc", "500"], "ipc is 500"),
        (["--ipc", "0"], "--ipc: must be 1 or more"),
        (["--start-epoch", "99"], "raise --expert-epochs"),
        (["--alpha", "-1"], "--alpha"),
        (["--data", "parquet:/nowhere"], "/nowhere"),
        (["--data", "npz:/nowhere.npz"], "/nowhere.npz"),
        (["--resume"], "--out DIR"),
        (["--resume", "--out", "/nowhere"], "/nowhere holds no run"),
        (["--width", "6", "--architectures", "convnet-gn"], "make --width a multiple of 4"),
        (["--depth", "5"], "lower --depth"),
        pytest.param(
            ["--device", "cuda"],
            "use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    out = [] if "--out" in words or "--resume" in words else ["--out", str(tmp_path / "out")]
    assert message in refused(capsys, *SERIAL, *words, *out)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "precious").write_text("mine")
    assert "not empty" in refused(capsys, *SERIAL, "--out", str(tmp_path))
    assert (tmp_path / "precious").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_resume_with_another_configuration_names_the_flags(finished_run, capsys):
    message = refused(capsys, "--out", str(finished_run), "--resume", "--alpha", "3", "--seed", "5")
    assert "--alpha was 10.0, now 3.0" in message
    assert "--seed was 0, now 5" in message


def test_experts_of_another_recipe_lie_beside_those_that_are_there(capsys, tmp_path):
    words = [
        "experts",
        "--backend",
        "serial",
        "--architectures",
        "convnet-in",
        "--width",
        "8",
        "--expert-count",
        "1",
        "--expert-epochs",
        "1",
    ]
    for rate, message in (("0.05", "training 1"), ("0.5", "training 1"), ("0.05", "1 of 1 trajectories are there")):
        main.main([*words, "--expert-lr", rate, "--experts", str(tmp_path)])
        assert message in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


def test_a_damaged_checkpoint_is_refused_and_left_alone(capsys, finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "damaged")
    path = RunDirectory(folder).state_path
    broken = path.read_bytes()[:-100]
    path.write_bytes(broken)
    assert "damaged" in refused(capsys, "--out", str(folder), "--resume", "--steps", "14")
    assert path.read_bytes() == broken


@pytest.mark.parametrize("text", ["", "[]", '{"uri": "sqlite:///mlflow.db"}'])
def test_a_damaged_mlflow_json_is_one_line(text, capsys, small, tmp_path):
    folder = tmp_path / "tracked"
    folder.mkdir()
    (folder / "mlflow.json").write_text(text)
    (folder / "config.json").write_text(to_json(small.updated(out=str(folder), backend="serial", tracking=True)))
    message = refused(capsys, "--out", str(folder), "--resume", "--tracking")
    assert f"{folder}/mlflow.json is damaged" in message
    assert "delete it, and the run is logged as a new one" in message
    assert (folder / "mlflow.json").read_text() == text


def test_a_damaged_mlflow_json_is_not_read_without_tracking(finished_run, tmp_path, capsys):
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (folder / "mlflow.json").write_text("[]")
    main.main(["distill", "--out", str(folder), "--resume", "--no-tracking"])
    assert "this run is complete" in capsys.readouterr().out
    chain = ("--architectures", "convnet-in", "--num-chains", "1", "--chain-epochs", "2", "--chain-every", "1")
    main.main(["evaluate", str(folder), "--backend", "serial", "--no-tracking", *chain])
    main.main(["distill", "--out", str(folder), "--resume", "--no-tracking", "--steps", "13"])
    assert (folder / "mlflow.json").read_text() == "[]"


def test_a_run_is_no_sweep_and_a_sweep_is_no_run(small, tmp_path, capsys):
    folder = str(tmp_path / "it")
    RunDirectory(tmp_path / "it").write_config(small)
    line = refused(capsys, "--out", folder, "--resume", "--dry-run", command="tune")
    assert line == f"error: {folder}: no sweep (sweep.json not found); check the path, or start one without --resume"
    (tmp_path / "it/sweep.json").write_text("{}")
    line = refused(capsys, "--out", folder, "--resume")
    assert line == f"error: {folder} is a sweep: resume it with `fbpc tune --out {folder} --resume`"
    for command, *words in (("evaluate",), ("export", "--format", "npz")):
        assert f"{folder} is a sweep: give its best trial" in refused(capsys, folder, *words, command=command)


@pytest.mark.parametrize("words", [("evaluate",), ("export", "--format", "npz")])
def test_a_run_that_has_not_ended_has_no_coreset_to_evaluate_or_export(small, tmp_path, capsys, words):
    RunDirectory(tmp_path / "run").write_config(small)
    command, *more = words
    line = refused(capsys, str(tmp_path / "run"), *more, command=command)
    assert (
        "coreset.safetensors: coreset not found; if the run has not ended, resume it with `fbpc distill --out " in line
    )
