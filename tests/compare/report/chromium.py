"""A real browser for tests: headless Chromium, driven through its debugging pipe, so no port is opened and no package is needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync"),
    *("--hide-scrollbars", "--force-color-profile=srgb", "--no-sandbox"),  # as root it has none
)
SECONDS = 60


class Page:
    """One tab. `requests` are all URLs that it asked for, `problems` what its console complained of."""

    def __init__(self, write: int, read: int):
        self._write, self._read = write, read
        self._messages: SimpleQueue[dict] = SimpleQueue()
        self._last = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._loaded = 0
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _listen(self) -> None:
        waiting = b""
        while more := os.read(self._read, 1 << 16):
            *messages, waiting = (waiting + more).split(b"\0")
            for message in messages:
                self._messages.put(json.loads(message))

    def ask(self, method: str, **parameters: object) -> dict:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._messages.get(timeout=SECONDS)
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self._hear(answer)

    def _hear(self, message: dict) -> None:
        method, facts = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif method == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.problems.append(facts["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(facts["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(facts["args"])[:500])
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {facts['message']}")
        elif method == "Page.loadEventFired":
            self._loaded += 1

    def open(self, url: str) -> None:
        """Returns when it is loaded and its scripts have run."""
        before = self._loaded
        self.ask("Page.navigate", url=url)
        while self._loaded == before:
            self._hear(self._messages.get(timeout=SECONDS))

    def settle(self) -> None:
        """Takes what the browser has said meanwhile."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        while True:
            try:
                self._hear(self._messages.get_nowait())
            except Empty:
                return

    def value(self, script: str) -> object:
        """What a script gives, in the page; for tests alone: the page's own policy does not bind it."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def size(self, width: int, height: int = 900) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def scheme(self, name: str) -> None:
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key)

    def point(self, x: float, y: float) -> None:
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> None:
        """All of the page, as PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    assert BINARY
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    given = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs_in, theirs_out)]

    def connect() -> None:
        os.dup2(given[0], 3)
        os.dup2(given[1], 4)

    command = [BINARY, *SWITCHES, f"--user-data-dir={profile}"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, close_fds=False, preexec_fn=connect)
    for each in (theirs_in, theirs_out, *given):
        os.close(each)
    try:
        page = Page(ours_out, ours_in)
        yield page
        page._session = None
        page.ask("Browser.close")
        process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
