"""A server on localhost that answers what a test tells it to, and remembers what it was asked.

with remote_server() as server:
    server.on("/v1/caption", Answer({"caption": "a cat"}))
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
class Asked:
    """A request as it came.

    Attributes:
        path: With the query.
        headers: By lower-case names.
        body: The JSON of the body; None where there is no body.
        connection: The port that it came from: equal for requests over one connection.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    connection: int


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        body: Bytes as they are, anything else as JSON.
        fault: "reset" the connection instead; "hang": never answer; "cut": close the connection within the body;
            "trickle": send a byte of the body every 20 ms, and never the last one.
    """

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    fault: Literal["", "reset", "hang", "cut", "trickle"] = ""


Reply = Answer | Callable[[Asked], Answer]


def streamed(*events: object, done: bool = False) -> Answer:
    """Server-sent events: bytes as they are, anything else as JSON."""
    lines = [event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() for event in events]
    return Answer(b"\n\n".join([*lines, b"data: [DONE]"] if done else lines) + b"\n\n", kind="text/event-stream")


class RemoteServer:
    """A running server.

    Attributes:
        url: Without a slash at the end.
        asked: All requests so far, in the order in which they came.
        most_in_flight: How many of them waited for an answer at a time, at the most.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._replies: dict[str, list[Reply]] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._http = _Threads(("127.0.0.1", 0), _Handler)
        self._http.remote = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def on(self, path: str, *replies: Reply) -> RemoteServer:
        """Answer a path with these, one after the other, and then always with the last; other paths give 404."""
        self._replies[path] = list(replies)
        return self

    def to(self, path: str) -> list[Asked]:
        """The requests to a path."""
        return [asked for asked in self.asked if urlsplit(asked.path).path == path]

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def take(self, asked: Asked) -> Reply:
        with self._lock:
            self.asked.append(asked)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            replies = self._replies.get(urlsplit(asked.path).path, [Answer({"error": {"message": "no route"}}, 404)])
            return replies.pop(0) if len(replies) > 1 else replies[0]

    def answered(self) -> None:
        with self._lock:
            self._in_flight -= 1


@contextlib.contextmanager
def remote_server() -> Iterator[RemoteServer]:
    """Run such a server on a free port."""
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
        """Clients that hang up are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Threads

    def do_GET(self) -> None:
        remote = self.server.remote
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        parsed = json.loads(body) if body else None
        asked = Asked(self.command, self.path, headers, parsed, self.client_address[1])
        reply = remote.take(asked)
        try:
            answer = reply if isinstance(reply, Answer) else reply(asked)
        finally:
            remote.answered()
        self._send(answer)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, answer: Answer) -> None:
        self.close_connection = bool(answer.fault)
        if answer.fault == "hang":
            self.server.remote.stopping.wait(240)
            return
        if answer.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        endless = {"cut": 1, "trickle": 2**20}.get(answer.fault, 0)
        self.send_header("Content-Length", str(len(content) + endless))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        while answer.fault == "trickle" and not self.server.remote.stopping.wait(0.02):
            self.wfile.write(b" ")
