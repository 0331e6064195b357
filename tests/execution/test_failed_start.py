"""What a user reads where Ray's own processes do not start, or no cluster answers."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import ray
from ray._private import ray_constants, services
from ray._private.utils import check_version_info
from ray.exceptions import AuthenticationError

from fbpc_ray.core.config import Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.signals import Interruption
from fbpc_ray.execution.ray import connection, ray_backend
from fbpc_ray.execution.ray.ray_errors import join_failure

TIMED_OUT = "The current node timed out during startup. This could happen because the GCS has become overloaded."


@pytest.mark.parametrize("error", [Exception(TIMED_OUT), RuntimeError(TIMED_OUT), TimeoutError(TIMED_OUT)])
@pytest.mark.parametrize(
    "address, code, start, fix",
    [
        ("local", 1, "Ray did not start on this machine", "run the same command again, or with --backend serial"),
        ("10.0.0.1:6379", 2, "no Ray cluster answers at '10.0.0.1:6379'", "use --address local"),
    ],
)
def test_every_exception_of_ray_is_one_line(monkeypatch, error, address, code, start, fix):
    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connection, "probe", lambda address: None)  # a socket accepts, and Ray does not answer
    with pytest.raises(UserError) as raised:
        connection.connect(address, {}, print)
    line = str(raised.value)
    assert line.startswith(f"{start} (The current node timed out during startup.") and line.endswith(fix)
    assert raised.value.code == code and "\n" not in line


MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.59.1
    Python: 3.11.9
This process on 10.0.0.7:0 was started with:
    Ray: 2.60.0
    Python: 3.11.2
"""
"""As ray._private.utils.check_version_info words it."""


def join_error(monkeypatch: pytest.MonkeyPatch, init: Callable[..., None]) -> str:
    """Return the line for a cluster that answers, where `ray.init` is `init`."""
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connection, "probe", lambda address: None)
    with pytest.raises(UserError) as raised:
        connection.connect("10.0.0.1:6379", {}, print)
    return str(raised.value)


def test_a_cluster_of_other_versions_is_named_as_such(monkeypatch):
    """The cluster answers: --address is right."""

    def init(**options: object) -> None:
        raise RuntimeError(MISMATCH)

    assert join_error(monkeypatch, init) == (
        "the Ray cluster runs Ray 2.59.1 and Python 3.11.9, this process Ray 2.60.0 and Python 3.11.2: install the "
        "cluster's versions here, or run on one of its nodes by `ray job submit`"
    )


def test_ray_words_a_mismatch_of_versions_as_we_read_it():
    """The text is private to Ray: ray is pinned."""
    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "1.0", "python_version": "3.11.9"}, "10.0.0.7:0")
    assert "the Ray cluster runs Ray 1.0 and Python 3.11.9, this process" in str(join_failure(raised.value))


def test_a_machine_without_a_node_of_the_cluster_is_named_as_such(monkeypatch):
    """`fbpc distill --address HEAD:6379` on a laptop: the head answers, and Ray looks for a node here in vain."""
    monkeypatch.setattr(services, "find_node_ids", list)

    def init(**options: object) -> None:
        services.get_node_to_connect_for_driver(None, timeout_seconds=0)  # type: ignore[arg-type]

    assert join_error(monkeypatch, init) == (
        "the Ray cluster has no node on this machine, which a driver needs: run `ray start --address=HEAD:6379` here, "
        "or submit the run with `ray job submit`"
    )


@pytest.mark.parametrize("flag, address, variable", [
    ("--address", "http://127.0.0.1:8265", ""), ("RAY_ADDRESS", "", "http://127.0.0.1:8265"),
])  # fmt: skip
def test_the_address_of_a_dashboard_is_named_as_such(monkeypatch, flag, address, variable):
    """Ray's own documentation tells to export RAY_ADDRESS for jobs."""
    monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(UserError) as raised:
        connection.connect(address, {}, print)
    assert str(raised.value).startswith(
        f"{flag}: must be HOST:6379 of the cluster's head, got http://127.0.0.1:8265, a dashboard;"
    )


def test_a_cluster_whose_nodes_are_all_dead_is_one_line(monkeypatch):
    """Ray marks a node as dead that was too busy to answer; nobody has to lower --cpus-per-actor for that."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False, "Resources": {}}])
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: None)  # which would start a cluster here
    with pytest.raises(
        UserError, match="no node of the Ray cluster answers: run the same command with --resume"
    ) as one:
        connection.nodes()
    assert one.value.code == 1


def test_the_probe_speaks_for_itself(monkeypatch):
    def refuse(address: str) -> None:
        raise UserError(f"no Ray cluster answers at {address} within 10 s")

    monkeypatch.setattr(connection, "probe", refuse)
    with pytest.raises(UserError) as raised:
        connection.connect("10.0.0.1:6379", {}, print)
    assert str(raised.value) == "no Ray cluster answers at 10.0.0.1:6379 within 10 s"


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (AuthenticationError("Bearer token is missing"), UserError, "the Ray cluster refuses our token (Bearer token"),
        (Exception(TIMED_OUT), UserError, "Ray did not start on this machine ("),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_start_that_fails_or_is_interrupted_leaves_no_process(monkeypatch, error, raised, message):
    """The reaper kills what Ray has started and ends, before the error goes on."""
    calls, before = [], ray_constants.ENABLE_RAY_CLUSTER

    class FakeReaper:
        def reap(self) -> None:
            calls.append("reap")

        def dismiss(self) -> None:
            calls.append("dismiss")

    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr(connection, "Reaper", FakeReaper)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(raised) as caught:
        connection.connect("local", {}, print)
    assert calls == ["reap", "dismiss"] and str(caught.value).startswith(message)
    assert ray_constants.ENABLE_RAY_CLUSTER is before  # else this process would start every later cluster on loopback


@pytest.mark.parametrize("nodes, device, message", [
    ([{"Alive": False, "Resources": {}}], "cpu", "no node of the Ray cluster answers"),
    ([{"Alive": True, "Resources": {"CPU": 2.0}}], "cuda", "--device cuda, but the Ray cluster has no GPU"),
])  # fmt: skip
def test_a_cluster_that_is_of_no_use_is_left_again(monkeypatch, nodes, device, message):
    """A notebook would otherwise keep the cluster that it started, and the thread that watches it."""
    calls, connected = [], [False]

    def connect(*arguments: object) -> None:
        connected[0] = True

    monkeypatch.setattr(ray, "is_initialized", lambda: connected[0])
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(ray_backend, "connect", connect)
    watch = SimpleNamespace(close=lambda: calls.append("watch"), message="")
    monkeypatch.setattr(ray_backend, "watch", lambda reaper: watch)
    with pytest.raises(UserError, match=message):
        ray_backend.RayBackend(Workers(device=device), Interruption())  # type: ignore[arg-type]
    assert calls == ["watch", "shutdown"]
