"""A run as its files tell it: the command line end to end on real digits."""

import json
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from support.runs import distil, flags, images_of, refused

from fbpc_ray.commands import main
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import evaluate as evaluation
from fbpc_ray.tracking import run_reference
from fbpc_ray.tuning import trial


def test_the_files_of_a_run_say_what_was_done(finished_run, small, digits):
    run = RunDirectory(finished_run)
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


@pytest.mark.slow
def test_a_run_is_one_flat_mlflow_run_that_a_resume_goes_on_with(finished_run, small, tmp_path, monkeypatch):
    """Steps 1..5 and, after --resume, 6..12 stand in the same run, with config, versions, pictures and artifacts.

    So do steps 1..3, which MLflow lacks, as after a kill before they were delivered: a resume logs them again.
    """
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    folder = tmp_path / "tracked"
    distil(*flags(small, backend="serial", steps=5, out=str(folder), tracking=True, checkpoint_every=4))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("delete from metrics where step <= 3")
    distil("--out", str(folder), "--resume", "--steps", "12")
    assert torch.equal(images_of(folder), images_of(finished_run))

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
        database.execute("delete from tags where key in ('commit', 'device', 'folder') or key like 'version.%'")
        database.execute("update runs set status = 'RUNNING'")
    run_reference.write(RunDirectory(folder), reference._replace(run_id="", delivered=False))
    distil("--out", str(folder), "--resume", "--dry-run", "--json", str(tmp_path / "dry.json"))
    assert client.get_run(run.info.run_id).info.status == "RUNNING" and not (tmp_path / "dry.json").exists()
    distil("--out", str(folder), "--resume")
    again = client.get_run(run.info.run_id)
    assert again.info.status == "FINISHED"
    delivered = {name: client.get_metric_history(run.info.run_id, name)[-1].value for name in run.data.metrics}
    assert delivered == run.data.metrics
    assert again.data.tags == run.data.tags

    pictures_there = {"coreset.png", "before.png", "over-time.png", "course.png", "reliability.png"}
    assert pictures_there | {"coreset.safetensors", "result.json", "metrics.parquet", "config.json"} <= artifacts
    assert list(RunDirectory(folder).history()) == [0, 4, 5, 8, 12]
    shown = {int(outcome.group(1)) for entry in pictures if (outcome := re.search(r"step[+%](\d+)", entry.path))}
    assert shown == {0, 4, 5, 8, 12}
    assert run.inputs is not None
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"digits"}


