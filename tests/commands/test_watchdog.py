"""A command below the watchdog ends with its parent; `fbpc ui` waits as long as its server lives, and says so."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import alive, kill, soon

from fbpc_ray.commands import ui, watchdog
from fbpc_ray.core.errors import UserError

PARENT = """
import subprocess, sys
process = subprocess.Popen(
    [sys.executable, "-I", "-S", {watchdog!r}, "sh", "-c", {script!r}], stdin=subprocess.PIPE, process_group=0
)
process.wait()
"""


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    items = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and alive(int(folder.name)):
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(status[2]) == group:
                items.append(int(folder.name))
    return items


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_killed_parent_takes_the_command_and_its_children_along(stubborn: bool, tmp_path: Path):
    """Those that ignore SIGTERM, too."""
    ignore = "trap '' TERM; " if stubborn else ""
    code = Path(watchdog.__file__).read_text().replace("END_SECONDS = 0.5, 10.0", "END_SECONDS = 0.1, 0.5")
    (tmp_path / "watchdog.py").write_text(code)
    script = f"{ignore}sleep 600 & echo $$; wait"
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", PARENT.format(watchdog=str(tmp_path / "watchdog.py"), script=script)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout
    group = os.getpgid(int(parent.stdout.readline()))
    assert len(members(group)) == 3  # the watchdog, the shell, sleep
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    try:
        assert soon(lambda: not members(group))
    finally:
        for pid in members(group):
            kill(pid)


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_the_commands_status_is_passed_on(script: str, status: int):
    words = [sys.executable, "-I", "-S", watchdog.__file__, "sh", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, process_group=0) as process:
        assert process.wait() == status


class Server:
    """A server that lives until the clock reads `ends`."""

    def __init__(self, ends: float, monkeypatch: pytest.MonkeyPatch):
        self.now, self.ends = 0.0, ends
        monkeypatch.setattr(ui.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ui.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def poll(self) -> int | None:
        return None if self.now < self.ends else 1


def wait(server: Server, timeout: float, lines: list[str]) -> None:
    ui._wait(server, io.BytesIO(b"OSError: no room\n"), 1, timeout, lines.append)  # type: ignore[arg-type]


def test_it_waits_as_long_as_the_server_lives_and_says_so_every_15_seconds(monkeypatch: pytest.MonkeyPatch):
    server, lines = Server(1e9, monkeypatch), []
    monkeypatch.setattr(ui, "_answers", lambda port: server.now > 400)
    wait(server, 0, lines)
    assert [line.split(", ")[1] for line in lines] == [f"{15 * k} s so far; Ctrl-C ends it" for k in range(1, 27)]


@pytest.mark.parametrize(
    ("timeout", "ends", "message"),
    [
        (20.0, 1e9, "--timeout: MLflow did not answer within 20 s; give more seconds, or 0 .*: OSError: no room"),
        (0.0, 7.0, "can't show this store"),
    ],
)
def test_the_wait_ends_with_the_server_or_the_timeout(timeout, ends, message, monkeypatch: pytest.MonkeyPatch):
    server = Server(ends, monkeypatch)
    monkeypatch.setattr(ui, "_answers", lambda port: False)
    with pytest.raises(UserError, match=message):
        wait(server, timeout, [])
    assert server.now == pytest.approx(timeout or ends, abs=0.3)


def test_a_negative_timeout_is_refused():
    with pytest.raises(UserError, match="--timeout: must be 0 or more, got -1"):
        ui.ui("", 0, -1.0, lambda line: None)
