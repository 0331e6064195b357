"""Read and write files in a local path (NFS too) or an object store, s3:// or gs://.

`place` parses a user's text. A `Remote` has those methods of pathlib.Path that this package uses, so that the same code
serves both. It is plain data: each process opens the store itself, with the credentials and the endpoint of its own
environment. A request that the store refuses raises a UserError within seconds.
"""

import errno
import fnmatch
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.errors import UserError

CONNECT, SILENT, ATTEMPTS = 4.0, 6.0, 5
"""S3: seconds to connect, seconds without a byte, and how often a request is made."""
RETRY = timedelta(seconds=10)
"""Google: how long a request is tried again."""
PART = 40 * 2**20
"""Bytes of an upload in flight at a time: four of Arrow's parts."""
CHUNK = 8 * 2**20
"""Bytes of a download read at a time."""


@dataclass(frozen=True)
class Remote:
    """An object, or a prefix, of an object store."""

    scheme: str
    """s3 | gs."""
    key: str
    """BUCKET/PREFIX, without slashes at its ends."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.scheme, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    def with_suffix(self, suffix: str) -> "Remote":
        return Remote(self.scheme, str(Path(self.key).with_suffix(suffix)))

    def absolute(self) -> "Remote":
        return self

    def exists(self) -> bool:
        return self._kind() != "NotFound"

    def is_file(self) -> bool:
        return self._kind() == "File"

    def is_dir(self) -> bool:
        return self._kind() == "Directory"

    def iterdir(self) -> "Iterator[Remote]":
        """Iterate over the objects directly below, without prefixes, which not all stores list."""
        from pyarrow.fs import FileSelector

        with _translate_errors(self, "listed"):
            infos = self._store().get_file_info(FileSelector(self.key, allow_not_found=True))
        return iter([Remote(self.scheme, info.path) for info in infos if info.type.name == "File"])

    def glob(self, pattern: str) -> "Iterator[Remote]":
        """Iterate over the objects directly below whose name matches `pattern`."""
        return (child for child in self.iterdir() if child.match(pattern))

    def match(self, pattern: str) -> bool:
        return fnmatch.fnmatchcase(self.name, pattern)

    def chunks(self) -> Iterator[bytes]:
        """Read the object chunk by chunk. Raises FileNotFoundError."""
        with _translate_errors(self, "read"), self._store().open_input_stream(self.key) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk

    def read_bytes(self) -> bytes:
        return b"".join(self.chunks())

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Write the object; it appears, or is replaced, when the store has all of it."""
        self._send(memoryview(data))

    def upload(self, path: Path) -> None:
        """Write a local file by `write_bytes`."""
        import pyarrow as pa

        with pa.memory_map(str(path)) as file:
            self._send(memoryview(file.read_buffer()))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _translate_errors(self, "deleted"):
                self._store().delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _send(self, data: memoryview) -> None:
        """Upload `data`, all or nothing.

        Arrow completes an upload when its stream is closed or dropped, whatever was written by then: an exception in
        between would leave a truncated object. So the upload runs in a thread, where no signal handler can raise, and
        flushes each part: after a failed part the stream completes nothing.
        """
        store = self._store()

        def send() -> None:
            with _translate_errors(self, "written"), store.open_output_stream(self.key) as stream:
                for start in range(0, len(data), PART):
                    stream.write(data[start : start + PART])
                    stream.flush()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(send).result()

    def _kind(self) -> str:
        with _translate_errors(self, "read"):
            kind = self._store().get_file_info(self.key).type.name
        if kind == "NotFound":
            self._check_bucket()
        return kind

    def _check_bucket(self) -> None:
        """Raise UserError if the bucket is missing: stores report a missing object for that, too."""
        bucket = self.key.partition("/")[0]
        import pyarrow as pa

        try:
            exists = self._store().get_file_info(bucket).type.name != "NotFound"
        except (OSError, pa.ArrowException):  # credentials may grant access to objects and not to their bucket
            return
        if not exists:
            raise UserError(f"{self.scheme}://{bucket}: bucket not found; create it, or check the address", code=1)

    def _store(self) -> Any:
        prefixes = ("AWS_",) if self.scheme == "s3" else ("GOOGLE_", "STORAGE_EMULATOR_HOST", "CLOUDSDK_")
        return _opened(self.scheme, tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith(prefixes))))


Place = Path | Remote


