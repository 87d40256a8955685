"""A headless Chromium, driven by its DevTools protocol over a pipe: no driver package is needed.

Protocol: JSON messages that end in a zero byte, commands on the browser's file descriptor 3, answers and events on 4.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
TIMEOUT_SECONDS = 90.0


def find_chromium() -> str | None:
    """The browser's program: QWEN_QUANT_CHROMIUM, or the first known name on the PATH (None: there is none)."""
    given = os.environ.get("QWEN_QUANT_CHROMIUM")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """One open tab."""

    to_browser: int
    from_browser: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _rest: bytes = b""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come first are kept in `events`."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to_browser, data) :]
        while (answer := self._receive()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, event: str) -> None:
        """Receive until `event` has come."""
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression (run by the tester: the page itself may run no script)."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def of(self, method: str) -> list[dict[str, Any]]:
        """Parameters of every event of one kind so far."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def show(self, path: Path, width: int, *, dark: bool) -> None:
        """Open a file at `width` pixels, in light or dark, and wait until it is loaded."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self, path: Path) -> None:
        """The page as it prints."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"]))

    def _receive(self) -> dict[str, Any]:
        limit = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._rest:
            if not select.select([self.from_browser], [], [], max(0.0, limit - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {TIMEOUT_SECONDS} s")
            data = os.read(self.from_browser, 1 << 16)
            if not data:
                raise RuntimeError("the browser closed its pipe")
            self._rest += data
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)


@contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """Start the browser with its profile in `folder`; yields a tab with console, network and page events on."""
    program = find_chromium()
    assert program is not None
    command_in, command_out = os.pipe()
    answer_in, answer_out = os.pipe()

    def place_pipes() -> None:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (command_in, answer_out)]
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    command = [program, *FLAGS, *OFFLINE, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
    with open(folder / "stderr.txt", "wb") as log:
        process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=place_pipes, stdout=log, stderr=log)
    os.close(command_in)
    os.close(answer_out)
    page = Page(command_out, answer_in)
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(command_out)
        os.close(answer_in)
