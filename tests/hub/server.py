"""The Hub over HTTP on the loopback: what it answers to readers (info, tree, refs, files), and the faults that a test orders.

Requests are rows of `ROUTES`: a method, a pattern of the path, the function that answers. Every request is recorded in
`Hub.requests`. The server answers in threads that die with it, and stops by itself after `seconds`.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import writes
from tests.hub.answers import Answer, Refused, Request, as_json
from tests.hub.repos import Commit, File, MissingError, Repo, git_hash
from tests.hub.writes import User

REQUEST_BYTES = 64 * 2**20
IDLE_SECONDS = 20
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of this method whose path matches, after `skip` that do not."""

    method: str
    pattern: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_landed: bool = False
    """Whether the request is answered as usual, and only its reply is lost."""
    cut_after_bytes: int | None = None
    is_corrupt: bool = False
    """Whether one bit of the reply is flipped."""
    seconds: float = 0.0
    """How long the answer takes."""
    call: Callable[[], None] | None = None
    """What happens in between: before the request is answered, or after it where it is landed."""
    times: int = 1
    skip: int = 0


class Hub:
    """The Hub: repositories, the faults still to come, the requests so far. Up from construction until `close`."""

    def __init__(self, port: int = 0, seconds: float = 600, page_entries: int = 1000):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.users: dict[str, User] = {}
        """By token."""
        self.scans: dict[str, str] = {}
        """What the scanners say, by path."""
        self.uploaded_bytes = 0
        self.multipart_bytes: int | None = None
        """Larger LFS objects come in pieces of this size."""
        self.xet_directory: Path | None = None
        self.xet_hashes: dict[str, str] = {}
        """By SHA-256."""
        self.page_entries = page_entries
        self.is_up = True
        self._lock = threading.Lock()
        self._writing = threading.RLock()
        self._server = _Server(("127.0.0.1", port), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self._end = threading.Timer(seconds, self.close)
        self._end.daemon = True
        self._end.start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """From here on connections are refused."""
        with self._lock:
            was_up, self.is_up = self.is_up, False
        if was_up:
            self._end.cancel()
            self._server.shutdown()
            self._server.server_close()

    def add(self, kind: Literal["model", "dataset"], name: str, **facts: object) -> Repo:
        self.repos[kind, name] = Repo(kind, name, **facts)
        return self.repos[kind, name]

    def fail(self, method: str, pattern: str, status: int = 503, **how: object) -> None:
        self.faults.append(Fault(method, pattern, status=status, **how))

    def cut(self, method: str, pattern: str, after_bytes: int, times: int = 1) -> None:
        """The connection of the next such request ends after so many bytes of its body."""
        self.faults.append(Fault(method, pattern, cut_after_bytes=after_bytes, times=times))

    def seen(self, method: str, pattern: str) -> list[Request]:
        return [r for r in list(self.requests) if r.method == method and re.search(pattern, r.path)]

    def fault_of(self, request: Request) -> Fault | None:
        """Records a request, and takes the first fault that is meant for it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if (
                    fault.times
                    and re.search(f"^({fault.method})$", request.method)
                    and re.search(fault.pattern, request.path)
                ):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Answer:
        for method, pattern, respond in ROUTES:
            if request.method == method and (match := re.fullmatch(pattern, request.path)):
                parts = {name: unquote(text) for name, text in match.groupdict(default="").items()}
                try:
                    with self._writing:
                        return respond(self, request, **parts)
                except Refused as refusal:
                    return refusal.answer
                except MissingError as missing:
                    return Refused(404, missing.code, str(missing), missing.commit).answer
        return as_json({"error": "this Hub has no such route"}, 404)

    def repo(self, request: Request, kind: str, name: str) -> Repo:
        """The repository, if this request may know of it; what is private is not there for others."""
        repo = self.repos.get((kind, name))
        if repo is None or (repo.is_private and request.token not in repo.readers):
            raise Refused(404 if request.token else 401, "RepoNotFound", "Repository not found")
        return repo


def info(hub: Hub, request: Request, kind: str, name: str, revision: str) -> Answer:
    """GET /api/models/{id}[/revision/{revision}]: open for gated repositories too, as on the real Hub."""
    repo = hub.repo(request, kind, name)
    commit = repo.at(revision or "main")
    siblings = [
        {"rfilename": path} | (_entry(path, file, "blobId") if request.is_set("blobs") else {})
        for path, file in sorted(commit.files.items())
    ]
    facts = {"id": name, "sha": commit.oid, "siblings": siblings, "lastModified": DATE, "createdAt": DATE, "tags": []}
    gated = "manual" if repo.is_gated else False
    return as_json(facts | {"private": repo.is_private, "gated": gated, "disabled": False, "downloads": 0, "likes": 0})


def tree(hub: Hub, request: Request, kind: str, name: str, revision: str, path: str) -> Answer:
    """GET …/tree/{revision}[/{path}]?recursive=, in pages that a Link header chains."""
    commit = hub.repo(request, kind, name).at(revision)
    entries = [_entry(path, file) for path, file in commit.entries(path, request.is_set("recursive"))]
    for entry in entries if request.is_set("expand") else ():
        if status := hub.scans.get(entry["path"]):
            entry["securityFileStatus"] = {"status": status, "avScan": None, "pickleImportScan": None}
    first = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if first + hub.page_entries < len(entries):
        recursive = str(request.is_set("recursive")).lower()
        following = f"{hub.url}{request.path}?recursive={recursive}&cursor={first + hub.page_entries}"
        headers["Link"] = f'<{following}>; rel="next"'
    return as_json(entries[first : first + hub.page_entries], headers=headers)


def paths_info(hub: Hub, request: Request, kind: str, name: str, revision: str) -> Answer:
    """POST …/paths-info/{revision}, a form of paths: those that exist."""
    commit = hub.repo(request, kind, name).at(revision)
    everything = dict(commit.entries("", is_recursive=True))
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return as_json([_entry(path, everything[path]) for path in wanted if path in everything])


def refs(hub: Hub, request: Request, kind: str, name: str) -> Answer:
    repo = hub.repo(request, kind, name)
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
    return as_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def history(hub: Hub, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = hub.repo(request, kind, name)
    commit: Commit | None = repo.at(revision)
    listed = []
    while commit is not None:
        listed.append({"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": DATE})
        commit = repo.commits.get(commit.parent or "")
    return as_json(listed)


def resolve(hub: Hub, request: Request, folder: str, name: str, revision: str, path: str) -> Answer:
    """HEAD and GET of a file. Always 200 or 206 here: a redirect on one host would lose X-Repo-Commit."""
    repo = hub.repo(request, "dataset" if folder else "model", name)
    if repo.is_gated and request.token not in repo.readers:
        raise Refused(403 if request.token else 401, "GatedRepo", f"Access to {repo.kind} {name} is restricted")
    commit = repo.at(revision)
    file = commit.file(path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if file.is_lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        if file.sha256 in hub.xet_hashes:
            token = f"{hub.url}/api/{repo.kind}s/{name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": hub.xet_hashes[file.sha256], "X-Xet-Refresh-Route": token}
    if match := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "")):
        return _part(file.content, match[1], match[2], headers)
    return Answer(200, file.content, headers)


def xet_read_token(hub: Hub, request: Request, kind: str, name: str, revision: str) -> Answer:
    """Xet downloads come from a folder in place of a server."""
    hub.repo(request, kind, name).at(revision)
    expiration = str(int(time.time()) + 3600)
    place = f"local://{hub.xet_directory}"
    headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expiration}
    return as_json({}, 200, headers)


def _part(content: bytes, first: str, last: str, headers: Mapping[str, str]) -> Answer:
    """One range of a file (RFC 9110, 14.1.2): `5-9`, `5-`, or the last `-5` bytes."""
    size = len(content)
    start = int(first) if first else max(0, size - int(last or 0))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        return Answer(416, b"", dict(headers) | {"Content-Range": f"bytes */{size}"})
    return Answer(206, content[start:stop], dict(headers) | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def _entry(path: str, file: File | None, id_name: str = "oid") -> dict:
    if file is None:
        return {"type": "directory", "path": path, "size": 0, id_name: git_hash("tree", path.encode())}
    lfs = {"oid": file.sha256, "sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    entry = {"type": "file", "path": path, "size": len(file.content), id_name: file.oid}
    return entry | ({"lfs": lfs} if file.is_lfs else {})


_REPO = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_FILE = r"/(?P<folder>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", rf"{_REPO}(/revision/(?P<revision>[^/]+))?", info),
    ("GET", rf"{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", tree),
    ("POST", rf"{_REPO}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", rf"{_REPO}/refs", refs),
    ("GET", rf"{_REPO}/commits/(?P<revision>[^/]+)", history),
    ("HEAD", _FILE, resolve),
    ("GET", _FILE, resolve),
    ("GET", rf"{_REPO}/xet-read-token/(?P<revision>[^/]+)", xet_read_token),
    *writes.ROUTES,
]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, address: object) -> None:
        """Clients that were killed are part of the stories."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, address)


class _Handler(BaseHTTPRequestHandler):
    """Bytes in and out; a cut answer promises its whole length, so that the client notices."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for the receipt of its headers
    timeout = IDLE_SECONDS

    def _handle(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if size > REQUEST_BYTES:
            self.close_connection = True
            return self._send(as_json({"error": "too large"}, 413), None)
        url = urlsplit(self.path)
        body = self.rfile.read(size)
        headers = {name.title(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, body)
        fault = self.hub.fault_of(request)
        if fault is None:
            return self._send(self.hub.answer(request), None)
        time.sleep(fault.seconds)
        if fault.call and not fault.is_landed:
            fault.call()
        answer = as_json({"error": "a fault that the test ordered"}, fault.status or 500, fault.headers)
        if fault.status is None or fault.is_landed:
            regular = self.hub.answer(request)
            answer = regular if fault.status is None else answer
        if fault.call and fault.is_landed:
            fault.call()
        if fault.is_corrupt and answer.body:
            answer = replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))
        return self._send(answer, fault.cut_after_bytes)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _send(self, answer: Answer, cut_after_bytes: int | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut_after_bytes])
        if cut_after_bytes is not None:
            self.close_connection = True

    def log_message(self, *message: object) -> None:
        """Nothing to stderr: requests are in `Hub.requests`."""
