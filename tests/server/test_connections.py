"""Limits on headers, on the time for a request to arrive, and on connections per client.

Run with `pytest tests/server/test_connections.py`.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.server import connections
from moondream_cv.server.connections import MAX_HEAD, MAX_URL, address_group
from tests.helpers.served import Served, served

WAIT = 240  # seconds; ends a test that hangs


@contextlib.contextmanager
def connected(server: Served, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT, source_address=(source, 0)) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    """Return all data that the server sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65_536):
            received += chunk
    return received


def send_until_closed(client: socket.socket, parts: Iterator[bytes]) -> int:
    sent = 0
    with contextlib.suppress(ConnectionError):
        for part in parts:
            client.sendall(part)
            sent += len(part)
    return sent


HEAD = b"POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("start", "part", "status"),
    [
        (HEAD + b"X-Long: ", b"a" * 10_000, b"431"),
        (HEAD, b"X-Short: a\r\n" * 1_000, b"431"),
        (b"GET /", b"a" * 10_000, b"414"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 10_000, b"431"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Trailer: ", b"a" * 10_000, b""),
        (b"", b"\r\n" * 5_000, b""),
        (b"a" * 10, b"a" * 10_000, b"400"),
    ],
    ids=["one header", "many headers", "URL", "chunk extension", "trailer", "empty lines", "method"],
)
def test_endless_heads_are_rejected(server: Served, start: bytes, part: bytes, status: bytes) -> None:
    with connected(server) as client:
        client.sendall(start)
        sent = send_until_closed(client, (part for _ in range(10_000)))
        assert sent < 20_000_000  # far less than the 100 MB; limited by the socket buffers
        answer = read_all(client)
        assert answer == b"" or b" " + status in answer.split(b"\r\n")[0]
    assert server.client.get("/health").status_code == 200


def test_heads_up_to_the_limit_are_accepted(server: Served) -> None:
    assert server.client.get("/health", headers={"X-Long": "a" * (MAX_HEAD - 1_000)}).status_code == 200
    assert server.client.get("/health?a=" + "a" * (MAX_URL - 100)).status_code == 200
    assert server.client.get("/health", headers={"X-Long": "a" * MAX_HEAD}).status_code == 431
    too_long = server.client.get("/health?a=" + "a" * MAX_URL)
    assert too_long.status_code == 414
    assert "16,384 bytes" in too_long.json()["error"]["message"]


def test_pipelined_requests_are_counted_one_by_one(server: Served) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connected(server) as client:
        client.sendall(one * 10 + last)
        assert read_all(client).count(b"HTTP/1.1 200") == 11


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", b""), (b"GET /", b"408"), (HEAD, b"408"), (HEAD + b"Content-Length: 9\r\n\r\n{", b"408")],
    ids=["nothing", "part of a line", "part of a head", "part of a body"],
)
def test_connections_without_a_complete_request_are_closed(
    tiny: LocalModel, monkeypatch: pytest.MonkeyPatch, sent: bytes, status: bytes
) -> None:
    for seconds in (0.3, 3, 30):  # use the first limit within which this machine sends
        monkeypatch.setattr(connections, "HEAD_SECONDS", seconds)
        monkeypatch.setattr(connections, "REQUEST_SECONDS", seconds)
        with served(tiny) as server, connected(server) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(sent)
            answer = read_all(client).split(b"\r\n")[0]
        if status in answer:
            break
    assert status in answer


def test_idle_connections_do_not_lock_out_other_clients(tiny: LocalModel) -> None:
    with served(tiny, connections_per_client=20) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(server)) for _ in range(60)]
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/v1/models").status_code == 200
        assert read_all(silent[0]) == b""  # the oldest were closed


def test_too_many_busy_connections_get_503_with_retry_after(tiny: LocalModel) -> None:
    """Connections with a running request are never closed in favor of others."""
    busy = HEAD + b"Content-Length: 0\r\n\r\n"

    class Slow:
        def __init__(self, app):
            self._app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http" and scope["path"] == "/v1/detect":
                while (await receive())["type"] != "http.disconnect":
                    pass
            else:
                await self._app(scope, receive, send)

    with served(tiny, wrap=Slow, connections_per_client=5) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connected(server)).sendall(busy)
        head = b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

        def ask(path: bytes) -> bytes:
            with connected(server) as client:
                client.sendall(head % path)
                return read_all(client)

        until_busy = ask(b"/v1/models")
        while b" 503 " not in until_busy:  # wait until all five are running
            until_busy = ask(b"/v1/models")
        answer_head, _, body = until_busy.partition(b"\r\n\r\n")
        assert b"retry-after: 5" in answer_head.lower()
        assert "too many connections" in json.loads(body)["error"]["message"]
        assert b" 200 " in ask(b"/health")


def test_ipv6_addresses_are_grouped_by_network() -> None:
    assert address_group(("192.0.2.1", 5)) == "192.0.2.1"
    assert address_group(("2001:db8:0:1::5", 5)) == address_group(("2001:db8:0:1:9::", 6)) == "2001:db8:0:1::/64"
    assert address_group(None) == address_group(None)
