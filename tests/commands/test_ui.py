"""`fbpc ui` on two short runs of two methods: what a person sees of them in MLflow's pages, in a real browser."""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.browser import Page, browsed, squeezed, visit
from support.processes import descendants, free_port, kill, listening, soon
from support.runs import ENVIRONMENT, flags

from fbpc_ray.commands import main, ui
from fbpc_ray.core.presets import with_method
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.tracking import uri as mlflow_uri

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's
]
NAMES = "distilled-by-fbpc", "distilled-by-bpc"


class Store(NamedTuple):
    """Where the runs are logged."""

    home: Path
    uri: str
    client: Any
    experiment: str
    """Its id."""
    runs: dict[str, Any]
    """By name."""

    def history(self, run: str, metric: str) -> list[tuple[int, float]]:
        points = self.client.get_metric_history(self.runs[run].info.run_id, metric)
        return sorted((point.step, point.value) for point in points)


@pytest.fixture(scope="module")
def store(small, tmp_path_factory) -> Store:
    """Two distillations of the same length, the first of them judged on a second network afterwards."""
    home = tmp_path_factory.mktemp("home")
    base = small.updated(
        architectures=("convnet-in",), backend="serial", validation=0.1, val_every=2, num_chains=1, tracking=True,
        experiment="methods", experts=str(home / "experts"),
    )  # fmt: skip
    other = with_method(base, "bpc-fkl", 1).updated(steps=4, syn_steps=3, start_epoch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBPC_HOME", str(home))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        for name, config in zip(NAMES, (base, other), strict=True):
            main.main(["distill", *flags(config, out=str(home / name))])
        main.main(["evaluate", str(home / NAMES[0]), "--architectures", "convnet-bn", "--backend", "serial"])
        uri = mlflow_uri.default_uri(home)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        experiment = next(
            candidate.experiment_id for candidate in client.search_experiments() if candidate.name == "methods"
        )
        runs = {str(run.info.run_name): run for run in client.search_runs([experiment])}
    return Store(home, uri, client, experiment, runs)


@pytest.fixture(scope="module")
def address(store) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """(process, address, line that it printed) of the very command that a run prints, but for the port."""
    command = f"exec {mlflow_uri.ui_command(store.uri)} --port {free_port()}"
    process = start_command(command, MLFLOW_HOST="0.0.0.0")
    try:
        line = ready(process)
        result = re.match(r"MLflow: (http://127\.0\.0\.1:\d+)/", line)
        assert result, line
        yield process, result[1], line
    finally:
        stop(process)


def start_command(command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sh", "-c", command], env={**ENVIRONMENT, **environment}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ready(process: subprocess.Popen[str]) -> str:
    """The line that names the page, after those that say that the server is starting."""
    assert process.stdout
    lines = iter(process.stdout.readline, "")
    return next((line for line in lines if "the server is starting" not in line), "it ended")


def stop(process: subprocess.Popen[str]) -> None:
    for pid in (*descendants(process.pid), process.pid):
        kill(pid)
    process.communicate()


def test_runs_compare_at_once(store):
    """The same names of metrics for both methods, over the same steps; tags that group; files beside them."""
    assert set(store.runs) == {*NAMES, f"{NAMES[0]}/001-test-convnet-bn"}
    for name, method in zip(NAMES, ("fbpc", "bpc-fkl"), strict=True):
        run = store.runs[name]
        tags = {key: run.data.tags[key] for key in ("method", "data", "ipc", "architectures")}
        assert tags == {"method": method, "data": "digits", "ipc": "1", "architectures": "convnet-in"}
        assert "\n| architecture | coreset | accuracy % | NLL |" in run.data.tags["mlflow.note.content"]
        for quantity in ("nll", "accuracy"):
            points = store.history(name, f"val/{quantity}")
            assert [step for step, _ in points] == [0, 2, 4] and all(value > 0 for _, value in points)
            (first, pending), (last, value) = store.history(name, f"test/{quantity}")
            assert (first, last) == (0, 4) and math.isnan(pending) and value > 0
        assert [step for step, _ in store.history(name, "loss")] == [1, 2, 3, 4]
        files = {file.path for file in store.client.list_artifacts(run.info.run_id)}
        pictures = {"before.png", "coreset.png", "over-time.png", "course.png", "reliability.png"}
        assert pictures | {"result.json", "config.json", "coreset.safetensors", "metrics.parquet"} <= files
        assert pictures <= {path.name for path in (store.home / name).iterdir()}
        contexts = [tag.value for dataset_input in run.inputs.dataset_inputs for tag in dataset_input.tags]
        assert sorted(contexts) == ["test", "train", "validation"]
    assert store.history(NAMES[0], "val/nll")[0] == store.history(NAMES[1], "val/nll")[0]  # the same real images
    assert {"debug/map_steps/convnet-in", "debug/seconds_map/convnet-in"} <= store.runs[NAMES[0]].data.metrics.keys()
    rows = RunDirectory(store.home / NAMES[0]).restore(*_shape(store))[1]  # type: ignore[index]
    scores = [row["val_nll"] for row in rows]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and scores[1::2] == [None, None]
    assert scores[::2] == [value for _, value in store.history(NAMES[0], "val/nll")]


def _shape(store: Store) -> tuple[Any, tuple[int, int, int]]:
    from fbpc_ray.data import coreset

    pseudocoreset = coreset.load(RunDirectory(store.home / NAMES[0]).coreset_path)
    return pseudocoreset.labels, tuple(pseudocoreset.images.shape[1:])  # type: ignore[return-value]


def test_an_evaluation_stands_under_its_run(store):
    parent, child = store.runs[NAMES[0]], store.runs[f"{NAMES[0]}/001-test-convnet-bn"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["architectures"] == "convnet-bn"
    assert 0 < child.data.metrics["debug/test/accuracy/fbpc/convnet-bn"] < 1
    files = {file.path for file in store.client.list_artifacts(child.info.run_id)}
    assert {"001-test-convnet-bn.json", "001-test-convnet-bn.reliability.png"} == files


def test_it_serves_this_machine_alone_and_runs_no_jobs(address):
    """Whatever MLFLOW_HOST says; and it says where in one line."""
    process, url, line = address
    assert line.count("\n") == 1 and "Ctrl-C" in line
    below = descendants(process.pid)
    runners = re.compile(r"huey|mlflow[./]server[./]jobs")  # "job" alone may be in the name of any folder
    assert not [title for title in below.values() if runners.search(title)], below
    result = listening([process.pid, *below])
    assert {port for _, _, port in result} == {int(url.rpartition(":")[2])}
    assert all(ip.is_loopback for _, ip, _ in result)


@browsed
def test_a_browser_shows_the_list_a_run_and_its_images_step_by_step(store, address, tmp_path):
    _, url, line = address
    first = re.search(r"http\S+", line)
    assert first

    def look(page: Page) -> None:
        page.open(first[0])
        assert "viewStateShareKey=fbpc" in first[0]
        page.reads("methods", *NAMES, "3 matching runs", "test/accuracy", "test/nll")
        page.picture(tmp_path / "list.png")
        page.click(f"[...document.querySelectorAll('a')].find(each => each.innerText.trim() == '{NAMES[0]}')")
        text = squeezed(
            page.reads(
                "Description",
                "accuracy %",
                "Finished",
                "val/nll",
                "digits",
                "Train",
                "Child runs",
                f"{NAMES[0]}/001-test-convnet-bn",
            )
        )
        for tag in ("method : fbpc", "data : digits", "ipc : 1", "architectures : convnet-in"):
            assert tag in text
        page.picture(tmp_path / "run.png")
        page.open(mlflow_uri.run_url(url, store.experiment, store.runs[NAMES[0]].info.run_id).replace(
            "?", "/model-metrics?"))  # fmt: skip
        page.reads("val\n(4)", "test\n(3)", "debug/map_steps\n(1)")
        slider = "document.querySelector('[role=slider]')"
        page.down(f"Boolean({slider})")
        sources = set()
        for press, step in (("Home", 0), ("ArrowRight", 2), ("ArrowRight", 4)):
            page.until(f"(() => {{ const it = {slider}; it?.focus(); return document.activeElement == it }})()")
            page.press(press)
            page.until(f"{slider}?.getAttribute('aria-valuenow') == '{step}'")  # it moves a moment after the key
            sources.add(shown(page, step))
        page.picture(tmp_path / "slider.png")
        assert len(sources) == 3

    visit(tmp_path, look)


def shown(page: Page, step: int) -> str:
    """Address of the coreset's picture, as soon as it is the one of this step, whole and in its window."""
    image = "document.querySelector('img[src*=\"coreset%2Bstep%2B\"]')"
    return page.until(
        f"(() => {{ const it = {image}; if (!it || !it.complete || it.naturalWidth < 200) return false;"
        "it.scrollIntoView({block: 'center'});"  # MLflow writes a run's parameters above it
        f"const box = it.getBoundingClientRect(), at = document.elementFromPoint(box.x + 9, box.y + 9);"
        f"return at == it && it.src.includes('step%2B{step}%2B') && it.src }})()",
        f"the picture of step {step}",
    )


@browsed
def test_a_browser_compares_the_methods(store, address, tmp_path):
    """Every score beside the other's, as they were logged."""
    _, url, _ = address
    runs = [store.runs[name] for name in NAMES]

    def look(page: Page) -> None:
        page.open(mlflow_uri.compare_url(url, store.experiment, [run.info.run_id for run in runs]))
        page.reads("Comparing 2 Runs", *NAMES, "bpc-fkl", "test/accuracy")
        page.reads("Metrics:\ntest/accuracy\nClear All")  # what its plot begins with
        page.picture(tmp_path / "compare.png")
        rows = page.ask("[...document.querySelectorAll('tr')].map(row => [...row.cells].map(each => each.innerText))")
        by_name = {row[0].strip(" :\n"): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 3}
        assert by_name["method"] == ["fbpc", "bpc-fkl"] and by_name["data"] == ["digits", "digits"]
        page.down("document.body.innerText.includes('val/nll')")
        text = squeezed(page.text())
        for metric in ("val/nll", "val/accuracy"):
            numbers = " ".join(f"{round(run.data.metrics[metric], 3):g}" for run in runs)
            assert metric in text and numbers in text, f"{metric}: {numbers}"
        page.picture(tmp_path / "compared.png")

    visit(tmp_path, look)


@browsed
def test_a_browser_shows_the_trials_of_a_sweep_below_it(store, address, tmp_path):
    """With the tags of tuning/monitor.py: a click opens the sweep, and its trials have their scores and tags."""
    from fbpc_ray.tracking.tracker import MlflowTracker

    parent = MlflowTracker(store.uri, "sweeps", run_name="my-sweep", tags={"sweep": "my-sweep"})
    assert parent.wait(60)
    for number, nll in enumerate((1.5, 1.25)):
        tags = {"mlflow.parentRunId": str(parent.run_id), "sweep": "my-sweep", "method": "fbpc"}
        child = MlflowTracker(store.uri, "sweeps", run_name=f"my-sweep/{number}", tags=tags)
        child.log_metrics({"objective/nll": nll, "val/accuracy": 0.5, "val/nll": nll}, 4)
        child.finish("FINISHED")
    parent.finish("FINISHED")
    _, url, _ = address

    def look(page: Page) -> None:
        page.open(mlflow_uri.list_url(store.uri, str(parent.experiment_id), True).replace(
            mlflow_uri.server(store.uri), url))  # fmt: skip
        assert "my-sweep/1" not in page.reads("my-sweep", "3 matching runs")
        page.click("document.querySelector('.ag-row button')")
        page.reads("my-sweep/0", "my-sweep/1", "val/nll", "1.25", "fbpc")
        page.picture(tmp_path / "sweep.png")

    visit(tmp_path, look)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_all_its_processes(store, number):
    """In the middle of its start, too, which takes some seconds."""
    process = start_command(f"exec {mlflow_uri.ui_command(store.uri)} --port {free_port()}")
    try:
        assert soon(lambda: any("mlflow server" in title for title in descendants(process.pid).values()))
        below = descendants(process.pid)
        os.kill(process.pid, number)
        assert "shows" not in process.communicate(timeout=300)[0]
        assert process.returncode == 128 + number
        assert soon(lambda: not [pid for pid in below if Path(f"/proc/{pid}").exists()])
    finally:
        stop(process)


def test_a_kill_leaves_no_server(store):
    """The port is free soon after SIGKILL."""
    port = free_port()
    process = start_command(f"exec {mlflow_uri.ui_command(store.uri)} --port {port}")
    try:
        assert "shows" in ready(process)
        below = descendants(process.pid)
        assert listening(below)
        os.kill(process.pid, signal.SIGKILL)
        assert soon(lambda: not [pid for pid in below if Path(f"/proc/{pid}").exists()], 60)
        assert ui._free(port)
    finally:
        stop(process)


def refused(capsys, *words: str) -> tuple[int | str | None, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main.main(["ui", *words])
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return end.value.code, message


def test_a_free_port_stands_in_for_the_usual_one():
    with contextlib.suppress(OSError), socket.create_server((ui.HOST, ui.PORT)):
        assert ui._port(0) != ui.PORT
    assert ui._port(0) > 0


def test_bad_input_is_one_line(store, tmp_path, capsys, monkeypatch):
    """No such store, a port that is taken or is none, a file that is no database, a path alone, a server elsewhere."""
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, message = refused(capsys)
    assert code == 2 and f"{tmp_path}/mlflow.db not found; log a run first" in message
    _, message = refused(capsys, "--port", "70000", "--tracking-uri", store.uri)
    assert "--port: must be at most 65,535, got 70000" in message
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"--port: {port} is taken" in refused(capsys, "--port", port, "--tracking-uri", store.uri)[1]
    (tmp_path / "mlflow.db").write_text("this is no database, and never was one; " * 100)
    code, message = refused(capsys)
    assert code == 1 and "file is not a database" in message
    code, message = refused(capsys, "--tracking-uri", str(tmp_path / "mlflow.db"))
    assert code == 2 and f"is no store; write a database as sqlite:///{tmp_path}/mlflow.db" in message
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    main.main(["ui"])
    assert "http://127.0.0.1:9 is a server" in capsys.readouterr().out
