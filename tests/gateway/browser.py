"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.gateway.server import wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def find_browser() -> str:
    """The path of a Chromium. Skips the test without one, unless TESSERA_REQUIRE_BROWSER=1: then it fails."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    reason = f"no browser on this machine: none of {', '.join(NAMES)} is on the PATH"
    if os.environ.get("TESSERA_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Browser:
    """Context manager: one page of a fresh browser profile. `problems` collects what the page's console says."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ids = itertools.count(1)
        self.problems: list[str] = []

    def __enter__(self) -> Browser:
        with contextlib.ExitStack() as stack:
            profile = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True))
            )
            stack.callback(_kill, self._start(profile))
            port_file = profile / "DevToolsActivePort"
            wait_until(lambda: port_file.exists() and port_file.read_text().count("\n"), "the browser")
            address = _page_address(port_file.read_text().split()[0])
            self._socket = stack.enter_context(connect(address, max_size=None, open_timeout=60))
            for domain in ("Page", "Runtime", "Log"):
                self.send(f"{domain}.enable")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, profile: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self._path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command and its result. AssertionError where the browser reports an error."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def open(self, url: str) -> None:
        """Navigates and waits until the page has loaded."""
        self.send("Page.navigate", url=url)
        wait_until(lambda: self.js("document.readyState") == "complete" and self.js("location.href") == url, url)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, element_id: str) -> str:
        """What an element reads."""
        return str(self.js(f"document.getElementById({element_id!r}).textContent"))

    def wait_for(self, expression: str, timeout_s: float = 10.0) -> None:
        """Blocks until an expression in the page is true."""
        wait_until(lambda: self.js(f"Boolean({expression})"), expression, timeout_s)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """Presses and releases a key such as "Tab", "Enter" or "Escape"."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37}
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                modifiers=2 if ctrl else 0,
            )

    def type(self, text: str) -> None:
        """Types into whatever has the focus."""
        self.send("Input.insertText", text=text)

    def colours(self, scheme: str) -> None:
        """Makes the page believe that the user prefers "light" or "dark"."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, width: int = 1000, height: int = 1150) -> None:
        """Writes what the page looks like as PNG."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(0.2)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        if message["method"] == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(message["params"]["exceptionDetails"])[:500])
        elif message["method"] == "Log.entryAdded":
            self.problems.append(message["params"]["entry"]["text"])


def _page_address(port: str) -> str:
    """Where the DevTools of the browser's first page listen."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
        pages = [target for target in json.load(answer) if target["type"] == "page"]
    return str(pages[0]["webSocketDebuggerUrl"])


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
