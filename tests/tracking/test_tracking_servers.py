"""MLflow servers that freeze, die, answer nothing or too late: a run goes on, and nothing is lost."""

import collections
import contextlib
import http.server
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mlflow_records import PICTURE, history, images, wait_for
from support.processes import free_port

from fbpc_ray.tracking.tracker import MlflowClient, MlflowTracker


@contextlib.contextmanager
def server(root: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` with its store under `root`, ready to answer; killed with its children at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{root}/server.db", "--artifacts-destination", str(root / "served")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (root / "server.log").open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            assert process.poll() is None and time.monotonic() < deadline, (root / "server.log").read_text()
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_server_frozen_killed_and_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every record arrives, none twice, though the server is frozen (what it was asked it does later), then killed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # what no call may take; a busy machine takes some of it
    port, lines, step, slowest = free_port(), [], 0, 0.0

    def log_steps(tracker: MlflowTracker, count: int) -> None:
        nonlocal step, slowest
        for _ in range(count):
            start = time.monotonic()
            tracker.log_metrics({"loss": 1 / (step + 1), "bad": math.nan, "inf": math.inf}, step)
            if step % 10 == 0:
                tracker.log_image("u", PICTURE, step)
            slowest = max(slowest, time.monotonic() - start)
            step += 1
            time.sleep(0.01)

    with server(tmp_path, port) as process:
        os.killpg(process.pid, signal.SIGSTOP)
        tracker = MlflowTracker(f"http://127.0.0.1:{port}", "e", run_name="r", log=lines.append, retry_seconds=0.5,
                          finish_seconds=300)  # fmt: skip
        log_steps(tracker, 25)
        assert tracker.run_id is None
        os.killpg(process.pid, signal.SIGCONT)
        wait_for(lambda: tracker.pending == 0)
        os.killpg(process.pid, signal.SIGSTOP)
        log_steps(tracker, 25)
        time.sleep(6)  # longer than a request may take
        os.killpg(process.pid, signal.SIGCONT)
        wait_for(lambda: tracker.pending == 0)
        log_steps(tracker, 25)
    log_steps(tracker, 25)  # nobody listens
    wait_for(lambda: tracker.pending > 0)
    with server(tmp_path, port):
        log_steps(tracker, 25)
        tracker.finish("FINISHED")
        assert tracker.pending == 0
        client, run_id = MlflowClient(f"http://127.0.0.1:{port}"), str(tracker.run_id)
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert len(client.search_runs([run.info.experiment_id])) == 1
        assert history(client, run_id, "loss") == [(at, 1 / (at + 1)) for at in range(step)]
        assert history(client, run_id, "inf") == [(at, sys.float_info.max) for at in range(step)]
        assert sorted(point.step for point in client.get_metric_history(run_id, "bad")) == list(range(step))
        complete = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".webp")]
        assert len(complete) == len(set(images(client, run_id))) == len(range(0, step, 10))
    assert slowest < 4
    assert len(lines) == 2
    assert "does not answer" in lines[0]
    assert "all records are delivered" in lines[1]


@contextlib.contextmanager
def lossy(port: int) -> Iterator[str]:
    """A proxy before `port` that passes every request on, and loses the first and third answer of each kind."""
    seen: collections.Counter[str] = collections.Counter()

    class Proxy(http.server.BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = urllib.request.Request(f"http://127.0.0.1:{port}{self.path}", body or None, method=self.command)
            for name in ("Content-Type", "Accept"):
                if name in self.headers:
                    request.add_header(name, self.headers[name])
            try:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    status, data = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    status, data = error.code, error.read()
            kind = self.command if self.command == "PUT" else self.path.split("?")[0]
            seen[kind] += 1
            if seen[kind] not in (1, 3):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = handle_one

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}"
            assert seen["PUT"] > 3
            assert seen["/api/2.0/mlflow/runs/create"] == seen["/api/2.0/mlflow/experiments/create"] == 1
        finally:
            proxy.shutdown()
            thread.join()


@pytest.mark.slow
def test_answers_lost(tmp_path: Path):
    """The server does as asked, and the answer gets lost: for creating, logging and uploading alike, it's done once."""
    file = tmp_path / "note.txt"
    file.write_text("here")
    port = free_port()
    with server(tmp_path, port), lossy(port) as uri:
        tracker = MlflowTracker(uri, "e", run_name="r", params={"a": 1}, log=lambda line: None, retry_seconds=0.05)
        for step in range(8):
            tracker.log_metrics({"loss": 1 / (step + 1)}, step)
            tracker.log_image("u", PICTURE, step)
        tracker.log_artifact(file)
        tracker.log_dataset("d", "source", PICTURE, PICTURE[:, 0, 0], "training")
        wait_for(lambda: tracker.pending == 0)
        tracker.finish("FINISHED")
        client, run_id = MlflowClient(f"http://127.0.0.1:{port}"), str(tracker.run_id)
        run = client.get_run(run_id)
        assert [result.info.run_id for result in client.search_runs([run.info.experiment_id])] == [run_id]
        assert run.info.status == "FINISHED"
        assert run.data.params == {"a": "1"}
        assert history(client, run_id, "loss") == [(step, 1 / (step + 1)) for step in range(8)]
        complete = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".webp")]
        assert len(complete) == len(set(images(client, run_id))) == 8
        assert run.inputs is not None
        assert len(run.inputs.dataset_inputs) == 1


def test_nobody_listens():
    lines: list[str] = []
    start = time.monotonic()
    uri = f"http://127.0.0.1:{free_port()}"
    tracker = MlflowTracker(uri, "e", run_name="r", log=lines.append, retry_seconds=600, finish_seconds=600)
    for step in range(50):
        tracker.log_metrics({"a": 1.0}, step)
        tracker.log_image("u", PICTURE, step)
    tracker.finish("FAILED")
    assert time.monotonic() - start < 300  # neither a call nor `finish` waits, though both might
    assert tracker.run_id is None and tracker.url is None
    assert tracker.pending == 100
    assert len(lines) == 2
    assert "does not answer" in lines[0] and "refused" in lines[0]
    assert "100 records not delivered" in lines[1]
    assert all("\n" not in line and len(line) < 300 for line in lines)


@pytest.mark.parametrize("timeout", ["1", "600"])
def test_server_that_never_answers(timeout: str, monkeypatch: pytest.MonkeyPatch):
    """A timeout ends it; one that the user has set higher than `finish_seconds` doesn't make `finish` wait longer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", timeout)
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as hole:
        uri = f"http://127.0.0.1:{hole.getsockname()[1]}"
        start = time.monotonic()
        tracker = MlflowTracker(uri, "e", run_name="r", log=lines.append, finish_seconds=4)
        for step in range(100):
            tracker.log_metrics({"a": 1.0}, step)
        assert time.monotonic() - start < 60  # a call that waited for an answer would take a timeout, each of them
        tracker.finish("KILLED")
        assert time.monotonic() - start < 300
    assert tracker.pending == 100
    assert "100 records not delivered" in lines[-1]
