"""Requests to MLflow by its limits, and what becomes of refused ones: with a client that only records."""

from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from fbpc_ray.tracking import mlflow_client
from fbpc_ray.tracking.delivery import Notes, Record, Sender
from fbpc_ray.tracking.mlflow_client import SESSION_TAG, find_runs, send_params, send_tags


class Page(list):
    """A page of a search: its runs, and the token of the next page."""

    def __init__(self, runs: list[Any], token: str | None):
        super().__init__(runs)
        self.token = token


def status(number: int) -> str:
    return "RUNNING" if number else "FINISHED"


class Client:
    """A store with 250 runs in pages of 100, and a run that has the param `old`."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1")

    def search_runs(self, experiments: list[str], query: str, page_token: str | None) -> Page:
        start = int(page_token or 0)
        runs = [
            SimpleNamespace(
                data=SimpleNamespace(tags={SESSION_TAG: f"sweep/{number}"}),
                info=SimpleNamespace(
                    run_id=f"r{number}", experiment_id="1", status="RUNNING" if number else "FINISHED"
                ),
            )
            for number in range(start, min(start + 100, 250))
        ]
        return Page(runs, str(start + 100) if start + 100 < 250 else None)

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params={"old": "1"}))

    def log_batch(self, run_id: str, synchronous: bool, **parts: list[Any]) -> None:
        self.batches += [(name, len(values)) for name, values in parts.items()]


def test_the_runs_of_a_large_sweep_are_found_on_all_pages(monkeypatch):
    monkeypatch.setattr(mlflow_client, "open_store", lambda uri, file: Client())
    runs = find_runs("http://127.0.0.1:5000", "sweeps", "sweep_id", "x")
    assert list(runs) == [f"sweep/{number}" for number in range(250)]
    assert (runs["sweep/249"].run_id, runs["sweep/249"].running, runs["sweep/0"].running) == ("r249", True, False)


def test_tags_and_params_travel_a_hundred_at_a_time():
    """MLflow refuses larger requests."""
    client: Any = Client()
    send_tags(client, "r", {f"t{number}": "x" for number in range(230)})
    assert client.batches == [("tags", 100), ("tags", 100), ("tags", 30)]
    client.batches.clear()
    send_params(client, "r", {"old": 2, **{f"p{number}": number for number in range(101)}})
    assert client.batches == [("params", 100), ("params", 1), ("tags", 1)]  # a param that changed becomes a tag


@pytest.mark.parametrize(
    "status, again", [(400, False), (404, False), (408, True), (429, True), (500, True), (503, True)]
)
def test_a_refusal_that_may_pass_is_tried_again(status, again):
    """A busy server, or a proxy before it, says 408 or 429; 400 and 404 stay what they are."""

    class Refusal(MlflowException):
        def get_http_status_code(self) -> int:
            return status

    run: Any = SimpleNamespace(uri="http://127.0.0.1:5000")
    sender = Sender(run, Notes(), retry_seconds=30.0)
    sender.put(Record(lambda client, run, again: None))
    sender._set_aside(Refusal("no"))
    assert len(sender._aside) == again
    assert sender.pending == 1  # counted in the last line of the run


@pytest.mark.parametrize(
    "attempts, left, line",
    [
        (["down", "comes back", "taken"], 0, "does not answer"),
        (["comes back", "down", "taken"], 0, "does not answer"),
        (["down", "refused", "refused"], 1, "does not take a record"),
    ],
)
def test_a_server_that_comes_back_amid_an_attempt_refused_nothing(attempts, left, line, monkeypatch):
    """A connection refused just before the server answers again is an outage; two failures on a live server are not."""
    outcomes = iter(attempts)
    lines: list[str] = []
    last = ""

    def send(client, run, again):
        nonlocal last
        last = next(outcomes)
        if last != "taken":
            raise ConnectionRefusedError(last)

    run: Any = SimpleNamespace(uri="http://127.0.0.1:5000", run_id="r")
    notes = Notes()
    sender = Sender(run, notes, retry_seconds=30.0)
    monkeypatch.setattr(sender, "_answers", lambda client: last != "down")
    sender.put(Record(send))
    rounds = [sender._deliver(Client()) for _ in range(1 + attempts.count("down"))]  # type: ignore[arg-type]
    assert rounds == [False, True]
    assert list(outcomes) == []
    assert sender.pending == left
    notes.print(lines.append)
    assert line in lines[-1]
    assert len(lines) == 1 + left


def test_metrics_that_are_new_travel_together_as_far_as_a_request_takes_them():
    """Those that failed are sent alone, so that one that the server never takes holds up no other."""

    def batch(*sizes_and_attempts: tuple[int, int]) -> int:
        sender = Sender(SimpleNamespace(), Notes(), retry_seconds=30.0)  # type: ignore[arg-type]
        for size, attempts in sizes_and_attempts:
            point = mlflow_client.Metric("loss", 1.0, 0, 0)
            sender.put(Record(lambda client, run, again: None, [point] * size if size else None, attempts))
        return len(sender._next_batch())

    assert batch((3, 0), (3, 0), (3, 0)) == 3
    assert batch((3, 0), (3, 1), (3, 0)) == 1
    assert batch((3, 1), (3, 0)) == 1
    assert batch((3, 0), (0, 0), (3, 0)) == batch((0, 0), (3, 0)) == 1
    most = mlflow_client.MAX_METRICS
    assert (batch((most - 3, 0), (3, 0)), batch((most - 3, 0), (4, 0))) == (2, 1)
