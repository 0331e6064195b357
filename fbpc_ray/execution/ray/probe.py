"""Whether a Ray cluster is there and takes our token, asked before we join it: ray.init needs a minute to find out,
fills the screen meanwhile, and takes a refused token for a cluster that doesn't answer."""

from typing import Any

import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from fbpc_ray.core.errors import UserError

requests: Any = gcs_service_pb2  # its names are made at import
SECONDS = 10.0
"""A cluster that is there answers in milliseconds."""


def probe(address: str) -> None:
    """Ask the cluster at `address` (host:port) for its id. Raises UserError where it doesn't answer or refuses us."""
    channel = init_grpc_channel(address)  # with the token, or TLS, that the environment asks for
    try:
        asking = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId
        asking(requests.GetClusterIdRequest(), timeout=SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused("it is another, or none") from None
        raise UserError(
            f"no Ray cluster answers at {address} within {SECONDS:g} s: check --address and RAY_ADDRESS (host:port of "
            "its head, not of the dashboard), or use --address local"
        ) from None
    finally:
        channel.close()


def refused(why: str) -> UserError:
    """Of a token that a cluster doesn't take."""
    return UserError(
        f"the Ray cluster refuses our token ({why}): set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token "
        "to the cluster's own"
    )
