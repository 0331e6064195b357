"""Ray is plumbing: the same bits as without it, whatever becomes of its processes. Real clusters on this machine."""

import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import numpy as np
import pytest
import torch
from support.chains import context_of
from support.processes import all_cpus_free, descendants, gradient_workers, kill, listening, processes_naming, soon
from support.runs import SMALL_VBPC, assert_same, distil, flags, images_of, run_on, start, train_experts, wait_for

from fbpc_ray.core.config import Workers
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data import coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.evaluation.chains import Chain, run_chain
from fbpc_ray.evaluation.evaluate import evaluate
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def ray_folder():
    """A short path: Ray puts sockets under it, whose names have a limit of 107 characters."""
    folder = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(ray_folder):
    """A backend on a cluster of two CPUs, started here."""
    from fbpc_ray.execution.ray.ray_backend import RayBackend

    lines: list[str] = []
    backend = RayBackend(
        Workers(address="local", device="cpu"), Interruption(), lines.append,
        num_cpus=2, include_dashboard=False, _temp_dir=ray_folder, object_store_memory=200_000_000,
    )  # fmt: skip
    backend.lines = lines  # type: ignore[attr-defined]
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def expected(small, digits, tmp_path_factory):
    """What the serial backend gives."""
    return run_on(Serial("cpu", Interruption()), small, digits, tmp_path_factory.mktemp("serial"))


def test_ray_gives_the_bits_of_serial(cluster, small, digits, tmp_path, expected):
    assert_same(run_on(cluster, small, digits, tmp_path), expected)
    assert soon(all_cpus_free)


def test_ray_gives_the_bits_of_serial_with_warm_starts_and_several_draws(cluster, small, digits, tmp_path):
    """`--map-init warm`: the solutions travel to the worker that continues from them; six gradients on two workers."""
    config = small.updated(map_init="warm", warm_pool_size=2, draws_per_step=3)
    serial = run_on(Serial("cpu", Interruption()), config, digits, tmp_path / "serial")
    assert_same(run_on(cluster, config, digits, tmp_path / "ray"), serial)
    assert [(row["step"], row["architecture"], row["draw"]) for row in serial[1][:6]] == [
        (1, name, draw) for name in ("convnet-in", "convnet-bn") for draw in range(3)
    ]


@pytest.mark.parametrize("changes", [{}, {"method": "frepo", "draws_per_step": 2}], ids=["vbpc", "frepo, two draws"])
def test_serial_is_ray_is_resumed(cluster, digits, tmp_path, changes):
    """Networks of a pool on two workers, from step 1 and from the checkpoint of step 3 of a serial run."""
    config = preset("digits").updated(**{**SMALL_VBPC, **changes})
    serial = run_on(Serial("cpu", Interruption()), config, digits, tmp_path / "serial")
    run_on(Serial("cpu", Interruption()), config.updated(steps=3), digits, tmp_path / "part")
    opened = session.open_session(config, lambda line: None, digits)
    restored = RunDirectory(tmp_path / "part").restore(opened.labels, digits.image_shape)
    assert restored is not None
    assert_same(run_on(cluster, config, digits, tmp_path / "ray"), serial)
    resumed = run_on(cluster, config, digits, tmp_path / "resumed", state=restored[0])
    assert torch.equal(resumed[0], serial[0])


