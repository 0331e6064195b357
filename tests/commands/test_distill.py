"""A run as its files tell it: the command line end to end on real digits, resumed, interrupted, refused."""

import json
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from support.runs import ENVIRONMENT, distil, flags, images_of, refused, start, wait_for

from fbpc_ray.commands import distill, main
from fbpc_ray.core.config import to_json
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import evaluate as evaluation
from fbpc_ray.tracking import run_reference


@pytest.fixture
def whole(finished_run):
    return finished_run


def test_the_files_of_a_run_say_what_was_done(whole, small, digits):
    run = RunDirectory(whole)
    outcome = coreset.load(run.coreset_path)
    assert outcome.images.shape == (10, 1, 8, 8)
    assert outcome.labels.tolist() == list(range(10))
    assert (outcome.mean, outcome.std, outcome.classes) == (digits.mean, digits.std, digits.classes)
    with safetensors.safe_open(run.coreset_path, "pt") as file:
        assert file.metadata()["method"] == "fbpc"
    assert not torch.equal(outcome.images, coreset.load(run.random_path).images)

    rows = pq.read_table(run.metrics_path).to_pylist()
    assert [(row["step"], row["architecture"]) for row in rows] == [
        (step, name) for step in range(1, 13) for name in ("convnet-in", "convnet-bn")
    ]
    assert all(row["gradient_norm"] > 0 and row["map_ending"] == "converged" for row in rows)
    assert all(1 <= row["expert_epoch"] <= 3 and row["expert"] in (0, 1) for row in rows)

    result = json.loads(run.result_path.read_text())
    assert (result["method"], result["data"], result["ipc"], result["steps"], result["seed"]) == (
        "fbpc",
        "digits",
        1,
        12,
        0,
    )
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["seconds_per_step"] > 0
    assert result["map_endings"] == {"converged": 24}
    assert set(result["coresets"]) == {"random", "fbpc"}
    for by_architecture in result["coresets"].values():
        assert set(by_architecture) == {"convnet-in", "convnet-bn"}
        for scores in by_architecture.values():
            assert set(scores) == {"accuracy", "nll", "ece", "brier", "batch_nll", "mean_sample_nll"}
            assert all(len(values) == 2 and len(set(values)) == 2 for values in scores.values())  # one a seed
            assert all(0 < value < 1 for value in scores["accuracy"])
    assert run.picture_path.stat().st_size > 1000 < run.reliability_path.stat().st_size
    assert json.loads(run.config_path.read_text())["steps"] == 12


def test_resume_in_two_parts_gives_the_same_bits(whole, small, tmp_path):
    """5 steps, then on to 12, with momentum and metrics carried over; the steps before a resume are not repeated."""
    folder = tmp_path / "parts"
    distil(*flags(small, backend="serial", steps=5, out=str(folder)))
    assert not torch.equal(images_of(folder), images_of(whole))
    distil("--out", str(folder), "--resume", "--steps", "12")
    assert torch.equal(images_of(folder), images_of(whole))
    columns = ["step", "architecture", "expected_x", "expected_u", "map_steps", "gradient_norm"]
    parts, one = (pq.read_table(RunDirectory(f).metrics_path, columns=columns) for f in (folder, whole))
    assert parts.equals(one)


