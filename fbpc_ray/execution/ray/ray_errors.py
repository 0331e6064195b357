"""Ray's exceptions as a run reads them: a lost worker, a full store, an error that a user can fix."""

import re
from typing import NoReturn

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from fbpc_ray.core.errors import UserError

WORKER_LOST = (RayActorError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError, WorkerCrashedError)
STORE_FULL = (ObjectStoreFullError, OutOfDiskError)
IMPORT_FAILED = "failed to import on the worker"
"""Part of Ray's message for a function or an actor whose module the worker cannot import."""


def innermost(error: RayError) -> BaseException:
    """Return what a remote function raised, or `error` if Ray itself raised it."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return cause


def raise_cause(error: RayError) -> NoReturn:
    """Raise a worker's UserError or OSError as itself, code that is missing as UserError, else `error`."""
    cause = innermost(error)
    if isinstance(cause, UserError):
        raise cause from None
    if isinstance(cause, OSError):
        raise cause from error
    if failure := import_failure(error):
        raise failure from None
    raise error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def import_failure(error: BaseException) -> UserError | None:
    """Return the error for a worker that cannot import the run's code; None if `error` has another cause."""
    if IMPORT_FAILED not in str(error):
        return None
    cause = str(error).strip().splitlines()[-1].strip()[:200]
    return UserError(
        f"a Ray worker cannot import the code of the run ({cause}): install it on every node, or submit the run with "
        "`ray job submit --working-dir .`",
        code=1,
    )


def join_failure(error: BaseException) -> UserError | None:
    """Return the error for a cluster that answers and that this process cannot join; None for another cause."""
    text = str(error)
    if text.startswith("Version mismatch"):
        versions = [" ".join(pair) for pair in re.findall(r"(Ray|Python): (\S+)", text)]
        return UserError(
            f"the Ray cluster runs {' and '.join(versions[:2])}, this process {' and '.join(versions[2:])}: install "
            "the cluster's versions here, or run on one of its nodes by `ray job submit`"
        )
    if text.startswith("No node info found"):
        return UserError(
            "the Ray cluster has no node on this machine, which a driver needs: run `ray start --address=HEAD:6379` "
            "here, or submit the run with `ray job submit`"
        )
    return None
