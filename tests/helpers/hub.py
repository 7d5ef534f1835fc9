"""Local Hugging Face hub: repositories in the published layout, and simulated failures.

    with Hub() as hub:
        commit = hub.add("someone/model", {"config.json": b"{}", "model.safetensors": weights}, refs=["main"])
        hub.fail("/resolve/", status=503)
        ...  # with HF_ENDPOINT=hub.url

Large files (weights) have a SHA-256 and are redirected to a second server with another host name, as on the real hub;
small files have a Git hash. Both servers support range requests. `hub.requests` lists the requests.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pt", ".pth", ".bin")
LOGIN_PAGE = b"<!DOCTYPE html>\n<html><body>Welcome to Airport WiFi. Please log in.</body></html>\n"


@dataclass
class Failure:
    """A failure of matching requests.

    Attributes:
        pattern: Regular expression for the path.
        status: Status code; 0 for no response until the server closes.
        headers: Headers of the response.
        body: Body of the response.
        times: Number of requests that fail; None for all.
        location: URL to redirect to instead.
        cut: Number of bytes of the file to send before the connection is closed.
        method: "GET" or "HEAD"; None for both.
        range: Regular expression for the Range header, which is "" if missing; None for any.
    """

    pattern: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int | None = None
    location: str | None = None
    cut: int | None = None
    method: str | None = None
    range: str | None = None

    def matches(self, path: str, method: str, asked_range: str) -> bool:
        return (
            self.times != 0
            and self.method in (None, method)
            and re.search(self.pattern, path) is not None
            and (self.range is None or re.search(self.range, asked_range) is not None)
        )


@dataclass(frozen=True)
class Asked:
    """A recorded request."""

    host: str
    method: str
    path: str
    range: str | None
    authorization: str | None


class Hub:
    """A hub with its file server (CDN).

    Attributes:
        url: URL for HF_ENDPOINT.
        cdn: URL of the file server.
        requests: All requests, in order.
        private: Repositories that require the token "secret".
        gated: Repositories without access for any token.
        lists_hashes: Whether the list of files contains hashes, as on the real hub.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repo → commit → files
        self.refs: dict[str, dict[str, str]] = {}
        self.requests: list[Asked] = []
        self.failures: list[Failure] = []
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.lists_hashes = True
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._servers = [self._serve("127.0.0.1", True), self._serve("127.0.0.1", False)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn = f"http://localhost:{self._servers[1].server_port}"
        self.host, self.cdn_host = (urlsplit(url).netloc for url in (self.url, self.cdn))

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes], refs: Iterable[str] = ("main",)) -> str:
        """Add a commit, set branches or tags to it, and return its hash."""
        digest = hashlib.sha1(f"{repo} {len(self.repos.get(repo, {}))}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + content)
        commit = digest.hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        for ref in refs:
            self.refs.setdefault(repo, {})[ref] = commit
        return commit

    def fail(self, pattern: str = "", status: int = 200, **options: object) -> Failure:
        """Add a failure for the following requests, see `Failure`."""
        failure = Failure(pattern, status, **options)  # type: ignore[arg-type]
        self.failures.append(failure)
        return failure

    def asked(self, pattern: str = "", method: str | None = None) -> list[Asked]:
        """Return the requests whose path matches a pattern."""
        with self._lock:
            return [a for a in self.requests if re.search(pattern, a.path) and method in (None, a.method)]

    def _serve(self, host: str, is_hub: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "is_hub": is_hub})
        server = ThreadingHTTPServer((host, 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def matching(self, path: str, method: str, asked_range: str) -> Failure | None:
        with self._lock:
            failure = next((f for f in self.failures if f.matches(path, method, asked_range)), None)
            if failure is not None and failure.times is not None:
                failure.times -= 1
            return failure

    def record(self, asked: Asked) -> None:
        with self._lock:
            self.requests.append(asked)

    def wait_for_close(self) -> None:
        self._closing.wait()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    is_hub: bool
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.hub.record(
            Asked(headers.get("Host", ""), self.command, self.path, headers.get("Range"), headers.get("Authorization"))
        )
        cut = None
        failure = self.hub.matching(self.path, self.command, headers.get("Range") or "")
        if failure is not None:
            if failure.status == 0:
                self.hub.wait_for_close()
                self.close_connection = True
                return
            if failure.location is not None:
                self._send(302, {"Location": failure.location}, b"")
                return
            if failure.cut is None:
                self._send(failure.status, dict(failure.headers), failure.body)
                return
            cut = failure.cut
        if not self.is_hub:
            repo, commit, name = self._split(path.removeprefix("/cdn/"), "/at/")
            self._content(self.hub.repos[repo][commit][name], {}, cut)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._resolve(path, cut)
        else:
            self._error(404, "")

    def _split(self, path: str, between: str) -> tuple[str, str, str]:
        repo, rest = path.strip("/").split(between, 1)
        commit, _, name = rest.partition("/")
        return repo, commit, name

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and files of a revision; None if an error was sent."""
        opened = self.headers.get("Authorization") == "Bearer secret"
        if repo not in self.hub.repos or (repo in self.hub.private and not opened):
            self._error(401, "RepoNotFound")
            return None
        commit = self.hub.refs[repo].get(revision, revision)
        if commit not in self.hub.repos[repo]:
            self._error(404, "RevisionNotFound")
            return None
        return commit, self.hub.repos[repo][commit]

    def _api(self, path: str) -> None:
        match = re.fullmatch(r"(.+?)/(revision|tree)/(.+)", path)
        repo, kind, revision = (path, "revision", "main") if match is None else match.groups()
        found = self._files(repo, revision)
        if found is None:
            return
        commit, files = found
        if kind == "tree":
            self._json([{"type": "file", "path": name, **_listing(name, content)} for name, content in files.items()])
            return
        siblings = [{"rfilename": name} for name in files]
        if "blobs=true" in self.path.lower() and self.hub.lists_hashes:
            siblings = [_sibling(name, content) for name, content in files.items()]
        self._json({"id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings, "tags": []})

    def _resolve(self, path: str, cut: int | None) -> None:
        repo, revision, name = self._split(path, "/resolve/")
        found = self._files(repo, revision)
        if found is None:
            return
        commit, files = found
        if repo in self.hub.gated:
            self._error(403, "GatedRepo")
        elif name not in files:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif name.endswith(LARGE):
            sha, size = hashlib.sha256(files[name]).hexdigest(), len(files[name])
            linked = {"X-Repo-Commit": commit, "X-Linked-Size": str(size), "X-Linked-Etag": f'"{sha}"'}
            target = f"{self.hub.cdn}/cdn/{repo}/at/{commit}/{name}"
            self._send(302, {**linked, "Location": target}, b"", {"ETag": '"pointer"'})
        else:
            self._content(files[name], {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(files[name])}"'}, cut)

    def _content(self, content: bytes, headers: dict[str, str], cut: int | None) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, size = 200, len(content)
        if match is not None:
            first, last = int(match[1]), min(int(match[2] or size), size - 1)
            status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
            content = content[first : last + 1]
        self._send(status, {**headers, "Accept-Ranges": "bytes"}, content, cut=cut)

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": "a message of the hub", **(headers or {})}, b"")

    def _send(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        more: Mapping[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body if cut is None else body[:cut])
        except OSError:  # the client closed the connection
            self.close_connection = True
        if cut is not None and cut < len(body):
            self.close_connection = True


def _sibling(name: str, content: bytes) -> dict[str, object]:
    listed: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": _git_hash(content)}
    if name.endswith(LARGE):
        sha = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 134}
    return listed


def _listing(name: str, content: bytes) -> dict[str, object]:
    listed: dict[str, object] = {"oid": _git_hash(content), "size": len(content)}
    if name.endswith(LARGE):
        sha = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
    return listed


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
