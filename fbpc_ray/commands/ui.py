"""`fbpc ui`: serve MLflow's pages of the runs, on this machine alone, until Ctrl-C.

The server is MLflow's own command in a process group of its own, which ends with this process, even when that is killed
(watchdog.py). It has one worker, and none of MLflow's job workers, which take half a gigabyte and show no runs.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from fbpc_ray.commands import watchdog
from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import home
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.tracking.database import DatabaseState, inspect_quiet, moved_line, upgrade_command
from fbpc_ray.tracking.uri import PORT, VIEW_TAG, absolute, database, default_uri, list_url, remote, sqlite_uri

HOST = "127.0.0.1"
NOTE_SECONDS = 15.0
"""Between two lines that say that the server is still starting, which takes about 10 s, and more on a busy machine."""
END_SECONDS = 10
"""Timeout for the server's end after SIGTERM, and again after SIGKILL."""
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
STORE = "MLFLOW_BACKEND_STORE_URI"
"""Variable in which the server finds its store: a command line, which all users see, could show a password."""


def ui(uri: str, port: int, timeout: float, log: Callable[[str], None]) -> None:
    """Serve the pages of an MLflow store until a signal.

    Args:
        uri: The store; empty means the one that runs are logged to.
        port: 0 means 5000, or a free one if 5000 is taken.
        timeout: Seconds to wait for the server's first answer; 0 waits as long as the server lives.

    Raises:
        UserError: The store doesn't exist, `port` is taken, or MLflow ends or doesn't answer.
        Interrupted: A signal ended the server.
    """
    if timeout < 0:
        raise UserError(f"--timeout: must be 0 or more, got {timeout:g}")
    uri = absolute(uri) if uri else default_uri(home())
    if remote(uri):
        log(f"MLflow: {redacted(uri)} is a server already: open it in a browser")
        return
    if file := database(uri):
        _check_database(file, uri)
    elif ":" not in uri and not Path(uri).is_dir():
        raise UserError(f"--tracking-uri: {uri} is no store; write a database as {sqlite_uri(Path(uri).absolute())}")
    if find_spec("mlflow") is None:
        raise UserError("mlflow is not installed: pip install mlflow")
    chosen = _port(port)
    moved = f" ({PORT} is taken)" if not port and chosen != PORT else ""
    with _signals(), _server(uri, chosen) as (process, output):
        _wait(process, output, chosen, timeout, log)
        log(f"MLflow: {_first_page(chosen)}{moved} shows {redacted(uri)}; Ctrl-C ends it")
        process.wait()
        raise UserError(f"MLflow ended: {_cause(output)}", code=1)


def _check_database(file: Path, uri: str) -> None:
    """Raise UserError unless `file` is a database of the installed MLflow; move a useless one aside."""
    state = inspect_quiet(file) if file.is_file() else DatabaseState("missing")
    if state.is_useless:
        raise UserError(f"--tracking-uri: {moved_line(file, state)}; log a run first, or name another store", code=1)
    if state.kind == "missing":
        raise UserError(f"--tracking-uri: {file} not found; log a run first, or name another store")
    if state.kind == "other":
        raise UserError(
            f"--tracking-uri: {file} was written by another version of MLflow ({state.reason}): {upgrade_command(uri)}",
            code=1,
        )
    if state.kind == "foreign":
        raise UserError(f"--tracking-uri: {file} is not a store of MLflow ({state.reason}); name another", code=1)


def _port(port: int) -> int:
    """Return a free port. Raises UserError if `port` is taken."""
    if not 0 <= port < 65536:
        raise UserError(f"--port: must be from 1 to 65535, got {port}")
    if port and not _free(port):
        raise UserError(f"--port: {port} is taken; choose another, or leave --port out to get a free one")
    if port or _free(PORT):
        return port or PORT
    with socket.socket() as any_port:
        any_port.bind((HOST, 0))
        return any_port.getsockname()[1]


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


@contextmanager
def _signals() -> Iterator[None]:
    """Raise Interrupted in the block on the first SIGINT, SIGTERM or SIGHUP, and ignore later ones."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for ignored in numbers:
            signal.signal(ignored, signal.SIG_IGN)  # a second Ctrl-C must not stop the server's end
        raise Interrupted(number)

    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _server(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start the server, yield its process and its output, and end it with all its children after the block."""
    command = [sys.executable, "-I", "-S", watchdog.__file__, sys.executable, "-m", "mlflow", "server", "--host", HOST]
    command += ["--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT, STORE: uri}, stdin=subprocess.PIPE, stdout=output,
            stderr=output, process_group=0,
        )  # fmt: skip
        try:
            yield process, output
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group: with SIGTERM, then with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + END_SECONDS
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)  # raises when the group is empty
                time.sleep(0.05)
    process.wait()


def _wait(
    process: subprocess.Popen[bytes], output: IO[bytes], port: int, timeout: float, log: Callable[[str], None]
) -> None:
    """Wait until the server answers, and log every NOTE_SECONDS that it starts.

    Raises UserError if the server ends first, or doesn't answer within `timeout` seconds (0: no limit).
    """
    start = time.monotonic()
    next_note = NOTE_SECONDS
    while not _answers(port):
        seconds = time.monotonic() - start
        if process.poll() is not None:
            raise UserError(f"MLflow can't show this store: {_cause(output)}", code=1)
        if timeout and seconds > timeout:
            raise UserError(
                f"--timeout: MLflow did not answer within {timeout:g} s; give more seconds, or 0 for no limit; its "
                f"last line: {_cause(output)}",
                code=1,
            )
        if seconds >= next_note:
            log(f"MLflow: the server is starting, {seconds:.0f} s so far; Ctrl-C ends it")
            next_note += NOTE_SECONDS
        time.sleep(0.1)


def _answers(port: int) -> bool:
    return _request(port, "/health") is not None


def _first_page(port: int) -> str:
    """Return the address of the runs of the experiment that changed last, or that of the home page if there is none."""
    address = f"http://{HOST}:{port}"
    with suppress(ValueError, KeyError, TypeError):
        query = {"max_results": 1000, "order_by": ["last_update_time DESC"]}
        answer = _request(port, "/api/2.0/mlflow/experiments/search", query)
        for experiment in json.loads(answer or b"{}").get("experiments", []):
            if experiment["name"] != "Default":  # MLflow's own, in every store
                has_view = any(tag["key"] == VIEW_TAG for tag in experiment.get("tags", []))
                return list_url(address, experiment["experiment_id"], has_view)
    return address


def _request(port: int, path: str, query: object = None) -> bytes | None:
    """Send a GET, or a POST of `query`; return the body of the answer, None unless its status is 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)  # ignores proxies
    try:
        if query is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(query), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _cause(output: IO[bytes]) -> str:
    """Return the line of the server's output that names the error."""
    output.seek(0)
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or "Exception: " in line]
    return redacted((errors or lines or ["it printed nothing"])[-1])[:300]
