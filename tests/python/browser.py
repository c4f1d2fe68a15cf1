"""Headless Chromium by its own protocol, over a pipe: no driver, no other package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (found := shutil.which(name))
    ),
    None,
)
_TIMEOUT = 60


class Tab:
    """A page in a browser: what it asks of the network, what it complains of, what it shows."""

    def __init__(self, send: Callable[..., dict[str, Any]], events: list[dict[str, Any]]) -> None:
        self._send = send
        self._events = events

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self._events.clear()
        self._send("Page.navigate", url=path.absolute().as_uri())
        deadline = time.monotonic() + _TIMEOUT
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            assert time.monotonic() < deadline, "the page must load"
            self.evaluate("1")

    def evaluate(self, script: str) -> Any:
        """Return what an expression is, as JSON can hold it."""
        found = self._send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click where an element is, with the mouse."""
        found = self.evaluate(
            f"""(() => {{
                const e = document.querySelector({json.dumps(selector)});
                e.scrollIntoView({{block: "center"}});
                const b = e.getBoundingClientRect();
                return [b.x + b.width / 2, b.y + b.height / 2];
            }})()"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._send(
                "Input.dispatchMouseEvent",
                type=kind,
                x=found[0],
                y=found[1],
                button="none" if kind == "mouseMoved" else "left",
                clickCount=0 if kind == "mouseMoved" else 1,
            )

    def hover(self, selector: str) -> None:
        """Move the mouse onto an element."""
        x, y = self.evaluate(
            f"""(() => {{
                const e = document.querySelector({json.dumps(selector)});
                e.scrollIntoView({{block: "center"}});
                const b = e.getBoundingClientRect();
                return [b.x + b.width / 2, b.y + b.height / 2];
            }})()"""
        )
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, selector: str, text: str) -> None:
        """Type text into a field, in place of what is there."""
        self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.value = ''; e.focus(); e.dispatchEvent(new Event('input')); })()"
        )
        self._send("Input.insertText", text=text)

    def looks(self, *, dark: bool = False, media: str = "", width: int = 1280) -> None:
        """Set the colours that the user prefers, the medium and the width of the window."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        found = self._send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """Return the page as it prints."""
        return base64.b64decode(self._send("Page.printToPDF", printBackground=True)["data"])

    @property
    def requests(self) -> list[str]:
        """What was asked for since the page was opened, itself and data in it aside."""
        self.evaluate("1")
        asked = [
            event["params"]["request"]["url"]
            for event in self._events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith(("file:", "data:"))]

    @property
    def complaints(self) -> list[str]:
        """Errors and messages of the console since the page was opened."""
        self.evaluate("1")
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event) for event in self._events if event["method"] in kinds]


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Tab]:
    """Give a tab of a new browser, whose files are in a folder."""
    assert CHROMIUM is not None
    to_browser, from_browser = os.pipe(), os.pipe()
    # The browser reads at 3 and writes at 4; only a shell can put its ends there, out of the way.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1])]
    os.close(to_browser[0])
    os.close(from_browser[1])
    command = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
    arguments = [
        CHROMIUM,
        "--headless=new",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        # A container has no other user to run as.
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]
    process = subprocess.Popen(
        ["/bin/bash", "-c", command, *arguments],
        pass_fds=ends,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in ends:
        os.close(end)
    unread = bytearray()
    events: list[dict[str, Any]] = []
    count = 0
    session: dict[str, str] = {}

    def send(method: str, **parameters: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        message = {"id": count, "method": method, "params": parameters, **session}
        os.write(to_browser[1], json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _TIMEOUT
        while True:
            while b"\0" not in unread:
                left = deadline - time.monotonic()
                assert left > 0, f"the browser must answer {method}"
                assert select.select([from_browser[0]], [], [], left)[0], f"no answer to {method}"
                data = os.read(from_browser[0], 1 << 20)
                assert data, "the browser must go on running"
                unread.extend(data)
            line, _, rest = bytes(unread).partition(b"\0")
            unread[:] = rest
            answer = json.loads(line)
            if answer.get("id") == count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                events.append(answer)

    try:
        target = send("Target.createTarget", url="about:blank")["targetId"]
        attached = send("Target.attachToTarget", targetId=target, flatten=True)
        session["sessionId"] = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            send(f"{domain}.enable")
        yield Tab(send, events)
        session.clear()
        send("Browser.close")
        process.wait(timeout=20)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
