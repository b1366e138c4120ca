"""A real headless Chromium, driven through its debugging pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

TIMEOUT_S = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
    "--window-size=1320,900",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Chromium's program, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """One tab: what it asked the network for, what went wrong in it, and what its scripts answer."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    @property
    def requests(self) -> list[str]:
        """Addresses of everything that was asked for, but for `data:`, which is in the page itself."""
        urls = [e["params"]["request"]["url"] for e in self._events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def troubles(self) -> list[str]:
        """Exceptions, console errors, and what the content security policy blocked."""
        thrown = [
            json.dumps(e["params"]["exceptionDetails"]) for e in self._events("Runtime.exceptionThrown")
        ]
        logged = [e["params"]["entry"]["text"] for e in self._events("Log.entryAdded")]
        said = [json.dumps(e["params"]["args"]) for e in self._events("Runtime.consoleAPICalled")]
        return thrown + logged + said

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def open(self, path: Path) -> str:
        """Loads a file and waits until its charts are drawn; returns "true" or "failed"."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        return self.evaluate(
            "new Promise((done) => { const look = () => document.readyState === 'complete' && "
            "document.documentElement.dataset.drawn ? done(document.documentElement.dataset.drawn) "
            ": setTimeout(look, 20); look(); })"
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a script's expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _events(self, method: str) -> list[dict[str, Any]]:
        events = self._browser.events
        return [e for e in events if e.get("method") == method and e.get("sessionId") == self._session]


class Browser:
    """Speaks the debugging protocol: JSON messages that end in a zero byte."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._to, self._from = to_browser, from_browser
        self._pending = b""
        self._last_id = 0

    @contextmanager
    def page(self) -> Iterator[Page]:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        yield page
        self.call("Target.closeTarget", targetId=target)

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium did not answer within {TIMEOUT_S:.0f} s"
            data = os.read(self._from, 1 << 20)
            assert data, "Chromium ended"
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)


@contextmanager
def running_chromium(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own; ended, with all its processes, on the way out."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        browser_in, to_browser = _high_pipe()
        from_browser, browser_out = _high_pipe()
        # The browser reads descriptor 3 and writes descriptor 4, which a shell can be told.
        command = f'exec "$@" 3<&{browser_in} 4>&{browser_out} {browser_in}<&- {browser_out}>&-'
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(browser_in, browser_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": profile, "HOME": profile},
            start_new_session=True,
        )
        os.close(browser_in)
        os.close(browser_out)
        try:
            browser = Browser(to_browser, from_browser)
            browser.call("Browser.getVersion")  # answered once all that a browser starts with is there
            yield browser
        finally:
            os.close(to_browser)
            os.close(from_browser)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(TIMEOUT_S)
            _end_daemons(profile)


def _end_daemons(profile: str) -> None:
    """Ends what the browser detached from itself: its crash handlers, which came to this process."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(profile in argument for argument in child.cmdline()):
                child.kill()
                child.wait(TIMEOUT_S)


def _high_pipe() -> tuple[int, int]:
    """A pipe whose descriptors are none of those that the browser wants for itself."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in low)
    for descriptor in low:
        os.close(descriptor)
    return high[0], high[1]