def test_a_map_holds_its_shared_object_once_and_frees_it(cluster, monkeypatch):
    """20 MB shared by six tasks: the object store never holds twice as much, and nothing of it after the map. The same
    if the caller leaves in the middle."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    from fbpc_ray.execution.ray import mapping

    def store_bytes():
        context = ray.get_runtime_context()
        (node,) = ray.nodes()
        state = get_state_from_address(context.gcs_address)
        reply = get_memory_info_reply(state, node["NodeManagerAddress"], node["NodeManagerPort"])
        return reply.store_stats.object_store_bytes_used

    def add(shared, item, device):
        return float(shared[item]) + item

    size, sizes = 20_000_000, []
    shared, puts = np.full(size // 8, 0.5), []
    monkeypatch.setattr(mapping, "put", lambda value: puts.append(value) or ray.put(value))
    assert soon(lambda: store_bytes() < size / 10)
    results = {}
    for index, value in cluster.map(add, shared, range(6)):
        results[index] = value
        sizes.append(store_bytes())
    assert results == {index: index + 0.5 for index in range(6)}
    assert len(puts) == 1
    assert size <= max(sizes) < 1.5 * size
    assert soon(lambda: store_bytes() < size / 10)
    for _ in cluster.map(add, shared, range(6)):
        break
    assert soon(lambda: store_bytes() < size / 10)


def test_killed_workers_are_replaced_and_change_no_bit(cluster, small, digits, tmp_path, expected):
    """The first worker between two steps, so that its gradient comes last; then kill -9 of both amid a step."""
    import ray

    killed: list[int] = []

    def kill_both() -> None:
        killed.extend(pid for pid in gradient_workers() if kill(pid))

    timer = threading.Timer(0.05, kill_both)

    def on_step(values, step):
        if step == 1:
            ray.kill(cluster.workers.pool.workers[0].actor)
        if step == 2:
            timer.start()
        if step == 3:  # the last step but one: it may have been over sooner
            timer.join()

    cluster.lines.clear()
    assert_same(run_on(cluster, small, digits, tmp_path, on_step), expected)
    assert killed
    assert any("another worker computes it" in line for line in cluster.lines)
    assert soon(all_cpus_free)
    assert soon(lambda: not gradient_workers())


def test_tasks_return_what_serial_returns(cluster, small, digits):
    """Chains as tasks: the scores are those of the serial backend, to the last digit."""
    specs = session.network_specs(small, digits)[:1]
    state, labels = initial_state(digits, 1, 0)
    candidates = {"random": coreset.Coreset(state.images, labels, digits.mean, digits.std, digits.classes)}
    one, other = (
        evaluate(candidates, specs, digits, "test", small, backend, print).scores
        for backend in (cluster, Serial("cpu", Interruption()))
    )
    assert one == other


def test_experts_trained_on_ray_are_those_of_serial(cluster, small, digits, tmp_path):
    config = small.updated(experts=str(tmp_path / "on-ray"), architectures=("convnet-bn",), expert_epochs=1)
    stores = []
    for name, backend in (("ray", cluster), ("serial", Serial("cpu", Interruption()))):
        own = config.updated(experts=str(tmp_path / name))
        stores += train_experts(own, digits, backend)
    for index in range(2):
        one, other = (store.read(index, 1) for store in stores)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_user_error_in_a_worker_arrives_as_itself(cluster, small, digits):
    spec = session.network_specs(small, digits)[0]._replace(architecture="convnet-im")
    state, labels = initial_state(digits, 1, 0)
    chain = Chain("x", spec, 0)
    context = context_of(digits, "test", small.evaluation, state.images.numpy(), labels.numpy())
    with pytest.raises(UserError, match="did you mean convnet-in"):
        list(cluster.map(run_chain, context, [chain]))


def test_what_a_disk_says_to_a_worker_arrives_as_itself(cluster, small, digits, tmp_path):
    """With its number, which the command line turns into one line: full, read-only, a dead link."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError) as error:
        train_experts(small.updated(experts=str(tmp_path / "link")), digits, cluster)
    assert error.value.errno == errno.EEXIST
    assert error.value.filename == str(tmp_path / "link")
    assert soon(all_cpus_free)


def test_a_gpu_that_no_node_has_is_refused(cluster):
    """On the cluster that is there already: one line, and the cluster stays."""
    from fbpc_ray.execution.ray.ray_backend import RayBackend

    with pytest.raises(UserError, match="the Ray cluster has no GPU: use --device cpu"):
        RayBackend(Workers(device="cuda"), Interruption())
    assert soon(all_cpus_free)


def test_what_cannot_be_placed_is_refused_at_once(cluster, small, digits, tmp_path):
    began, before = time.monotonic(), cluster.settings
    cluster.settings = replace(before, cpus_per_actor=4.0)
    try:
        with pytest.raises(UserError, match="needs 4 CPU on one node, the nodes of the Ray cluster have 2 CPU"):
            run_on(cluster, small, digits, tmp_path)
    finally:
        cluster.settings = before
    assert time.monotonic() - began < cluster.settings.placement_timeout / 3


def listening_addresses(driver: int) -> list[tuple[str, IPv4Address | IPv6Address]]:
    """Return (title of a process, address on which it listens) of a driver and all processes below it."""
    titles = {driver: "driver", **descendants(driver)}
    return [(titles[pid], ip) for pid, ip, _ in listening(titles)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_dies_on_ray_resumes_to_the_same_bits(finished_run, small, tmp_path, number):
    """kill -9 of a driver with its own cluster, and Ctrl-C, which reaches the whole process group; resumed without Ray.

    Nothing of the cluster is left. Before Ctrl-C the driver, Ray's processes and the workers listen on loopback alone,
    by the kernel's own list of sockets. SIGTERM: test_a_run_in_a_store_stopped_and_resumed_equals_the_local_one.
    """
    folder, ray = tmp_path / "died", tempfile.mkdtemp(prefix="fr", dir="/tmp")
    address = "local" if number == signal.SIGKILL else ""  # empty, and no cluster about: the same
    words = flags(small, backend="ray", address=address, steps=12, out=str(folder), checkpoint_every=2)
    process = start("distill", *words, RAY_TMPDIR=ray)
    wait_for(RunDirectory(folder).state_path, process)
    if number == signal.SIGINT:
        os.kill(process.pid, signal.SIGSTOP)  # the run does not end meanwhile
        addresses = listening_addresses(process.pid)
        os.kill(process.pid, signal.SIGCONT)
        for part in ("driver", "gcs_server", "raylet", "ray::Worker"):
            assert any(part in title for title, _ in addresses), f"{part} listens nowhere: is this still how Ray works?"
        assert not [(title, str(ip)) for title, ip in addresses if not ip.is_loopback]
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output = process.communicate(timeout=300)[0]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, output
        assert f"fbpc distill --out {folder} --resume" in output
    assert not RunDirectory(folder).result_path.exists()
    assert soon(lambda: not processes_naming(ray)), processes_naming(ray)
    shutil.rmtree(ray, ignore_errors=True)
    distil("--out", str(folder), "--resume", "--backend", "serial")
    assert torch.equal(images_of(folder), images_of(finished_run))
