"""`fbpc ui`: MLflow's pages of the runs, for this machine alone, until Ctrl-C.

The server is MLflow's own command in a process group of its own, so that all of it ends with this one. It runs one
worker and none of the jobs that MLflow's server would run beside it, which need half a gigabyte and are not for runs.
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
from types import FrameType
from typing import IO, NoReturn

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.provenance import home
from fbpc_ray.core.signals import Interrupted
from fbpc_ray.tracking.uri import PORT, absolute, database, default_uri, list_url, remote

HOST = "127.0.0.1"
START_SECONDS = 180
"""After which a server that does not answer is taken for broken; it needs ten, and more on a busy machine."""
END_SECONDS = 10
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}


def ui(uri: str, port: int, log: Callable[[str], None]) -> None:
    """Serve the pages of the store `uri` (empty: the one that runs are logged to) until a signal, which ends it as
    Interrupted. `port` 0 takes 5000, or a free one where that is taken.

    Raises UserError where there is no such store, where `port` is taken, and where MLflow ends or doesn't answer.
    """
    uri = absolute(uri) if uri else default_uri(home())
    if remote(uri):
        log(f"MLflow: {uri} is a server: open it in a browser, nothing is started here")
        return
    file = database(uri)
    if file is not None and not file.is_file():
        raise UserError(f"there is no {file}: log a run first, or name a store by --tracking-uri")
    if find_spec("mlflow") is None:
        raise UserError("mlflow is not installed: pip install mlflow")
    chosen = _port(port)
    moved = f" ({PORT} is taken)" if not port and chosen != PORT else ""
    with _signals(), _server(uri, chosen) as (process, output):
        _wait(process, output, chosen)
        log(f"MLflow: {_first_page(chosen)}{moved} shows {uri}; Ctrl-C ends it")
        process.wait()
        raise UserError(f"MLflow ended: {_last_words(output)}", code=1)


def _port(port: int) -> int:
    """A port that is free now. Raises UserError where the one asked for isn't."""
    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: choose one from 1 to 65535")
    if port and not _free(port):
        raise UserError(f"--port {port} is taken: choose another, or leave it out and a free one is found")
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
    """Inside the block Ctrl-C, SIGTERM and the end of the terminal raise Interrupted, once."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def caught(number: int, frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # what follows ends the server, and is not to be cut
        raise Interrupted(number)

    before = {number: signal.signal(number, caught) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _server(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """(the server's process, what it says), ended with all its children as the block ends."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", HOST]
    command += ["--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            process_group=0,
        )  # fmt: skip
        try:
            yield process, output
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group: by request, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + END_SECONDS
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)  # until nobody is left in it
                time.sleep(0.05)
    process.wait()


def _wait(process: subprocess.Popen[bytes], output: IO[bytes], port: int) -> None:
    """Until it answers. Raises UserError where it ends before, or does not."""
    end = time.monotonic() + START_SECONDS
    while not _answers(port):
        if process.poll() is not None:
            raise UserError(f"MLflow can't show this store: {_last_words(output)}", code=1)
        if time.monotonic() > end:
            raise UserError(f"MLflow did not answer within {START_SECONDS} s: {_last_words(output)}", code=1)
        time.sleep(0.1)


def _answers(port: int) -> bool:
    return _asked(port, "/health") is not None


def _first_page(port: int) -> str:
    """The address of the runs of the experiment that was changed last; of all pages, where there is none."""
    address = f"http://{HOST}:{port}"
    with suppress(ValueError, KeyError, TypeError):
        answer = _asked(port, "/api/2.0/mlflow/experiments/search", {"max_results": 1000, "order_by": [NEWEST]})
        for each in json.loads(answer or b"{}").get("experiments", []):
            if each["name"] != "Default":  # MLflow's own, in every store
                return list_url(address, each["experiment_id"])
    return address


NEWEST = "last_update_time DESC"


def _asked(port: int, path: str, question: object = None) -> bytes | None:
    """What the server answers; None where it doesn't."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)  # which asks no proxy
    try:
        if question is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(question), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _last_words(output: IO[bytes]) -> str:
    """The cause, in a line: a traceback names it last, SQLAlchemy explains it below."""
    output.seek(0)
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line or "Exception: " in line]
    return (named or lines or ["it said nothing"])[-1][:300]
