"""A headless Chromium, driven through the DevTools protocol over two pipes: no driver, no further package."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--no-default-browser-check", "--disable-background-networking", "--disable-component-update",
         "--disable-default-apps", "--disable-extensions", "--disable-sync", "--mute-audio", "--hide-scrollbars",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
BEGIN = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in zip((3, 4), ends):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser wants its pipes as files 3 and 4."""
TIMEOUT = 60.0  # seconds of one command: the machine may be busy

KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
        "ArrowDown": 40}


def chromium() -> str | None:
    """The browser's program; None where there is none."""
    return next((found for found in map(shutil.which, PROGRAMS) if found), None)


class PageError(Exception):
    """What a script of the page raised, or the browser refused."""


class Browser:
    """One process; `with Browser(directory) as browser: tab = browser.tab()`."""

    def __init__(self, profile: Path):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        program = chromium()
        assert program is not None
        flags = [*FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(theirs_in), str(theirs_out), program, *flags],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self._numbers, self._lock = itertools.count(1), threading.Lock()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._out.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its result; PageError."""
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = answer
            message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
            self._out.write(json.dumps(message).encode() + b"\0")
            self._out.flush()
        told = answer.result(TIMEOUT)
        if "error" in told:
            raise PageError(f"{method}: {told['error']}")
        return told["result"]

    def tab(self, width: int = 1400, height: int = 900) -> Tab:
        """An empty page that remembers nothing of others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, target, context)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        return tab

    def _read(self) -> None:
        buffer = b""
        while piece := self._in.read1(1 << 20):
            *messages, buffer = (buffer + piece).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._waiting.pop(message["id"]).set_result(message)
                elif message.get("sessionId") in self._tabs:
                    self._tabs[message["sessionId"]].heard.put(message)
        for answer in self._waiting.values():
            answer.set_result({"error": "the browser has ended"})


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str, target: str, context: str):
        self._browser, self._session, self._target, self._context = browser, session, target, context
        self.heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of this page."""
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        """The page is gone."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def events(self, method: str) -> list[dict[str, Any]]:
        """What the browser has told of this kind so far."""
        while not self.heard.empty():
            self._events.append(self.heard.get())
        return [event["params"] for event in self._events if event["method"] == method]

    def open(self, url: str) -> None:
        """Loads an address, to its end."""
        loads = len(self.events("Page.loadEventFired"))
        found = self.call("Page.navigate", url=url)
        if "errorText" in found:
            raise PageError(found["errorText"])
        self.until(lambda: len(self.events("Page.loadEventFired")) > loads, f"{url} was not loaded")

    def js(self, expression: str) -> Any:
        """The value of an expression, awaited; PageError."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
                         userGesture=True)
        if "exceptionDetails" in told:
            details = told["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return told["result"].get("value")

    def until(self, holds: str | Callable[[], Any], otherwise: str, seconds: float = 30.0) -> Any:
        """Waits for a truth, of the page or of the test."""
        end = time.monotonic() + seconds
        while True:
            found = self.js(f"!!({holds})") if isinstance(holds, str) else holds()
            if found:
                return found
            assert time.monotonic() < end, otherwise
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent")

    def fill(self, name: str, value: object) -> None:
        """The value of a field, as if it were typed."""
        self.js(f"(() => {{ const field = document.getElementById({json.dumps(name)}); field.value = "
                f"{json.dumps(str(value))}; for (const kind of ['input', 'change']) "
                "field.dispatchEvent(new Event(kind, {bubbles: true})); })()")

    def press(self, key: str, shift: bool = False, ctrl: bool = False) -> None:
        """One key."""
        common = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": KEYS[key],
                  "modifiers": 8 * shift + 2 * ctrl}
        text = {"Enter": "\r", "Space": " "}.get(key)
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text and not ctrl else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Text, where the focus is."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int) -> None:
        """The window's size, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, scheme: str = "light", motion: str = "no-preference") -> None:
        """What the reader prefers."""
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}])

    def choose_file(self, name: str, path: Path) -> None:
        """The file of a file field."""
        node = self.call("Runtime.evaluate", expression=f"document.getElementById({json.dumps(name)})")["result"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=node["objectId"])

    def save_files_to(self, directory: Path) -> None:
        """Where downloads go."""
        self._browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(directory),
                           browserContextId=self._context)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is in sight, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self, but: str | None = None) -> list[str]:
        """Errors and warnings of the console, exceptions, and what a policy has blocked, `but` for those that say so.
        """
        said = [f"{call['type']}: {call['args']}" for call in self.events("Runtime.consoleAPICalled")
                if call["type"] in ("error", "warning", "assert")]
        said += [str(thrown["exceptionDetails"]) for thrown in self.events("Runtime.exceptionThrown")]
        said += [str(entry["entry"]["text"]) for entry in self.events("Log.entryAdded")
                 if entry["entry"]["level"] in ("error", "warning")]
        return [one for one in said if but is None or but not in one]

    def requested(self) -> list[str]:
        """The addresses of all requests."""
        return [sent["request"]["url"] for sent in self.events("Network.requestWillBeSent")]
