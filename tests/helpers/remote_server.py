"""HTTP server on localhost that returns prepared replies and records the requests.

with remote_server() as server:
    server.on("/v1/caption", Reply({"caption": "a cat"}))
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class ReceivedRequest:
    """A recorded request.

    Attributes:
        method: HTTP method.
        path: Path with the query.
        headers: Headers by lower-case names.
        body: Parsed JSON of the body; None if there is none.
        connection: Port of the client, equal for all requests of one connection.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    connection: int


@dataclass(frozen=True)
class Reply:
    """A response to return from the server.

    Attributes:
        body: Bytes, or a value to send as JSON.
        status: Status code.
        headers: Additional headers.
        kind: Content type.
        fault: "reset" closes the connection instead of responding; "hang" never responds; "cut" closes the connection
            inside the body; "trickle" sends a byte of the body every 20 ms, and never completes it.
    """

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    fault: Literal["", "reset", "hang", "cut", "trickle"] = ""


ReplySource = Reply | Callable[[ReceivedRequest], Reply]


def event_stream(*events: object, done: bool = False) -> Reply:
    """Return a response with server-sent events: bytes, or values to send as JSON."""
    lines = [event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() for event in events]
    return Reply(b"\n\n".join([*lines, b"data: [DONE]"] if done else lines) + b"\n\n", kind="text/event-stream")


class RemoteServer:
    """A running server.

    Attributes:
        url: URL without a trailing slash.
        requests: All requests so far, in order.
        max_in_flight_seen: Maximum number of concurrent requests so far.
    """

    def __init__(self) -> None:
        self.requests: list[ReceivedRequest] = []
        self.max_in_flight_seen = 0
        self._in_flight = 0
        self._replies: dict[str, list[ReplySource]] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._http = _Threads(("127.0.0.1", 0), _Handler)
        self._http.remote = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def on(self, path: str, *replies: ReplySource) -> RemoteServer:
        """Set the replies of a path, in order; the last one repeats. Other paths return 404."""
        self._replies[path] = list(replies)
        return self

    def to(self, path: str) -> list[ReceivedRequest]:
        """Return the requests to a path."""
        return [request for request in self.requests if urlsplit(request.path).path == path]

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def record(self, request: ReceivedRequest) -> ReplySource:
        with self._lock:
            self.requests.append(request)
            self._in_flight += 1
            self.max_in_flight_seen = max(self.max_in_flight_seen, self._in_flight)
            replies = self._replies.get(urlsplit(request.path).path, [Reply({"error": {"message": "no route"}}, 404)])
            return replies.pop(0) if len(replies) > 1 else replies[0]

    def finish(self) -> None:
        with self._lock:
            self._in_flight -= 1


@contextlib.contextmanager
def remote_server() -> Iterator[RemoteServer]:
    """Run a server on a free port."""
    server = RemoteServer()
    try:
        yield server
    finally:
        server.stop()


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    remote: RemoteServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection, which some tests do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Threads

    def do_GET(self) -> None:
        remote = self.server.remote
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        parsed = json.loads(body) if body else None
        request = ReceivedRequest(self.command, self.path, headers, parsed, self.client_address[1])
        source = remote.record(request)
        try:
            response = source if isinstance(source, Reply) else source(request)
        finally:
            remote.finish()
        self._send(response)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, response: Reply) -> None:
        self.close_connection = bool(response.fault)
        if response.fault == "hang":
            self.server.remote.stopping.wait(240)
            return
        if response.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        content = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        self.send_response(response.status)
        self.send_header("Content-Type", response.kind)
        endless = {"cut": 1, "trickle": 2**20}.get(response.fault, 0)
        self.send_header("Content-Length", str(len(content) + endless))
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        while response.fault == "trickle" and not self.server.remote.stopping.wait(0.02):
            self.wfile.write(b" ")
