"""mlflow.json of a run directory: which MLflow run this is, and whether MLflow has all of it."""

import uuid
from contextlib import suppress
from typing import NamedTuple

from fbpc_ray.core import files, inputs
from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import UserError, undamaged
from fbpc_ray.core.storage import Place
from fbpc_ray.distillation.run_directory import RunDirectory


class RunReference(NamedTuple):
    """The MLflow run of a distillation. The file chooses a run, never a store: it may be a stranger's."""

    uri: str
    """Of the store, without password."""
    run_id: str
    """Empty until the store has answered."""
    key: str
    """The run has it as a tag from its first moment; empty in files of earlier code."""
    delivered: bool
    """Whether MLflow has the result and the end of the run; True in files of earlier code."""

    def is_of(self, uri: str) -> bool:
        """Return whether the run is in the store `uri`, whatever password that has."""
        return redacted(self.uri) == redacted(uri)


def path_of(run: RunDirectory) -> Place:
    """Return the path of the reference."""
    return run.folder / "mlflow.json"


def read(run: RunDirectory) -> RunReference | None:
    """Return the reference; None where no run was tracked. Raises UserError for a damaged file."""
    path = path_of(run)
    if not path.exists():
        return None
    with undamaged(path, "delete it, and the run is logged as a new one"):
        value = inputs.read_checked_json(path)
        uri, run_id, key = map(_printable, (value["uri"], value["run_id"], value.get("key", "")))
        return RunReference(uri, run_id, key, value.get("delivered", True) is True)


def of_store(run: RunDirectory, uri: str) -> RunReference:
    """Return the reference to a run in the store `uri`; a new one, with a key of its own, where there is none."""
    reference = read(run)
    if reference is None or not reference.is_of(uri):
        return RunReference(uri, "", uuid.uuid4().hex, False)
    return reference


def write(run: RunDirectory, reference: RunReference) -> None:
    """Write the reference, for its owner alone and without password."""
    reference = reference._replace(uri=redacted(reference.uri))
    with suppress(UserError):  # a damaged file is replaced
        if read(run) == reference:
            return
    files.write_checked_json(path_of(run), reference._asdict(), private=True)


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(text))
