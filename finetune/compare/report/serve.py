"""A report that follows its runs, served to this machine alone."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from finetune.compare.report.page import page, to_script
from finetune.compare.report.payload import Report
from finetune.errors import FinetuneError

HOST = "127.0.0.1"
IDLE_SECONDS = 30  # a connection that says nothing is closed


class Pages:
    """The newest page and its data, made again where a run has something new."""

    def __init__(self, report: Report):
        self._report = report
        self._lock = threading.Lock()
        report.update()
        self._make()

    def _make(self) -> None:
        payload = self._report.payload()
        self._page, self._data = page(payload, is_live=True).encode(), to_script(payload).encode()
        self._tag = f'"{hashlib.sha256(self._data).hexdigest()[:32]}"'

    def newest(self) -> tuple[bytes, bytes, str]:
        """The page, its data, and a tag of both."""
        with self._lock:
            if self._report.update():
                self._make()
            return self._page, self._data, self._tag


class Handler(BaseHTTPRequestHandler):
    """Answers GET for the page and its data."""

    pages: ClassVar[Pages]
    timeout = IDLE_SECONDS
    server_version = "finetune"
    sys_version = ""

    def do_GET(self) -> None:
        # another site may have its name resolve to this machine: it must not read a report through its visitor's browser
        name = self.headers.get("Host", "").rpartition(":")[0]
        if name not in (HOST, "localhost"):
            self.send_error(403)
            return
        if self.path not in ("/", "/data.json"):
            self.send_error(404)
            return
        whole, data, tag = self.pages.newest()
        if self.path == "/data.json" and self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return
        body, kind = (whole, "text/html") if self.path == "/" else (data, "application/json")
        self.send_response(200)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "ETag": tag}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """A page asks every two seconds: no line for each."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


def server(report: Report, port: int) -> Server:
    """Listens on loopback; port 0 takes a free one. FinetuneError if the port is taken."""
    handler = type("ReportHandler", (Handler,), {"pages": Pages(report)})
    try:
        return Server((HOST, port), handler)
    except OSError as error:
        hint = "choose another --port, or none for a free one"
        raise FinetuneError(f"cannot listen: {error.strerror}", where=f"{HOST}:{port}", hint=hint) from None
