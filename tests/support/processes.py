"""What runs on this machine, by the kernel's own account; only what a test started itself is looked at or killed."""

import contextlib
import ipaddress
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def descendants(root: int) -> dict[int, str]:
    """{pid: title} of the living children of `root`, their children, and so on."""
    titles, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if status[0] != "Z":
                    parents[int(folder.name)] = int(status[1])
                    titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    result, level = {}, {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        result |= {pid: titles[pid] for pid in level}
    return result


def listening(pids: Iterable[int]) -> list[tuple[int, ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """(pid, address, port) of every TCP socket on which one of the processes waits for connections."""
    sockets = {}
    for family in ("tcp", "tcp6"):
        for line in Path("/proc/net", family).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                address, port = words[1].split(":")
                raw = bytes.fromhex(address)  # 32-bit words in this machine's order
                raw = (
                    b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
                    if sys.byteorder == "little"
                    else raw
                )
                result = ipaddress.ip_address(raw)
                sockets[f"socket:[{words[9]}]"] = getattr(result, "ipv4_mapped", None) or result, int(port, 16)
    items = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path("/proc", str(pid), "fd").iterdir():
                with contextlib.suppress(OSError):
                    if (name := str(link.readlink())) in sockets:
                        items.append((pid, *sockets[name]))
    return items


def gradient_workers(root: int | None = None) -> list[int]:
    """Processes of gradient workers below this process (or `root`), the oldest first."""
    below = descendants(os.getpid() if root is None else root)
    return sorted(pid for pid, title in below.items() if title.startswith("ray::Worker"))


def processes_naming(folder: str) -> list[int]:
    """Return the processes whose command line names the folder."""
    items = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if folder.encode() in (entry / "cmdline").read_bytes():
                    items.append(int(entry.name))
    return items


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False where the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def raised_at_once(work: Callable[[], object], count: int) -> list[Exception]:
    """What `count` threads raised that did the same work at the same time."""
    items: list[Exception] = []

    def one() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            items.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return items


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped: not gone, and no zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def soon(holds: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Whether something holds within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return holds()


def free_port() -> int:
    """Of those that the kernel gives nobody by itself, nor Ray its workers: it must still be free when a server that
    takes seconds to start comes to take it."""
    draw = random.SystemRandom()
    while True:
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port := draw.randrange(20000, 32000)))
            return port


def all_cpus_free() -> bool:
    """Whether nothing holds a CPU of the Ray cluster that this process is connected to."""
    import ray

    return ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU")
