"""Redaction: no secret of an address stays, and an address without one stays as it is."""

import pytest

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import place


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://user:secret@host:5000/x", "http://***@host:5000/x"),
        ("https://token@host", "https://***@host"),
        ("postgresql+psycopg2://u:p/a@s:s@host:5432/db", "postgresql+psycopg2://***@host:5432/db"),
        ("mysql://u:p%40ss@host/db?charset=utf8", "mysql://***@host/db?charset=utf8"),
        ("s3://KEY:SECRET@bucket/prefix", "s3://***@bucket/prefix"),
        (
            "s3://bucket/x?access_key=AB&secret_key=CD&region=eu",
            "s3://bucket/x?access_key=***&secret_key=***&region=eu",
        ),
        ("https://host/a?X-Amz-Signature=ab12&X-Amz-Date=1", "https://host/a?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://host/a?sp=r&sig=a%2Fb", "https://host/a?sp=r&sig=***"),
        ("key AKIAIOSFODNN7EXAMPLE refused", "key *** refused"),
        ("two: http://a:b@c and http://d:e@f", "two: http://***@c and http://***@f"),
        # without a secret
        ("http://127.0.0.1:5000/#/experiments/1/runs/a", "http://127.0.0.1:5000/#/experiments/1/runs/a"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("sqlite:////home/a b/mlflow.db", "sqlite:////home/a b/mlflow.db"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("accuracy 91.5 %, mail a@b", "accuracy 91.5 %, mail a@b"),
        ("", ""),
    ],
)
def test_redacted(address: str, expected: str):
    assert redacted(address) == expected
    assert redacted(expected) == expected


def test_a_secret_of_the_environment_is_replaced_wherever_it_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0psecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")  # too short: it stands in every word
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")  # as short as one may be
    assert redacted("the server answered: t0psecret is unknown") == "the server answered: *** is unknown"
    assert redacted("sesame was no token") == "*** was no token"


def test_an_address_with_keys_is_refused_without_printing_them():
    """Arrow would take them out of the address, which is written to config.json."""
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as caught:
        place("s3://AKIAIOSFODNN7EXAMPLE:hidden@bucket/run")
    assert "hidden" not in str(caught.value) and "AKIA" not in str(caught.value)
