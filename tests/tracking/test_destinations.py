"""No address in a file of a run is a destination: a stranger's file gets no request, token or password of the user."""

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import pytest
from support.runs import flags, refused
from support.web import recording

from fbpc_ray.commands import main
from fbpc_ray.core import files, inputs
from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.tracking import run_logging, run_reference
from fbpc_ray.tracking.protocol import NullTracker
from fbpc_ray.tracking.run_reference import RunReference

CHAIN = ["--backend", "serial", "--num-chains", "1", "--chain-epochs", "4", "--chain-every", "2"]


class Tracked(NullTracker):
    """A tracker of a store that has its run."""

    def __init__(self, uri: str, run_id: str):
        self.uri, self.run_id = uri, run_id


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user with a token and the default store."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "the-users-token")
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def finished(small, user: Path) -> RunDirectory[Path]:
    """A small run of random images."""
    words = flags(small, backend="serial", method="random", architectures=("convnet-bn",), num_chains=1)
    main.main(["distill", *words, "--out", str(user / "run")])
    return RunDirectory(user / "run")


def edit(path: Path, **changes: object) -> None:
    files.write_checked_json(path, inputs.read_checked_json(path) | changes)


def test_a_model_goes_to_the_users_store_and_one_line_says_so(user):
    """The distillation's run where the file names the user's store, else the run of the evaluation."""
    run, store = RunDirectory(user / "run"), f"sqlite:///{user}/mlflow.db"
    run.folder.mkdir()
    tracker, lines = Tracked(store, "of-the-evaluation"), []
    for stored, expected in ((store, "of-the-file"), ("http://u:pw@stranger\n:1", "of-the-evaluation")):
        (run.folder / "mlflow.json").write_text(json.dumps({"uri": stored, "run_id": "of-the-file"}))
        assert run_logging.model_run(run, store, tracker, lines.append) == expected
        assert run_logging.model_run(run, store, NullTracker(), lines.append) == ""
    assert lines == [
        f"MLflow: the model goes to {store}, as your settings say; {run.folder}/mlflow.json names "
        "http://***@stranger?:1, which only --tracking-uri or MLFLOW_TRACKING_URI can choose"
    ]


def test_the_file_of_the_store_holds_no_password_and_is_private(user):
    """A resume finds its run by the address without password; a file of earlier code, with it, is read and mended."""
    run, uri = RunDirectory(user / "run"), "http://me:hidden@127.0.0.1:9"
    run.folder.mkdir()
    path = run.folder / "mlflow.json"
    run_reference.write(run, RunReference(uri, "", "a-key", False))
    assert run_reference.of_store(run, uri).key == "a-key"
    run_logging.update_reference(run, Tracked(uri, "7"))
    assert inputs.read_checked_json(path) == {
        "uri": "http://***@127.0.0.1:9", "run_id": "7", "key": "a-key", "delivered": False
    }  # fmt: skip
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert run_reference.of_store(run, uri).run_id == "7"
    other = run_reference.of_store(run, "http://127.0.0.1:9")
    assert other.run_id == "" and other.key not in ("", "a-key")
    path.write_text(json.dumps({"uri": uri, "run_id": "7"}))
    path.chmod(0o644)
    assert run_reference.of_store(run, uri) == (uri, "7", "", True)
    run_logging.update_reference(run, Tracked(uri, "7"))
    assert "hidden" not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    run_logging.update_reference(run, Tracked(uri, "7"))
    assert path.read_bytes() == content


@pytest.mark.slow
def test_a_strangers_run_gets_no_request(finished, user, capsys):
    """`evaluate --save-model`, `report`, `export` and a resume of a run whose files name a stranger's server."""
    with recording() as stranger:
        address = stranger.address.replace("//", "//them:theirs@")
        (finished.folder / "mlflow.json").write_text(json.dumps({"uri": address, "run_id": "0" * 32}))
        edit(finished.config_path, experts="s3://stranger/experts", tracking=True)
        main.main(["evaluate", str(finished.folder), *CHAIN, "--save-model", str(user / "model")])
        message = capsys.readouterr().out
        assert f"the model goes to sqlite:///{user}/mlflow.db, as your settings say" in message
        assert "MLflow: models:/" in message and "theirs" not in message
        main.main(["report", str(finished.folder), "--out", str(user / "report.html")])
        main.main(["export", str(finished.folder), "--format", "hf", "--out", str(user / "hf")])
        assert "an object store" not in refused(capsys, "--out", str(finished.folder), "--resume")
        for path in user.rglob("*"):
            if path.is_file() and path.name != "mlflow.json":
                assert b"the-users-token" not in path.read_bytes(), path
        main.main(["evaluate", str(finished.folder), *CHAIN, "--tracking-uri", f"sqlite:///{user}/own.db"])
        assert (user / "own.db").exists()
        assert stranger.requests == []


STORED = {
    "--experts s3://stranger/experts, but a file alone opens no object": {"experts": "s3://stranger/experts"},
    "--address 203.0.113.9:6379, but a file alone connects to no Ray cluster": {"address": "203.0.113.9:6379"},
    "--architectures evil:net, but a file alone imports no code": {"architectures": ["evil:net"]},
    "--initial-coreset s3://stranger/a.npz, but a file alone opens": {"initial_coreset": "s3://stranger/a.npz"},
}
"""{message: what config.json names}; experts need no initial coreset (tests/commands/test_planning.py)."""