def place(text: str) -> Place:
    """Parse a local path or an object store's address.

    Raises UserError for an unknown scheme, an address without a bucket or with keys, and a name that no file can have.
    """
    _check_name(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            user = text.partition("/")[0]
            raise UserError(f"{text}: the home of {user} is unknown; write the path in full") from None
    if scheme not in ("s3", "gs"):
        raise UserError(f"{redacted(text)}: give a local path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    if redacted(text) != text:
        fix = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if scheme == "s3" else "GOOGLE_APPLICATION_CREDENTIALS"
        raise UserError(f"{redacted(text)}: an address holds no keys; set {fix}")
    key = re.sub("/+", "/", rest).strip("/")
    if not key:
        raise UserError(f"{text} names no bucket: write {scheme}://BUCKET/PREFIX")
    return Remote(scheme, key)


MAX_NAME, MAX_PATH = 255, 4095
"""Bytes of a name and of a path, on Linux."""


def _check_name(text: str) -> None:
    """Raise UserError for a name that no file can have, and for one that config.json and MLflow can't hold."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{text}: must be UTF-8; rename the file or the folder") from None
    if "\0" in text:
        raise UserError(f"{text}: must hold no NUL character; check the path")
    longest = max(len(name.encode()) for name in text.split("/"))
    if size > MAX_PATH or longest > MAX_NAME:
        raise UserError(
            f"{text[:60]}...: must have at most {MAX_NAME} bytes per name and {MAX_PATH} in all; shorten it"
        )


def local_folder(text: str, flag: str) -> Path:
    """Parse the path of a folder that must be local. Raises UserError for an object store."""
    folder = place(text)
    if isinstance(folder, Remote):
        raise UserError(f"{flag}: must be a local folder, got {text}")
    return folder


@contextmanager
def local(where: Place) -> Iterator[Path]:
    """Give a local file of `where`: itself or, for an object, a copy of the same name, deleted after the block."""
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="fbpc-") as folder:
        copy = Path(folder) / where.name
        with copy.open("wb") as file:
            file.writelines(where.chunks())
        yield copy


@lru_cache(maxsize=4)
def _opened(scheme: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """Open the store for these variables; its own library finds the credentials."""
    from pyarrow import fs

    variables = dict(environment)
    if scheme == "gs":
        secure, host = _endpoint(variables.get("STORAGE_EMULATOR_HOST", ""), "http")
        options = {"anonymous": True, "scheme": secure, "endpoint_override": host} if host else {}
        return fs.GcsFileSystem(retry_time_limit=RETRY, **options)
    secure, host = _endpoint(variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL", ""), "https")
    region = variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION") or ("us-east-1" if host else None)
    return fs.S3FileSystem(
        scheme=secure, endpoint_override=host or None, region=region, tls_ca_file_path=variables.get("AWS_CA_BUNDLE"),
        connect_timeout=CONNECT, request_timeout=SILENT,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # small objects in one request
        background_writes=True,  # `_send` relies on it: without, a stream forgets the part that failed
    )  # fmt: skip


def _endpoint(address: str, otherwise: str) -> tuple[str, str]:
    """Split an address into (http or https, host:port); without a scheme it is `otherwise`."""
    secure, _, host = address.rpartition("://")
    return secure or otherwise, host.rstrip("/")


@contextmanager
def _translate_errors(where: Remote, action: str) -> Iterator[None]:
    """Turn the store's errors into FileNotFoundError for a missing object, else into a UserError of one line."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        where._check_bucket()
        if action == "written":
            raise UserError(f"{where} cannot be written (not found): check the address", code=1) from None
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where)) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        reason, fix = _explain(where.scheme, str(error))
        note = "; what was there before is whole: run the same command with --resume" if action == "written" else ""
        raise UserError(f"{where} cannot be {action} ({redacted(reason)}): {fix}{note}", code=1) from error


CREDENTIALS = {
    "s3": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and what they may do",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`, and what they may do",
}
NETWORK = {"s3": "check the network, AWS_REGION and AWS_ENDPOINT_URL", "gs": "check the network"}
FIXES = (
    (r"NO_SUCH_BUCKET|NoSuchBucket", {"s3": "make the bucket, or check the address"}),
    (r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|TOKEN|CREDENTIAL|HTTP status 40[13]", CREDENTIALS),
    (r"PERMISSION_DENIED|UNAUTHENTICATED|OAuth2|status code: 40[13]", CREDENTIALS),
    (r"HTTP status 301|PermanentRedirect|region", {"s3": "set AWS_REGION to the region of the bucket"}),
    (r"NETWORK_CONNECTION|CURL|UNAVAILABLE|curlCode", NETWORK),
)
"""(pattern of a store's error, fix by scheme); the first match counts."""


def _explain(scheme: str, error: str) -> tuple[str, str]:
    """Return (cause, fix) of an error of Arrow, which is long and begins with Arrow's own context."""
    fixes = (by_scheme[scheme] for pattern, by_scheme in FIXES if scheme in by_scheme and re.search(pattern, error))
    lines = error.strip().splitlines() or ["no reason given"]
    cause = re.sub(r".*?(during \w+ operation: |underlying error message was: |last message of )", "", lines[0])
    cause = re.sub(r"No response body|(curlCode: \d+, |.*CURL error \[\d+\]=)|; Details: .*", "", cause)
    cause = re.sub(r" ?\(Request ID.*| error_info=.*|[})]*$", "", cause).strip(" .")
    if not cause:
        code = re.search(r"AWS Error (\w+)", lines[0])
        cause = code[1].replace("_", " ").lower() if code else lines[0]
    return cause[:200], next(fixes, "check the address and the store")
