"""Connect to a Ray cluster or start one; read its nodes, its free resources and its object store."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import ray
from ray._private import ray_constants, services
from ray._private.utils import get_num_cpus
from ray.exceptions import AuthenticationError as RayAuthenticationError
from ray.exceptions import RayError, RayTaskError

from fbpc_ray.core import cores
from fbpc_ray.core.errors import UserError
from fbpc_ray.execution.ray import set_environment
from fbpc_ray.execution.ray.placement import Node
from fbpc_ray.execution.ray.probe import probe, refused
from fbpc_ray.execution.ray.ray_errors import STORE_FULL, first_line, join_failure, raise_cause
from fbpc_ray.execution.ray.reaper import Reaper


def connect(address: str, options: dict[str, Any], log: Callable[[str], None]) -> Reaper | None:
    """Join the cluster at `address`, or start one on loopback; return the Reaper of a cluster that is started here.

    Raises UserError.
    """
    set_environment()
    requested = address or os.environ.get("RAY_ADDRESS", "")
    if requested.startswith(("http://", "https://")):
        raise UserError(
            f"{'--address' if address else 'RAY_ADDRESS'}: must be HOST:6379 of the cluster's head, got {requested}, a "
            "dashboard; give that address to `ray job submit --address` alone"
        )
    loopback = on_loopback if requested.rpartition(":")[0] in ("127.0.0.1", "localhost") else nullcontext
    with _join_errors(requested), loopback():
        # Ray's annotation forbids None, its documentation doesn't
        resolved = services.canonicalize_bootstrap_address(cast(Any, address or None), options.get("_temp_dir"))
    if resolved is None:
        reaper = _start(options)
        if (host := ray.nodes()[0]["NodeManagerAddress"]) != "127.0.0.1":
            exposed = f"Ray {ray.__version__} listens on {host}, which other machines may reach"
            log(f"warning: {exposed}: use --backend serial")
        return reaper
    if "://" not in requested:
        probe(resolved)
    with _join_errors(requested), loopback():
        ray.init(address=address or None, logging_level=logging.ERROR, log_to_driver=False, **options)
    return None


def _start(options: dict[str, Any]) -> Reaper:
    """Start a cluster of this process, on loopback. Raises UserError."""
    options = {"include_dashboard": False, **options}
    if cores.available() < (os.cpu_count() or 1):  # Ray counts the machine's, or those of a container
        options.setdefault("num_cpus", min(cores.available(), int(get_num_cpus())))
    reaper = Reaper()
    start_errors = _as_user_error(
        "Ray did not start on this machine", "run the same command again, or with --backend serial", code=1
    )
    with _reap_on_failure(reaper), start_errors, on_loopback():
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False, **options)
        make_private(Path.home() / ".ray" / "auth_token")
    return reaper


@contextmanager
def _reap_on_failure(reaper: Reaper) -> Iterator[None]:
    """End the processes of a cluster whose start fails or is interrupted."""
    try:
        yield
    except BaseException:
        reaper.reap()
        reaper.dismiss()
        raise


def _join_errors(requested: str) -> AbstractContextManager[None]:
    return _as_user_error(
        f"no Ray cluster answers at '{requested}'", "check --address and RAY_ADDRESS, or use --address local"
    )


@contextmanager
def _as_user_error(failure: str, fix: str, code: int = 2) -> Iterator[None]:
    """Raise an exception of Ray as UserError: `refused`, `join_failure`, or else `failure`, its cause and `fix`."""
    try:
        yield
    except RayAuthenticationError as error:
        raise refused(first_line(error)) from error
    except Exception as error:
        if known := join_failure(error):
            raise known from error
        raise UserError(f"{failure} ({first_line(error)}): {fix}", code=code) from error


def make_private(path: Path) -> None:
    """Take other users' permissions from the file of Ray's token, which Ray creates readable by all."""
    with suppress(OSError):  # no file, or another user's
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Make the Ray processes that start in this block listen on 127.0.0.1 only.

    Ray does so by itself on macOS and Windows, by this switch; elsewhere it replaces 127.0.0.1, also where it connects,
    by the machine's address.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def nodes() -> list[Node]:
    """Return the cluster's nodes or, inside a Tune trial, the bundles of its placement group.

    Raises UserError if no node is alive: Ray counts one as dead that was too busy to answer.
    """
    group = ray.util.get_current_placement_group()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not alive:
        raise UserError("no node of the Ray cluster answers: run the same command with --resume", code=1)
    resources = alive
    if group is not None:
        resources = [dict(bundle) for bundle in group.bundle_specs]
        for name, amount in ray.get_runtime_context().get_assigned_resources().items():
            resources[0][name] = resources[0].get(name, 0.0) - amount  # the trial's own process is in the first
    store = min((amounts.get("object_store_memory", 0.0) for amounts in alive), default=0.0)
    return [Node(amounts.get("CPU", 0.0), amounts.get("GPU", 0.0), store) for amounts in resources]


def num_nodes() -> int:
    """Return the number of nodes that are alive."""
    return sum(node["Alive"] for node in ray.nodes())


def free() -> str:
    """Describe the free resources of the cluster."""
    resources = ray.available_resources()
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"


def put(value: Any) -> Any:
    """Put `value` into the object store; return its ObjectRef. Raises UserError if the store is full."""
    try:
        return ray.put(value)
    except STORE_FULL as error:
        raise UserError(
            f"Ray's object store is full ({first_line(error)}): free memory or disk, then run again with --resume",
            code=1,
        ) from error


def get(reference: Any) -> Any:
    """Get the value of a task. Raises a worker's UserError or OSError as itself, and UserError if Ray lost the task."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise_cause(error)
    except RayError as error:
        raise UserError(f"Ray lost a task ({first_line(error)}): run the same command with --resume", code=1) from error
