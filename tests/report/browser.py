"""A headless Chromium, driven over a pipe by its DevTools protocol: no library, no port, no network."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 60.0
# Some descriptors below are the protocol's own (3 and 4).
_LEAST_DESCRIPTOR = 10


def find_browser() -> str | None:
    """The browser named in CHROMIUM, that of scripts/browser_env.sh, or the system's; None without one."""
    own = ROOT / ".browser" / "bin" / "chromium"
    named = (os.environ.get("CHROMIUM"), str(own) if own.is_file() else None)
    usual = map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))
    return next((found for found in (*named, *usual) if found), None)


class Tab:
    """One page, and everything that it said and asked for."""

    def __init__(self, browser: _Pipe, session: str) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> Any:
        """The answer to one command."""
        return self._browser.ask(method, params, self._session)

    def open(self, page: Path, *, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        """Shows a file as a device of this many CSS pixels does, without a network."""
        mobile = width < 600
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.ask("Network.emulateNetworkConditions", **offline)
        self._browser.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        self._browser.wait("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression of plain values gives; the page's own policy does not forbid it."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, file: Path) -> None:
        """The page as it is printed on A4."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
        file.write_bytes(base64.b64decode(self.ask("Page.printToPDF", **paper)["data"]))

    @property
    def requests(self) -> list[str]:
        """Addresses asked for since ``open``."""
        told = self._browser.told("Network.requestWillBeSent")
        return [event["request"]["url"] for event in told]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console since ``open``, violations of the page's policy included."""
        logged = [
            event["entry"]["text"]
            for event in self._browser.told("Log.entryAdded")
            if event["entry"]["level"] in ("warning", "error")
        ]
        thrown = [json.dumps(event) for event in self._browser.told("Runtime.exceptionThrown")]
        said = [json.dumps(event) for event in self._browser.told("Runtime.consoleAPICalled")]
        return logged + thrown + said


@contextmanager
def browser_tab(program: str, profile: Path) -> Iterator[Tab]:
    """A tab of a browser that runs as long as the block; ``profile``: an empty folder."""
    pipe = _Pipe(program, profile)
    try:
        target = pipe.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = pipe.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        yield Tab(pipe, session)
    finally:
        pipe.close()


class _Pipe:
    """The browser's process; JSON messages with a zero byte after each, in on descriptor 3, out on 4."""

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._left, self._asked = b"", 0
        theirs_in, self._out = _high_pipe()
        self._in, theirs_out = _high_pipe()
        options = [
            *("--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"),
            *(
                "--no-first-run",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
            ),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *options],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def ask(self, method: str, params: dict[str, Any], session: str | None = None) -> Any:
        self._asked += 1
        message: dict[str, Any] = {"id": self._asked, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._asked:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait(self, event: str) -> None:
        """Until the browser has told of an event of this name."""
        while not self.told(event):
            self.events.append(self._next())

    def told(self, event: str) -> list[dict[str, Any]]:
        """What events of this name said."""
        return [found["params"] for found in self.events if found.get("method") == event]

    def close(self) -> None:
        """Ends the browser."""
        try:
            self.ask("Browser.close", {})
        except (OSError, AssertionError):
            self._process.kill()
        self._process.wait(_SECONDS)
        os.close(self._in)
        os.close(self._out)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _SECONDS
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._in, 1 << 20) if ready else b""
            assert chunk, "the browser ended" if ready else "the browser does not answer"
            self._left += chunk
        message, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


def _high_pipe() -> tuple[int, int]:
    """The ends of a pipe, for reading and for writing, away from the descriptors of the protocol."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _LEAST_DESCRIPTOR) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