@pytest.mark.parametrize(
    ("command", "message"),
    [(name, message) for name in ("distill", "tune") for message in STORED]
    + [("experts", message) for message in list(STORED)[:3]],
)
def test_a_stored_destination_must_be_repeated(finished_run, tmp_path, capsys, command, message):
    shutil.copytree(finished_run, tmp_path / "run")
    edit(tmp_path / "run" / "config.json", **STORED[message])
    words = ["--preset", str(tmp_path / "run" / "config.json")] if command == "experts" else ["--resume"]
    words += [] if command == "experts" else ["--out", str(tmp_path / "run")]
    assert message in refused(capsys, *words, command=command)


def test_a_preset_file_chooses_no_store_for_the_output(tmp_path, capsys):
    (tmp_path / "preset.json").write_text(json.dumps({"out": "s3://stranger/run"}))
    message = refused(capsys, "--preset", str(tmp_path / "preset.json"))
    assert "--out s3://stranger/run, but a file alone opens no object store" in message


def test_a_named_coreset_in_a_store_is_opened(tmp_path):
    from fbpc_ray.commands.parsing import distill_arguments

    (tmp_path / "preset.json").write_text(json.dumps({"initial_coreset": "s3://mine/a.npz"}))
    words = ["--preset", str(tmp_path / "preset.json"), "--initial-coreset", "s3://mine/a.npz"]
    assert distill_arguments(words).config.distillation.initial_coreset == "s3://mine/a.npz"


def test_a_resume_downloads_only_where_the_command_line_says_so(finished_run, tmp_path):
    from fbpc_ray.commands.parsing import distill_arguments

    shutil.copytree(finished_run, tmp_path / "run")
    edit(tmp_path / "run" / "config.json", download=True, data_root="/somewhere")
    words = ["--out", str(tmp_path / "run"), "--resume", "yes"]
    assert distill_arguments(words).config.data.download is False
    assert distill_arguments([*words, "--download"]).config.data.download is True


def test_the_resume_of_a_sweep_downloads_only_where_the_command_line_says_so(finished_run, tmp_path, monkeypatch):
    from fbpc_ray.core.config import Config, Sweep
    from fbpc_ray.tuning import sweep

    shutil.copytree(finished_run, tmp_path / "run")
    edit(tmp_path / "run" / "config.json", download=True)
    plan = {"name": "s", "id": "1", "settings": dataclasses.asdict(Sweep()), "trials": [{}]}
    files.write_json(tmp_path / "run" / "sweep.json", plan)
    configs: list[Config] = []
    monkeypatch.setattr(sweep, "tune", lambda base, *_, **__: configs.append(base))
    words = ["tune", "--out", str(tmp_path / "run"), "--resume", "yes"]
    main.main(words)
    main.main([*words, "--download"])
    assert [config.data.download for config in configs] == [False, True]


def test_the_trials_of_a_stored_sweep_name_no_destination(small):
    from fbpc_ray.core.config import Sweep
    from fbpc_ray.tuning.plan import Plan, refuse_untrusted

    for flags_of_trial, message in (
        ({"address": "203.0.113.9:6379"}, "trial 0 sets --address"),
        ({"out": "/etc"}, "trial 0 sets --out"),
        ({"experts": "s3://k:s3cret@stranger"}, r"--experts s3://\*\*\*@stranger, but a file alone opens no object"),
        ({"initial_coreset": "s3://stranger/a.npz"}, "--initial-coreset s3://stranger/a.npz, but a file alone opens"),
        ({"architectures": ["evil:net"]}, "imports no code"),
    ):
        plan = Plan("s", "1", Sweep(), [flags_of_trial])
        with pytest.raises(UserError, match=message):
            refuse_untrusted(plan, small, Path("/sweep"))
    refuse_untrusted(Plan("s", "1", Sweep(), [{"alpha": 3.0, "experts": "/mine"}]), small, Path("/sweep"))


def test_the_token_file_of_ray_is_private(tmp_path):
    connection = pytest.importorskip("fbpc_ray.execution.ray.connection")
    path = tmp_path / "auth_token"
    path.write_text("token")
    path.chmod(0o644)
    connection.make_private(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    connection.make_private(tmp_path / "missing")


def test_no_line_or_page_names_a_password(monkeypatch, capsys):
    from fbpc_ray.core import progress
    from fbpc_ray.tracking import uri as mlflow_uri
    from fbpc_ray.tracking.delivery import Notes

    address = "http://me:hidden@127.0.0.1:5000"
    lines = [mlflow_uri.ui_command(address), mlflow_uri.run_url(address, "1", "2"), mlflow_uri.list_url(address, "1")]
    lines += [mlflow_uri.compare_url(address, "1", ["2"]), mlflow_uri.ui_command("postgresql://me:hidden@host/db")]
    notes = Notes()
    notes.add("silent", f"MLflow: {address} does not answer")
    notes.print(lines.append)
    progress.log(f"store {address}")
    with pytest.raises(SystemExit):
        main._exit(f"{address} is no store", 2)
    lines += list(capsys.readouterr())
    assert not [line for line in lines if "hidden" in line]
    assert lines[0] == "http://***@127.0.0.1:5000" and lines[4].endswith("fbpc ui")


@pytest.mark.slow
def test_an_evaluation_is_tracked_as_its_run_was_unless_a_flag_says_otherwise(finished, user):
    words, store = ["evaluate", str(finished.folder), *CHAIN], user / "mlflow.db"
    edit(finished.config_path, tracking=False)
    main.main(words)
    assert not store.exists()
    main.main([*words, "--tracking"])
    assert store.exists()
    store.unlink()
    edit(finished.config_path, tracking=True)
    main.main([*words, "--no-tracking"])
    assert not store.exists()
