"""Limits on connections: the size of the headers, the time to send a request, connections per client address.

uvicorn's protocol has none of these limits. Complete requests are passed to the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD = 64 * 1024  # bytes of headers, trailers and chunk extensions
MAX_URL = 16 * 1024  # bytes
REQUEST_SECONDS = 120.0  # from the end of the headers to the end of the body
HEAD_SECONDS = 20.0  # from the connection, or the first byte of a later request, to the end of the headers
WRITE_SECONDS = 60.0  # a client that reads none of the response for this long is disconnected
RETRY_SECONDS = 5  # Retry-After header of a 503 response
PROBE_PATHS = (b"/health", b"/ready")

_REASONS = {431: "Request Header Fields Too Large", 414: "URI Too Long", 408: "Request Timeout"}


class ConnectionTable:
    """The open connections of a server, counted per client address.

    When a limit is reached, the oldest connection without a complete request is closed, so that idle connections never
    lock out other clients.
    """

    def __init__(self, total: int, per_address: int) -> None:
        self._total, self._per_address = total, per_address
        self._open: dict[LimitedProtocol, str] = {}  # in order of arrival
        self._counts: dict[str, int] = {}

    def add(self, connection: LimitedProtocol) -> bool:
        """Add a connection. Return False if the limit is reached; the connection then answers only health probes."""
        address = address_group(connection.client)
        has_room = True
        if self._counts.get(address, 0) >= self._per_address:
            has_room = self._evict(address)
        elif len(self._open) >= self._total:
            has_room = self._evict(max(self._counts, key=lambda client: self._counts[client]))
        self._open[connection] = address
        self._counts[address] = self._counts.get(address, 0) + 1
        return has_room

    def remove(self, connection: LimitedProtocol) -> None:
        """Remove a connection; does nothing if it has been removed before."""
        address = self._open.pop(connection, None)
        if address is not None:
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]

    def _evict(self, address: str) -> bool:
        """Close the oldest connection of an address without a complete request. Return False if there is none."""
        for connection, owner in self._open.items():
            if owner == address and connection.is_waiting_for_client:
                self.remove(connection)
                connection.transport.abort()
                return True
        return False


def address_group(client: tuple[str, int] | None) -> str:
    """Return the address that identifies a client: an IPv4 address, or the /64 network of an IPv6 address."""
    if client is None:
        return "unknown"
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(client[0])
        if address.version == 6:
            return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return client[0]


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with limits on headers, times and connections.

    `configure` returns a subclass for the `http` argument of `uvicorn.Config`.
    """

    table: ConnectionTable

    @classmethod
    def configure(cls, table: ConnectionTable) -> type[LimitedProtocol]:
        """Return a subclass for one server.

        Args:
            table: Connections of the server.
        """
        return type("ConfiguredProtocol", (cls,), {"table": table})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._rejection: tuple[int, str] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._progress = 0  # parser events, headers excluded
        self._unparsed = 0  # bytes received since the last event
        self._head_bytes = 0
        self._receiving = self._in_head = False
        super().connection_made(transport)
        self._has_room = self.table.add(self)
        self._start_timer(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self.table.remove(self)
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    @property
    def is_waiting_for_client(self) -> bool:
        """Whether no complete request is being answered."""
        return self._receiving or self.cycle is None or self.cycle.response_complete

    # Sizes

    def data_received(self, data: bytes) -> None:
        if self._rejection is not None or self.parser is None:
            return
        before = self._progress
        super().data_received(data)
        if self._rejection is None:
            self._unparsed = self._unparsed + len(data) if self._progress == before else 0
            if self._unparsed > MAX_HEAD:
                self._reject(431, f"the headers exceed {MAX_HEAD:,} bytes")
                self.send_400_response("")

    def on_message_begin(self) -> None:
        self._head_bytes, self._receiving, self._in_head = 0, True, True
        self._start_timer(HEAD_SECONDS)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if len(self.url) + len(url) > MAX_URL:
            self._abort_parsing(414, f"the URL exceeds {MAX_URL:,} bytes")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD:
            self._abort_parsing(431, f"the headers exceed {MAX_HEAD:,} bytes")
        if self._in_head:  # trailers arrive after the checks, so they are dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._progress += 1
        self._in_head = False
        self._start_timer(REQUEST_SECONDS)
        is_probe = self.url.split(b"?")[0] in PROBE_PATHS
        self.app = self.config.loaded_app if self._has_room or is_probe else _reject_busy_client
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress += 1
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self._progress += 1

    def on_message_complete(self) -> None:
        self._progress += 1
        self._receiving = False
        self._stop_timer()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        status, message = self._rejection or (400, "invalid HTTP request")
        self._rejection = status, message
        self._stop_timer()
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.close()  # a partial response cannot be followed by an error
            return
        content = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
        line = f"HTTP/1.1 {status} {_REASONS[status]}\r\n".encode() if status in _REASONS else STATUS_LINE[status]
        headers = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(line + headers.encode() + content)
        self.transport.close()

    def _reject(self, status: int, message: str) -> None:
        self._rejection = status, message
        self.logger.warning("rejected a request: %s", message)

    def _abort_parsing(self, status: int, message: str) -> None:
        """Stop the parser. It converts an exception of a callback to a parser error, which gets a 400 response."""
        self._reject(status, message)
        raise ValueError(message)

    # Times

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_timeout(self) -> None:
        """Close a connection whose request did not arrive in time. A connection without any data gets no response."""
        if self.transport.is_closing():
            return
        if not self._receiving:
            self.transport.close()
            return
        self._rejection = 408, "the request did not arrive in time"
        self.send_400_response("")


async def _reject_busy_client(scope: Scope, receive: Receive, send: Send) -> None:
    """Reject a request of a client that has too many connections."""
    message = "too many connections from this client; close some and try again"
    content = json.dumps({"error": {"message": message, "type": "service_unavailable", "code": 503}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"retry-after", str(RETRY_SECONDS).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": content})