def test_a_crash_between_metrics_and_state_repeats_no_row(small, tmp_path):
    """The metrics of steps 1..4 beside the state of step 2, as a kill between the two writes leaves them."""
    folder = tmp_path / "between"
    run = RunDirectory(folder)
    distil(*flags(small, backend="serial", steps=2, out=str(folder)))
    early = run.state_path.read_bytes()
    distil("--out", str(folder), "--resume", "--steps", "4")
    expected = images_of(folder)
    run.state_path.write_bytes(early)
    run.result_path.unlink()
    distil("--out", str(folder), "--resume")
    assert [row["step"] for row in pq.read_table(run.metrics_path).to_pylist()] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(images_of(folder), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_resumable_checkpoint_and_says_how(whole, small, tmp_path, number):
    folder = tmp_path / "stopped"
    words = flags(small, backend="serial", steps=12, out=str(folder), checkpoint_every=2)
    process = start("distill", *words)
    wait_for(RunDirectory(folder).state_path, process)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + number, output
    assert f"fbpc distill --out {folder} --resume" in output
    assert "Traceback" not in output
    assert not RunDirectory(folder).result_path.exists()
    distil("--out", str(folder), "--resume")
    assert torch.equal(images_of(folder), images_of(whole))


@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_bits(whole, small, tmp_path, capsys):
    """With --resume auto, as each attempt of a job: killed amid the run, resumed, left alone once it is complete."""
    folder = tmp_path / "killed"
    changed = flags(small, backend="serial", steps=12, out=str(folder), checkpoint_every=2)
    words = [*changed, "--resume", "auto"]
    process = start("distill", *words)
    wait_for(RunDirectory(folder).state_path, process)
    process.kill()
    process.communicate()
    assert not RunDirectory(folder).result_path.exists()
    distil(*words)
    assert "resumed at step" in capsys.readouterr().out
    assert torch.equal(images_of(folder), images_of(whole))
    before = RunDirectory(folder).result_path.stat().st_mtime_ns
    distil(*words)
    assert "this run is complete" in capsys.readouterr().out
    assert RunDirectory(folder).result_path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_is_one_flat_mlflow_run_that_a_resume_goes_on_with(whole, small, tmp_path, monkeypatch):
    """Steps 1..5 and, after --resume, 6..12 stand in the same run, with config, versions, pictures and artifacts.

    So do steps 1..3, which MLflow lacks, as after a kill before they were delivered: a resume logs them again.
    """
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    folder = tmp_path / "tracked"
    distil(*flags(small, backend="serial", steps=5, out=str(folder), tracking=True, checkpoint_every=4))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("delete from metrics where step <= 3")
    distil("--out", str(folder), "--resume", "--steps", "12")
    assert torch.equal(images_of(folder), images_of(whole))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, as it opens a database
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        (experiment,) = [e for e in client.search_experiments() if e.name == "fbpc"]
        (run,) = client.search_runs([experiment.experiment_id])
        steps = {point.step for point in client.get_metric_history(run.info.run_id, "debug/expected_x/convnet-bn")}
        artifacts = {entry.path for entry in client.list_artifacts(run.info.run_id)}
        pictures = client.list_artifacts(run.info.run_id, "images")
    assert run.info.status == "FINISHED"
    assert steps == set(range(1, 13))
    rows = pq.read_table(RunDirectory(folder).metrics_path).to_pylist()
    assert run.data.metrics["debug/psi_u/convnet-bn"] == rows[-1]["psi_u"]
    for name in ("expected_u", "psi_x", "gradient_norm", "map_steps", "seconds_x", "seconds_map", "seconds_u"):
        assert f"debug/{name}/convnet-in" in run.data.metrics
    assert 0 < run.data.metrics["debug/test/accuracy/fbpc/convnet-in"] < 1
    leading = {name for name in run.data.metrics if not name.startswith("debug/")}
    assert leading == {"loss", "test/accuracy", "test/nll", "test/ece"}
    assert next(iter(run.data.metrics)) == "test/accuracy"  # MLflow's page that compares runs opens with it
    assert (run.data.params["preset"], run.data.params["width"]) == ("digits", "8")
    assert "lambda_x" not in run.data.params and "out" not in run.data.params  # the preset's, and a place
    assert run.data.tags["method"] == "fbpc"
    assert run.data.tags["version.torch"] == torch.__version__.split("+")[0]
    reference = run_reference.read(RunDirectory(folder))
    assert reference and (reference.run_id, reference.delivered) == (run.info.run_id, True)

    with sqlite3.connect(tmp_path / "mlflow.db") as database:  # as if the driver was killed before its last delivery
        database.execute("delete from metrics where key like '%test/%' or step = 12")
        database.execute("update runs set status = 'RUNNING'")
    run_reference.write(RunDirectory(folder), reference._replace(run_id="", delivered=False))
    distil("--out", str(folder), "--resume")
    again = client.get_run(run.info.run_id)
    assert again.info.status == "FINISHED"
    delivered = {name: client.get_metric_history(run.info.run_id, name)[-1].value for name in run.data.metrics}
    assert delivered == run.data.metrics

    pictures_there = {"coreset.png", "before.png", "over-time.png", "course.png", "reliability.png"}
    assert pictures_there | {"coreset.safetensors", "result.json", "metrics.parquet", "config.json"} <= artifacts
    assert list(RunDirectory(folder).history()) == [0, 4, 5, 8, 12]
    shown = {int(outcome.group(1)) for entry in pictures if (outcome := re.search(r"step[+%](\d+)", entry.path))}
    assert shown == {0, 4, 5, 8, 12}
    assert run.inputs is not None
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"digits"}


