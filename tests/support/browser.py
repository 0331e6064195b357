"""A headless Chromium that does what it is told over a pipe (DevTools protocol), for pages that are programs."""

import base64
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

CHROMIUM = shutil.which("chromium")
browsed = pytest.mark.skipif(not CHROMIUM, reason="needs chromium: make browser")
"""Tests that look at a page."""
Found = TypeVar("Found")
SECONDS = 300
"""That a page may take: the machine may be busy."""


class Gone(Exception):
    """Chromium ended, or answers no more."""


class Page:
    """One tab."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._rest, self._count, self._session = to_browser, from_browser, b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._next(end)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                raise Gone("it ended" if ready else "it does not answer")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, address: str) -> None:
        """Load a page from scratch, as a new tab does; `until` waits for what it shows."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def text(self) -> str:
        """What a reader sees."""
        return self.ask("document.body ? document.body.innerText : ''")

    def until(self, script: str, label: str = "") -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.ask(script)):
            assert time.monotonic() < end, f"never: {label or script}; the page shows {self.text()[:3000]}"
            time.sleep(0.2)
        return value

    def reads(self, *words: str) -> str:
        """The text of the page as soon as it holds all of `words`."""
        self.until(f"{json.dumps(words)}.every(word => document.body?.innerText.includes(word))", f"{words}")
        return self.text()

    def click(self, script: str) -> None:
        """Click the element that an expression finds, as soon as it is there."""
        self.until(f"(() => {{ const found = {script}; found?.click(); return Boolean(found) }})()", script)

    def down(self, script: str) -> None:
        """Scroll all that scrolls to its end, until an expression is true: long pages make their parts when needed."""
        ends = "[...document.querySelectorAll('*')].forEach(each => { each.scrollTop = 1e6 })"
        self.until(f"(() => {{ {ends}; return {script} }})()", script)

    def press(self, *keys: str) -> None:
        """Keys that go to what has the focus, such as ArrowRight."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def picture(self, path: Path) -> None:
        """A PNG of what the window shows."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def visit(folder: Path, look: Callable[[Page], Found]) -> Found:
    """Look at pages in a new Chromium; again where it ended without a word, as on a busy machine it may."""
    log = ""
    for attempt in range(3):
        profile = folder / f"chromium-{attempt}"
        profile.mkdir(parents=True)
        try:
            with opened(profile) as page:
                return look(page)
        except (Gone, BrokenPipeError):
            log = (profile / "chromium.log").read_text(errors="replace")[-1000:]
    raise AssertionError(f"Chromium ended three times: {log}")


@contextlib.contextmanager
def opened(folder: Path, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """A tab of a Chromium of its own, whose profile is a new folder in `folder`; all of it ends with the block."""
    words = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", f"--window-size={width},{height}",
        f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe",
    ]  # fmt: skip
    commands, answers = os.pipe(), os.pipe()
    script = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
    with (folder / "chromium.log").open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            pass_fds=(commands[0], answers[1]), start_new_session=True,
        )  # fmt: skip
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(commands[1], answers[0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(commands[1])
        os.close(answers[0])


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)
