"""Servers of object stores on loopback, and the names of what lies there."""

import os

import pytest
from support.remote_files import S3, use
from support.stores import BUCKET, Wire, gs_server, s3_server

from fbpc_ray.core import storage
from fbpc_ray.core.storage import Remote


@pytest.fixture(scope="session")
def servers():
    """{scheme: port}."""
    with s3_server() as s3, gs_server() as gs:
        yield {"s3": s3, "gs": gs}


@pytest.fixture(autouse=True)
def environment(servers, monkeypatch, tmp_path):
    """Variables with which both servers are found, and a cache of the test's own."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "FBPC_")):
            monkeypatch.delenv(name)
    for name, value in S3.items():
        monkeypatch.setenv(name, value)
    use(monkeypatch, "s3", servers["s3"])
    use(monkeypatch, "gs", servers["gs"])
    monkeypatch.setenv("FBPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "ATTEMPTS", 2)  # for the tests' time; commands in processes of their own have all
    monkeypatch.setattr(storage, "RETRY", storage.timedelta(seconds=2))
    storage._opened.cache_clear()


@pytest.fixture
def wire(servers, monkeypatch):
    """Between this test and the S3 server."""
    wire = Wire(servers["s3"])
    use(monkeypatch, "s3", wire.port)
    yield wire
    wire.close()


@pytest.fixture(params=["s3", "gs"])
def folder(request, tmp_path) -> Remote:
    """A prefix that no other test has."""
    return Remote(request.param, f"{BUCKET}/{tmp_path.name}")


@pytest.fixture
def s3(tmp_path) -> Remote:
    return Remote("s3", f"{BUCKET}/{tmp_path.name}")