def test_evaluate_on_a_network_it_was_not_trained_on(whole, capsys, tmp_path):
    """The same chains again on convnet-in give the numbers of the run; convnet-none was not in it."""
    words = ["--backend", "serial", "--chain-epochs", "20", "--chain-every", "10", "--num-chains", "2"]
    main.main(
        [
            "evaluate",
            str(whole),
            "--architectures",
            "convnet-none",
            "convnet-in",
            "--json",
            str(tmp_path / "r.json"),
            *words,
        ]
    )
    result, before = (
        json.loads((tmp_path / "r.json").read_text()),
        json.loads(RunDirectory(whole).result_path.read_text()),
    )
    assert result["coresets"]["fbpc"]["convnet-in"] == before["coresets"]["fbpc"]["convnet-in"]
    assert result["coresets"]["random"]["convnet-in"] == before["coresets"]["random"]["convnet-in"]
    assert len(result["coresets"]["fbpc"]["convnet-none"]["nll"]) == 2
    assert "convnet-none" in capsys.readouterr().out
    assert list((whole / "evaluations").glob("*-test-convnet-none-convnet-in.json"))


def test_a_run_that_began_at_the_same_time_and_is_through_is_not_overwritten(small, tmp_path, monkeypatch, capsys):
    """Both found an empty folder; the other loaded its data, ran and left while this one loads its own."""
    folder, open_session = tmp_path / "run", distill.open_sized_session
    words = flags(small, backend="serial", method="random", out=str(folder))

    def slow(*arguments):
        monkeypatch.undo()
        main.main(["distill", *words])
        before.update({path: path.stat().st_ino for path in folder.rglob("*")})
        return open_session(*arguments)

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


