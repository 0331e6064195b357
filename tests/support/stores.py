"""Object stores that run here: moto's S3 server, an emulator of Google's, and a wire to either that can be cut."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from support.processes import free_port, soon

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a running S3 server that has the bucket."""
    port = free_port()
    with _running(port, "moto.server", "-H", "127.0.0.1", "-p", str(port)):
        scope = "AWS4-HMAC-SHA256 Credential=me/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
        address = f"http://127.0.0.1:{port}/{BUCKET}"
        request = urllib.request.Request(address, method="PUT", headers={"Authorization": scope})
        assert urllib.request.urlopen(request, timeout=30).status == 200
        yield port


@contextmanager
def gs_server() -> Iterator[int]:
    """The port of a running server of Google's protocol that has the bucket."""
    port = free_port()
    words = ("--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", BUCKET)
    with _running(port, "gcp_storage_emulator", "start", *words):
        yield port


@contextmanager
def _running(port: int, module: str, *words: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert soon(lambda: process.poll() is not None or _answers(port))
        assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


class Wire:
    """Carries bytes between a client and the server at `port`; what passes is counted, slowed down, or cut."""

    def __init__(self, port: int):
        self.server, self.sent, self.received = port, 0, 0
        """sent, received: bytes to and from the server."""
        self.cut_at: tuple[bytes, int] | None = None
        """(what the head of a request must contain, how much of its body the server still gets)."""
        self.spared = 0
        """Requests that `cut_at` fits, and that pass all the same, before the first that is cut."""
        self.cuts = 0
        self.bytes_a_second = float("inf")
        self.requests: list[bytes] = []
        """First lines."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self.server))
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        left: int | None = None
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE"):
                    self.requests.append(data.split(b"\r\n", 1)[0])
                if self.cut_at and left is None and self.cut_at[0] in data:
                    if self.spared:
                        self.spared -= 1
                    else:
                        left = data.index(b"\r\n\r\n") + 4 + self.cut_at[1]
                if left is not None:
                    server.sendall(data[:left])
                    left -= len(data)
                    if left <= 0:
                        self.cuts += 1
                        break
                else:
                    server.sendall(data)
                self.sent += len(data)
                time.sleep(len(data) / self.bytes_a_second)
        _end(client, server)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
                self.received += len(data)
                time.sleep(len(data) / self.bytes_a_second)
        _end(client, server)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
