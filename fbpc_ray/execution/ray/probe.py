"""Probe a Ray cluster before ray.init connects to it.

ray.init takes a minute to fail, fills the screen meanwhile, and reports a refused token as a cluster that does not
answer.
"""

from typing import Any

import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from fbpc_ray.core.errors import UserError

requests: Any = gcs_service_pb2  # protobuf creates its names at import
PROBE_SECONDS = 10.0
"""Timeout; a running cluster answers in milliseconds."""


def probe(address: str) -> None:
    """Request the id of the cluster at `address` (host:port). Raises UserError if it does not answer or refuses."""
    channel = init_grpc_channel(address)  # with the token, or TLS, that the environment asks for
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.GetClusterId(requests.GetClusterIdRequest(), timeout=PROBE_SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused("it is another, or none") from None
        raise UserError(
            f"no Ray cluster answers at {address} within {PROBE_SECONDS:g} s: check --address and RAY_ADDRESS "
            "(host:port of its head, not of the dashboard), or use --address local"
        ) from None
    finally:
        channel.close()


def refused(reason: str) -> UserError:
    """Return the error for a token that the cluster refuses."""
    return UserError(
        f"the Ray cluster refuses our token ({reason}): set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "~/.ray/auth_token to the cluster's token"
    )