def test_no_evaluation_overwrites_another(whole, tmp_path, monkeypatch):
    """Neither one of the same networks that began when it did, nor after one was deleted, as is advised of a damaged
    file."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("evaluations"))
    words = ["evaluate", str(folder), "--architectures", "convnet-in", "--backend", "serial", "--chain-epochs", "2",
             "--chain-every", "1", "--num-chains", "1"]  # fmt: skip
    evaluate = evaluation.evaluate

    def files() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (folder / "evaluations").glob("*.json")}

    def overtaken(*arguments, **options):
        monkeypatch.undo()
        main.main(words)
        before.update(files())
        return evaluate(*arguments, **options)

    before: dict[str, int] = {}
    monkeypatch.setattr(evaluation, "evaluate", overtaken)
    main.main(words)
    assert sorted(files()) == ["001-test-convnet-in.json", "002-test-convnet-in.json"]
    assert before == {name: inode for name, inode in files().items() if name.startswith("001")}
    (folder / "evaluations" / "001-test-convnet-in.json").unlink()
    main.main(words)
    assert sorted(files()) == ["002-test-convnet-in.json", "003-test-convnet-in.json"]


def test_evaluate_tells_strange_images(whole, digits, capsys, tmp_path):
    """Against the data itself the AUROC is exactly 1/2; images of another size ask for --ood-resize, and get it."""
    large = {f"x_{part}": getattr(digits, part).images[:50, 0].repeat(2, 1).repeat(2, 2) for part in ("train", "test")}
    labels = {f"y_{part}": getattr(digits, part).labels[:50] for part in ("train", "test")}
    np.savez(tmp_path / "large.npz", **large, **labels)
    base = ["evaluate", str(whole), "--backend", "serial", "--chain-epochs", "20", "--chain-every", "10",
            "--num-chains", "1", "--json", str(tmp_path / "r.json"), "--ood"]  # fmt: skip
    main.main([*base, "digits"])
    outcome = json.loads((tmp_path / "r.json").read_text())["coresets"]["fbpc"]["convnet-in"]
    assert outcome["ood_auroc_entropy"] == outcome["ood_auroc_mutual_information"] == [0.5]
    assert "OOD entropy" in capsys.readouterr().out
    assert len(list((whole / "evaluations").glob("*entropy.png"))) == 4  # two coresets on two networks
    strange = f"npz:{tmp_path / 'large.npz'}"
    assert "--ood-resize" in refused(capsys, *base[1:], strange, command="evaluate")
    main.main([*base, strange, "--ood-resize"])
    outcome = json.loads((tmp_path / "r.json").read_text())["coresets"]["fbpc"]["convnet-in"]
    assert 0 < outcome["ood_auroc_entropy"][0] < 1 != outcome["ood_auroc_entropy"][0] * 2


def test_the_validation_split_is_scored_before_and_after_the_steps(small, tmp_path, capsys):
    """In metrics.parquet, for each network, and their mean in the log."""
    validated = {"validation": 0.1, "val_every": 2, "steps": 2, "num_chains": 1}
    distil(*flags(small, backend="serial", out=str(tmp_path / "run"), **validated))
    rows = RunDirectory(tmp_path / "run").read_metrics()
    last = [row["val_accuracy"] for row in rows if row["step"] == 2]
    assert [(row["step"], row["val_nll"] is not None) for row in rows if row["architecture"] == "convnet-in"] == [
        (0, True), (1, False), (2, True)
    ]  # fmt: skip
    said = re.findall(r"^step (\d): validation NLL \S+, accuracy (\S+) %$", capsys.readouterr().out, re.M)
    assert [step for step, _ in said] == ["0", "2"] and said[1][1] == f"{50 * sum(last):.1f}"


def test_random_learns_nothing_and_needs_no_experts(small, tmp_path):
    folder = tmp_path / "random"
    distil(*flags(small, backend="serial", method="random", experts=str(tmp_path / "none"), out=str(folder)))
    assert not (tmp_path / "none").exists()
    assert torch.equal(images_of(folder), coreset.load(RunDirectory(folder).random_path).images)
    assert set(json.loads(RunDirectory(folder).result_path.read_text())["coresets"]) == {"random"}


def test_dry_run_writes_nothing(small, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    distil(*flags(small, out=str(tmp_path / "dry"), experts=str(tmp_path / "none")), "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    assert "convnet-bn" in text
    assert "4 experts to train" in text


SERIAL = ("--backend", "serial", "--no-tracking")


@pytest.mark.parametrize(
    "words, said",
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
def test_bad_input_is_one_line_that_names_the_fix(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    out = [] if "--out" in words or "--resume" in words else ["--out", str(tmp_path / "out")]
    assert said in refused(capsys, *SERIAL, *words, *out)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "precious").write_text("mine")
    assert "not empty" in refused(capsys, *SERIAL, "--out", str(tmp_path))
    assert (tmp_path / "precious").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_resume_with_another_configuration_names_the_flags(whole, capsys):
    said = refused(capsys, "--out", str(whole), "--resume", "--alpha", "3", "--seed", "5")
    assert "--alpha was 10.0, now 3.0" in said
    assert "--seed was 0, now 5" in said


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
    for rate, said in (("0.05", "training 1"), ("0.5", "training 1"), ("0.05", "1 of 1 trajectories are there")):
        main.main([*words, "--expert-lr", rate, "--experts", str(tmp_path)])
        assert said in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


def test_a_damaged_checkpoint_is_refused_and_left_alone(capsys, small, tmp_path):
    folder = tmp_path / "damaged"
    distil(*flags(small, backend="serial", steps=2, out=str(folder)))
    path = RunDirectory(folder).state_path
    broken = path.read_bytes()[:-100]
    path.write_bytes(broken)
    assert "damaged" in refused(capsys, "--out", str(folder), "--resume", "--steps", "4")
    assert path.read_bytes() == broken


@pytest.mark.slow
def test_two_processes_do_not_share_a_run(small, tmp_path, capsys):
    """The second ends with one line and leaves the first alone, which may be killed: then the run goes on."""
    folder = tmp_path / "shared"
    words = [*flags(small, backend="serial", steps=500, checkpoint_every=1, out=str(folder))]
    process = start("distill", *words)
    try:
        wait_for(RunDirectory(folder).state_path, process)
        said = refused(capsys, "--out", str(folder), "--resume")
        assert f"another process uses {folder}: wait until it ends, or give another --out" in said
        process.kill()
        assert process.wait() == -signal.SIGKILL
        state = safetensors.torch.load_file(RunDirectory(folder).state_path)
        assert torch.isfinite(state["images"]).all()
    finally:
        process.kill()
        process.communicate()
    with safetensors.safe_open(RunDirectory(folder).state_path, "pt") as file:
        done = int(file.metadata()["step"])
    distil("--out", str(folder), "--resume", "--steps", str(done + 1))
    result = RunDirectory(folder).read_result()
    assert result is not None
    assert result["steps"] == done + 1
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"uri": "sqlite:///mlflow.db"}'])
def test_a_damaged_mlflow_json_is_one_line(text, capsys, small, tmp_path):
    folder = tmp_path / "tracked"
    folder.mkdir()
    (folder / "mlflow.json").write_text(text)
    (folder / "config.json").write_text(to_json(small.updated(out=str(folder), backend="serial", tracking=True)))
    said = refused(capsys, "--out", str(folder), "--resume", "--tracking")
    assert f"{folder}/mlflow.json is damaged" in said
    assert "delete it, and the run is logged as a new one" in said
    assert (folder / "mlflow.json").read_text() == text


def test_a_loss_that_is_not_finite_ends_the_run_with_its_last_checkpoint(capsys, small, tmp_path):
    """A learning rate of 1e30 sends the pixels to infinity in a few steps; what was saved before is finite."""
    folder = tmp_path / "exploded"
    said = refused(capsys, *flags(small, backend="serial", steps=12, alpha=1e30, checkpoint_every=1, out=str(folder)))
    assert "non-finite" in said
    assert "--alpha" in said
    state = safetensors.torch.load_file(RunDirectory(folder).state_path)
    assert torch.isfinite(state["images"]).all()


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(whole, small, tmp_path):
    """With files limited to 20 kB the first checkpoint fits and a result does not; later, resume ends as ever."""
    folder = tmp_path / "full"
    words = flags(small, backend="serial", steps=12, out=str(folder), checkpoint_every=1)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192));"
        "from fbpc_ray.commands.main import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "distill", *words], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--resume" in done.stderr
    assert not list(folder.rglob("*.tmp"))
    distil("--out", str(folder), "--resume")
    assert torch.equal(images_of(folder), images_of(whole))


@pytest.mark.slow
def test_the_core_runs_where_ray_and_mlflow_are_not_installed(whole, small, tmp_path):
    """Both imports are made to fail, and that of torch's compiler, which takes seconds for nothing, as scikit-learn's
    does; tracking is asked for, and its absence is a note."""
    folder = tmp_path / "bare"
    words = flags(small, backend="serial", steps=12, tracking=True, out=str(folder))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['ray', 'mlflow', 'torch._dynamo'], None));"
        "from fbpc_ray.commands.main import main; main(sys.argv[1:]); sys.exit('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "distill", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no MLflow" in done.stdout
    assert torch.equal(images_of(folder), images_of(whole))
    words = flags(small, backend="ray", out=str(tmp_path / "other"))
    done = subprocess.run([sys.executable, "-c", code, "distill", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--backend serial" in done.stderr
    assert not (tmp_path / "other").exists()


def test_help_takes_less_than_a_second():
    """`--help` imports neither torch nor ray. Counted in CPU time, since the machine may be busy; the best of three, as
    that is longer, too, where another process shares the core."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "fbpc_ray", "distill", "--help"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "lambda_x" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 1.0 for _ in range(3))
