"""Jobs that are submitted to a head that asks for a token and listens on 127.0.0.1: a real one, for all tests here."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.processes import descendants, free_port, kill, listening, soon
from support.runs import ENVIRONMENT, distil, flags, images_of

from fbpc_ray.core.config import Config
from fbpc_ray.distillation.run_directory import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TOKEN = "the-token-of-this-test-0123456789"


class Head(NamedTuple):
    process: subprocess.Popen[bytes]
    gcs: str
    """host:port for --address."""
    dashboard: str
    """URL for jobs."""


@pytest.fixture(scope="module")
def head():
    """`ray start --head` as README says it, with ports of its own."""
    folder, gcs, dashboard = tempfile.mkdtemp(prefix="fr", dir="/tmp"), free_port(), free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        "--num-cpus=2", "--object-store-memory=200000000", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0", f"--temp-dir={folder}",
    ]  # fmt: skip
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_ADDRESS"} | token
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield Head(process, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in below:
        kill(pid)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def client(head):
    """What submits jobs, with the token in the header (this process itself runs with RAY_AUTH_MODE=disabled)."""
    from ray.job_submission import JobSubmissionClient

    end = time.monotonic() + 300
    while True:
        assert head.process.poll() is None
        assert time.monotonic() < end, "the head did not start"
        try:
            return JobSubmissionClient(head.dashboard, headers={"authorization": f"Bearer {TOKEN}"})
        except (ConnectionError, RuntimeError):
            time.sleep(0.5)


def submit(client, words: list[str], environment: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    """A job of a script in jobs/; its id."""
    return client.submit_job(
        entrypoint=shlex.join([sys.executable, *words]),
        runtime_env={"working_dir": str(folder), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", **(environment or {})}},
    )


def wait_for_end(client, job: str, seconds: float = 300):
    """What is known of a job that has ended."""
    end = time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < end, client.get_job_logs(job)
        time.sleep(0.2)
    return client.get_job_info(job)


@pytest.fixture(scope="module")
def undisturbed_run(small, tmp_path_factory):
    """A serial run of 60 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("jobs") / "whole"
    distil(*flags(small, backend="serial", steps=60, out=str(folder)))
    return folder


def command(config: Config, folder: Path) -> list[str]:
    settings = flags(config, backend="ray", steps=60, checkpoint_every=60, tracking=True, out=str(folder))
    return ["jobs/distill_multi.py", *settings, "--resume", "auto"]


