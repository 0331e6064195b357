"""A server on loopback that records each request that it gets, and answers none with success."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Recorder(NamedTuple):
    """The server."""

    address: str
    requests: list[str]
    """`METHOD path` and the headers of each request."""


@contextmanager
def recording() -> Iterator[Recorder]:
    """Run the server for the block."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(f"{self.command} {self.path}\n{self.headers}")
            self.send_error(404)

        do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Recorder(f"http://127.0.0.1:{server.server_port}", requests)
        finally:
            server.shutdown()
