"""A headless Chromium, spoken to over two pipes in the DevTools protocol: no port, no package, no process left over."""

from __future__ import annotations

import base64
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

UBUNTU = platform.freedesktop_os_release()["ID"] == "ubuntu" if Path("/etc/os-release").exists() else False
"""Whose Chromium is a snap, which containers cannot run, and which sees no temporary files."""
PROGRAMS = ("google-chrome",) if UBUNTU else ("chromium", "chromium-browser", "google-chrome")
START_S, ANSWER_S, END_S = 90.0, 60.0, 20.0


def find_program() -> str | None:
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


def program() -> str:
    """Errors: RuntimeError where no browser is installed."""
    found = find_program()
    if found is None:
        raise RuntimeError(f"none of {', '.join(PROGRAMS)} is installed; `make setup` installs Debian's chromium")
    return found


@dataclass
class Seen:
    """What a page did while it was loaded."""

    requests: list[str] = field(default_factory=list)
    """Of every request but that for the page itself and for data: URIs."""
    complaints: list[str] = field(default_factory=list)
    """Console messages, uncaught errors, and what the browser logs about the page."""


class Browser:
    """A context manager around one process group; on leaving it, all of its processes are gone.

    The profile and browser.log go into a new `folder`. Errors: RuntimeError naming what did not come in time.
    """

    def __init__(self, folder: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        options += ["--disable-sync", "--disable-crash-reporter", f"--user-data-dir={folder}"]
        # Whatever a page asks for by name does not exist.
        options += ["--host-resolver-rules=MAP * ~NOTFOUND"]
        # The protocol's ends are file descriptors 3 and 4, whatever ours are called.
        shell = f'exec 3<&{commands} 4>&{answers} && exec "$@"'
        folder.mkdir()
        with (folder / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", shell, "bash", program(), *options, "about:blank"],
                pass_fds=(commands, answers),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        os.close(commands)
        os.close(answers)
        self._rest, self._number, self._session = b"", 0, ""
        self._on_event: Callable[[str, dict[str, Any]], None] = lambda method, facts: None

    def __enter__(self) -> Browser:
        try:
            target = self._ask("Target.createTarget", {"url": "about:blank"}, START_S)["targetId"]
            self._session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._ask(f"{domain}.enable")
            self._ask("Emulation.setScrollbarsHidden", {"hidden": True})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser, gently where it still listens."""
        try:
            with suppress(OSError, RuntimeError, subprocess.TimeoutExpired):
                self._ask("Browser.close", {}, END_S, browser=True)
                self._process.wait(END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(END_S)
            for end in (self._read, self._write):
                os.close(end)

    def open(self, page: Path, *, width: int = 1200, height: int = 900, dark: bool = False, media: str = "") -> Seen:
        """Load a file at a width in CSS pixels; returns once it is loaded, and all of its images are."""
        seen, loaded = Seen(), []

        def note(method: str, facts: dict[str, Any]) -> None:
            if method == "Page.loadEventFired":
                loaded.append(True)
            elif method == "Network.requestWillBeSent":
                seen.requests.append(facts["request"]["url"])
            elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                seen.complaints.append(json.dumps(facts))
            elif method == "Log.entryAdded":
                seen.complaints.append(facts["entry"]["text"])

        self._on_event = note
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        self._ask("Page.navigate", {"url": page.as_uri()})
        end = time.monotonic() + ANSWER_S
        while not loaded:
            self._receive(end, f"{page} to be loaded")
        seen.requests = [url for url in seen.requests if url != page.as_uri() and not url.startswith("data:")]
        return seen

    def value_of(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._ask("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, whole: bool = True) -> bytes:
        """What is shown, as PNG: the page down to its end, or the window."""
        answer = self._ask("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        return base64.b64decode(answer["data"])

    def _ask(
        self, method: str, parameters: dict[str, Any] | None = None, deadline_s: float = ANSWER_S, browser: bool = False
    ) -> dict[str, Any]:
        self._number += 1
        number, end = self._number, time.monotonic() + deadline_s
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters or {}}
        if self._session and not browser:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(end, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self, end: float, what: str) -> dict[str, Any]:
        """The next message; events go to whoever listens."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._read, 1 << 16) if ready else b""
            if not chunk:
                raise RuntimeError(f"the browser {'ended' if ready else 'was too slow'} before {what}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self._on_event(message["method"], message.get("params", {}))
        return message