def mlflow_runs(database: Path) -> list[tuple[str, str]]:
    """(status, where its artifacts are) of all runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, as it opens a database
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{database}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "fbpc"]
        result = client.search_runs([experiment.experiment_id])
    return [(run.info.status, str(run.info.artifact_uri)) for run in result]


def test_a_job_that_is_stopped_and_submitted_again_ends_with_the_same_bits(
    head, client, undisturbed_run, small, tmp_path
):
    """`ray job stop` amid the run leaves a checkpoint, where no periodic one is due before the end, and a run in MLflow
    that reads KILLED, both outside of the job's temporary folder; the very same command then ends it, in the same
    MLflow run."""
    folder = tmp_path / "job"
    (tmp_path / "home").mkdir()
    words, home = command(small, folder), {"HOME": str(tmp_path / "home"), "FBPC_HOME": ""}
    job = submit(client, words, home)
    assert soon(lambda: amid_a_step(head) or client.get_job_status(job).is_terminal()), client.get_job_logs(job)
    assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
    client.stop_job(job)
    assert wait_for_end(client, job).status == "STOPPED"
    logs = client.get_job_logs(job)
    assert f"fbpc distill --out {folder} --resume" in logs
    assert "Traceback" not in logs
    assert not RunDirectory(folder).result_path.exists()
    assert 0 < steps_of(folder) < 60
    database = tmp_path / "home" / "fbpc-ray" / "mlflow.db"
    assert [status for status, _ in mlflow_runs(database)] == ["KILLED"]

    job = submit(client, words, home)
    info = wait_for_end(client, job)
    logs = client.get_job_logs(job)
    assert (info.status, info.driver_exit_code) == ("SUCCEEDED", 0), logs
    assert "resumed at step" in logs
    assert torch.equal(images_of(folder), images_of(undisturbed_run))
    ((status, artifacts),) = mlflow_runs(database)
    assert status == "FINISHED"
    assert Path(artifacts.removeprefix("file://")).is_relative_to(database.parent)


def amid_a_step(head: Head) -> bool:
    """Whether a worker computes a gradient, by the title that Ray gives its process meanwhile."""
    return any(title.startswith("ray::Worker.gradient") for title in descendants(head.process.pid).values())


def steps_of(folder: Path) -> int:
    import safetensors

    with safetensors.safe_open(RunDirectory(folder).state_path, "pt") as file:
        return int(file.metadata()["step"])


def test_what_changes_while_a_job_is_packed_does_not_travel_and_its_bad_input_is_its_exit_code(client, small, tmp_path):
    """`.rayignore` in a copy of the tree: a log, experts and a database that come and grow meanwhile neither travel nor
    fail it, and the package is there uninstalled. The job then refuses a flag."""
    tree, stop = tmp_path / "tree", threading.Event()
    for name in ("fbpc_ray", "jobs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", tree)
    growing = ["mlflow.db", "run.log", "experts/a.arrow", "outputs/b", "data/c", "mlruns/d", "mlflow.db-wal", ".tmp/e"]

    def grow() -> None:
        while not stop.wait(0.002):
            for name in growing:
                (tree / name).parent.mkdir(exist_ok=True)
                with (tree / name).open("ab") as file:
                    file.write(os.urandom(1000))

    thread = threading.Thread(target=grow)
    thread.start()
    words = flags(small, backend="ray", alpha=-1.0, out=str(tmp_path / "bad"))
    code = (
        "import json, os, runpy, sys, fbpc_ray; print('FOUND', json.dumps([sorted(os.listdir()), fbpc_ray.__file__]));"
        "sys.argv[0] = 'jobs/distill_multi.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    try:
        job = submit(client, ["-c", code, *words], folder=tree)
        info = wait_for_end(client, job)
    finally:
        stop.set()
        thread.join()
    logs = client.get_job_logs(job)
    assert (info.status, info.driver_exit_code) == ("FAILED", 2), info.message + logs
    assert logs.strip().splitlines()[-1].startswith("error: --alpha: must be above 0, got -1.0")
    assert not (tmp_path / "bad").exists()
    (line,) = [line for line in logs.splitlines() if line.startswith("FOUND ")]
    names, package = json.loads(line.removeprefix("FOUND "))
    assert set(names) - {".rayignore"} == {"fbpc_ray", "jobs"}
    assert "working_dir_files" in package


def test_with_another_token_it_is_one_line(head, client, small, tmp_path):
    """At once, and not the minute of Ray's own attempts."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another-token"}
    (line,) = refusals([head.gcs], small, tmp_path, {**ENVIRONMENT, "HOME": str(tmp_path), **token})
    assert line.startswith("error: the Ray cluster refuses our token (it is another, or none)")


def test_without_a_cluster_and_without_a_token_it_is_one_line_each(head, client, small, tmp_path):
    """One process tries both in turn; it has no token of the user's."""
    port = free_port()
    absent, refused = refusals([f"127.0.0.1:{port}", head.gcs], small, tmp_path, {**ENVIRONMENT, "HOME": str(tmp_path)})
    assert absent.startswith(f"error: no Ray cluster answers at 127.0.0.1:{port} within 10 s: check --address")
    assert refused.startswith("error: the Ray cluster refuses our token (it is another, or none)")


TRIES = """
import json, sys
from fbpc_ray.commands.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(["distill", *words])
    except SystemExit as end:
        assert end.code == 2, end.code
    else:
        raise AssertionError("it joined")
"""
"""What jobs/distill_multi.py does, once for each list of words."""


def refusals(addresses: list[str], config: Config, folder: Path, environment: dict[str, str]) -> list[str]:
    """Return all that one process prints to stderr whose runs may not join the clusters: a line for each."""
    runs = [flags(config, backend="ray", address=address, out=str(folder / "refused")) for address in addresses]
    outcome = subprocess.run(
        [sys.executable, "-c", TRIES, json.dumps(runs)], env={**environment, "PYTHONPATH": str(ROOT)},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert not (folder / "refused").exists()
    return outcome.stderr.strip().splitlines()


def test_the_head_of_readme_listens_on_loopback_alone(head, client):
    """`RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start --head`, with its dashboard and after jobs."""
    result = listening([head.process.pid, *descendants(head.process.pid)])
    assert {head.gcs.rpartition(":")[2], head.dashboard.rpartition(":")[2]} <= {str(port) for _, _, port in result}
    assert not [(str(ip), port) for _, ip, port in result if not ip.is_loopback]
