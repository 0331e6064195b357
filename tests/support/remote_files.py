"""Servers of object stores on loopback, and the names of what lies there."""

from pathlib import Path

from fbpc_ray.core import storage
from fbpc_ray.core.storage import Remote

ROOT = Path(__file__).parents[2]
ATTEMPTS = storage.ATTEMPTS
S3 = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "mine", "AWS_EC2_METADATA_DISABLED": "true"}


def use(monkeypatch, scheme: str, port: int) -> None:
    name = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}[scheme]
    monkeypatch.setenv(name, f"http://127.0.0.1:{port}")


def names(where: Remote) -> list[str]:
    return sorted(entry.name for entry in where.iterdir())