def test_evaluate_on_a_network_it_was_not_trained_on(finished_run, capsys, tmp_path):
    """The same chains again on convnet-in give the numbers of the run; convnet-none was not in it."""
    words = ["--backend", "serial", "--chain-epochs", "20", "--chain-every", "10", "--num-chains", "2"]
    main.main(
        [
            "evaluate",
            str(finished_run),
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
        json.loads(RunDirectory(finished_run).result_path.read_text()),
    )
    assert result["coresets"]["fbpc"]["convnet-in"] == before["coresets"]["fbpc"]["convnet-in"]
    assert result["coresets"]["random"]["convnet-in"] == before["coresets"]["random"]["convnet-in"]
    assert len(result["coresets"]["fbpc"]["convnet-none"]["nll"]) == 2
    assert "convnet-none" in capsys.readouterr().out
    assert list((finished_run / "evaluations").glob("*-test-convnet-none-convnet-in.json"))


def test_no_evaluation_overwrites_another(finished_run, tmp_path, monkeypatch):
    """Neither one of the same networks that began when it did, nor after one was deleted, as is advised of a damaged
    file."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("evaluations"))
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


@pytest.mark.parametrize("words", [(), ("--save-model", "evaluations/model", "--architectures", "convnet-in")])
def test_a_folder_that_cannot_be_written_ends_an_evaluation_before_its_chains(
    words, finished_run, tmp_path, monkeypatch, capsys
):
    """Here a file is in its place: no permission keeps root out."""
    run = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    taken = (tmp_path if words else run) / "evaluations"
    taken.write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main.main(["evaluate", str(run), "--backend", "serial", *words])
    output = capsys.readouterr()
    assert left.value.code == 1
    assert output.err.startswith("error: ") and "is in the place of a folder" in output.err
    assert "evaluating" not in output.out and taken.read_text() == "mine"


def test_evaluate_scores_ood_images(finished_run, digits, capsys, tmp_path):
    """Against the data itself the AUROC is exactly 1/2; images of another size ask for --ood-resize, and get it."""
    large = {f"x_{part}": getattr(digits, part).images[:50, 0].repeat(2, 1).repeat(2, 2) for part in ("train", "test")}
    labels = {f"y_{part}": getattr(digits, part).labels[:50] for part in ("train", "test")}
    np.savez(tmp_path / "large.npz", **large, **labels)
    base = ["evaluate", str(finished_run), "--backend", "serial", "--chain-epochs", "20", "--chain-every", "10",
            "--num-chains", "1", "--json", str(tmp_path / "r.json"), "--ood"]  # fmt: skip
    main.main([*base, "digits"])
    outcome = json.loads((tmp_path / "r.json").read_text())["coresets"]["fbpc"]["convnet-in"]
    assert outcome["ood_auroc_entropy"] == outcome["ood_auroc_mutual_information"] == [0.5]
    assert "OOD entropy" in capsys.readouterr().out
    assert len(list((finished_run / "evaluations").glob("*entropy.png"))) == 4  # two coresets on two networks
    other = f"npz:{tmp_path / 'large.npz'}"
    assert "--ood-resize" in refused(capsys, *base[1:], other, command="evaluate")
    main.main([*base, other, "--ood-resize"])
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
    lines = re.findall(r"^step (\d): validation NLL \S+, accuracy (\S+) %$", capsys.readouterr().out, re.M)
    assert [step for step, _ in lines] == ["0", "2"] and lines[1][1] == f"{50 * sum(last):.1f}"


def test_a_validation_that_a_signal_ended_is_made_on_resume(small, tmp_path, monkeypatch):
    """The metrics are those of a run without the signal, which came at an earlier step or at the last one."""
    validate, folders = trial.validate, {step: tmp_path / str(step) for step in (0, 2, 4)}
    one = small.updated(architectures=("convnet-bn",), chain_epochs=5, chain_every=5)
    words = flags(one, backend="serial", validation=0.1, val_every=2, steps=4, num_chains=1)
    distil(*words, "--out", str(folders[0]))
    for step in (2, 4):

        def stopped(session, state, *more, step=step):
            if state.step == step:
                raise Interrupted(signal.SIGTERM)
            return validate(session, state, *more)

        monkeypatch.setattr(trial, "validate", stopped)
        with pytest.raises(SystemExit):
            distil(*words, "--out", str(folders[step]))
        monkeypatch.setattr(trial, "validate", validate)
        distil("--out", str(folders[step]), "--resume")
    whole, *others = (
        {(row["step"], row["architecture"]): row["val_nll"] for row in RunDirectory(folder).read_metrics()}
        for folder in folders.values()
    )
    assert others == [whole, whole] and None not in (whole[2, "convnet-bn"], whole[4, "convnet-bn"])


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


@pytest.mark.slow
def test_the_core_runs_where_ray_and_mlflow_are_not_installed(finished_run, small, tmp_path):
    """Both imports are made to fail, and that of torch's compiler, which takes seconds for nothing, as scikit-learn's
    does; tracking is asked for, and its absence is a note."""
    folder = tmp_path / "bare"
    words = flags(small, backend="serial", steps=12, tracking=True, out=str(folder))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['ray', 'mlflow', 'torch._dynamo'], None));"
        "from fbpc_ray.commands.main import main; main(sys.argv[1:]); sys.exit('sklearn' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code, "distill", *words], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "no MLflow" in process.stdout
    assert torch.equal(images_of(folder), images_of(finished_run))
    words = flags(small, backend="ray", out=str(tmp_path / "other"))
    process = subprocess.run([sys.executable, "-c", code, "distill", *words], capture_output=True, text=True)
    assert process.returncode == 2
    assert "--backend serial" in process.stderr
    assert not (tmp_path / "other").exists()


HELP = """
import sys
from fbpc_ray.commands import main
try:
    main.main(["distill", "--help"])
finally:
    print("imported", *sys.modules)
"""


def test_help_imports_little_and_takes_little_time():
    """No heavy library, and at most four times the CPU time of Python that imports what parses the flags (measured:
    1.6 times). A ratio, since CPU time is longer, too, where others share the core; the best of three pairs."""

    def run(code: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, process.stdout

    text, _, modules = run(HELP)[1].partition("\nimported ")
    assert "lambda_x" in text and "tyro" in modules.split()
    assert not {"torch", "numpy", "ray", "mlflow", "matplotlib", "pyarrow", "PIL", "sklearn"} & set(modules.split())
    assert any(run(HELP)[0] < 4 * run("import tyro")[0] for _ in range(3))
