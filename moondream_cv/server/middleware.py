"""ASGI middleware: request IDs, logs and metrics; API keys, origins, content types and sizes of requests."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moondream_cv.memory_trimming import MemoryTrimmer
from moondream_cv.server.apis.base import ApiSpec, find_api
from moondream_cv.server.apis.signed_urls import is_signed
from moondream_cv.server.bodies import (
    LARGE,
    LINES_PATHS,
    MAX_TRAIN_STEP_VALUES,
    MAX_VALUES,
    TRAIN_STEP_PATH,
    ReceiveBudget,
    check_content_type,
    check_json,
    is_upload,
    key_in_body,
    read_pieces,
)
from moondream_cv.server.connections import address_group
from moondream_cv.server.errors import ServerError, to_server_error
from moondream_cv.server.logs import client_address, request_id
from moondream_cv.server.origin_protection import check_origin
from moondream_cv.server.service import Service

logger = logging.getLogger(__name__)

PROBE_PATHS = frozenset({"/health", "/ready"})
OPEN_PATHS = PROBE_PATHS | {"/", "/openapi.json", "/favicon.ico", "/info"}  # no API key required
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SLASHES = re.compile(r"/{2,}")


class RequestLoggingMiddleware:
    """Assigns an ID to each request and records its response in the log and the metrics.

    It also replaces repeated slashes in paths by single ones.
    """

    def __init__(self, app: ASGIApp, service: Service, apis: Sequence[ApiSpec]) -> None:
        self._app, self._service, self._apis = app, service, apis

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI event stream; everything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        # Assign the ID
        scope = {**scope, "path": _SLASHES.sub("/", scope["path"])}
        received_id = Headers(scope=scope).get("x-request-id", "")
        own_id = received_id if _ID.fullmatch(received_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = own_id
        token = request_id.set(own_id)
        client_address.set(address_group(scope.get("client")))
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Request-Id", own_id)
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        # Process the request and record its response
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            request_id.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Log and count a request; the status is 499 if the client disconnected before the response."""
        status = status or 499
        route = getattr(scope.get("route"), "path", "other")
        api = find_api(self._apis, scope["path"]).name
        metrics = self._service.metrics
        metrics.requests.labels(api, route, str(status)).inc()
        metrics.seconds.labels(api, route).observe(seconds)
        level = logging.DEBUG if scope["path"] in OPEN_PATHS | {"/metrics"} else logging.INFO
        logger.log(
            level,
            "%s %s %d",
            scope["method"],
            route if route != "other" else scope["path"][:200],
            status,
            extra={"dialect": api, "status": status, "milliseconds": round(seconds * 1000, 1)},
        )


class AuthMiddleware:
    """Rejects unauthenticated, cross-origin and oversized requests, and converts errors to responses.

    The checks are, in this order: host and origin, API key, content type, size, complexity of the JSON. Bodies are
    received completely before a route is called, except the parts of uploaded batches. Errors have the format of the
    API that the path belongs to.
    """

    def __init__(self, app: ASGIApp, service: Service, apis: Sequence[ApiSpec]) -> None:
        self._app, self._service, self._apis = app, service, apis
        self._budget = ReceiveBudget(2 * service.settings.max_body)
        self._trimmer = MemoryTrimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI event stream; everything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        api = find_api(self._apis, scope["path"])
        started = False

        async def send_and_note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            checked = await self._check(scope, receive, api)
            await self._app(scope, checked, send_and_note_start)
        except Exception as error:
            if started:  # the status is already sent, so the response can only be aborted
                raise
            await api.error_response(to_server_error(error))(scope, receive, send)
        finally:
            if declared_size(Headers(scope=scope), 0) > LARGE:
                self._trimmer.trim()

    async def _check(self, scope: Scope, receive: Receive, api: ApiSpec) -> Receive:
        """Check a request and return the channel from which routes read it.

        Raises:
            ServerError: The request is rejected.
            ClientDisconnected: The client disconnected before its request was complete.
        """
        # Checks that need only the head
        settings, headers = self._service.settings, Headers(scope=scope)
        if not settings.api_keys and scope["path"] not in PROBE_PATHS:
            check_origin(scope, headers, settings)
        has_key = self._service.is_valid_key(list(keys_of(scope)))
        needs_key = not has_key and not is_signed(scope["path"]) and scope["path"] not in OPEN_PATHS
        if needs_key and not (api.key_in_body and scope["method"] == "POST"):
            raise invalid_key_error()
        if scope["method"] not in ("POST", "PUT", "PATCH") or is_upload(scope):
            return receive
        check_content_type(scope, headers)
        size = declared_size(headers, settings.max_body)
        if size > settings.max_body:
            raise _too_large(settings.max_body)

        # Checks that need the body
        async with self._budget.reserve(client_address.get(), size):
            body = await _read_body(receive, settings.max_body)
        if needs_key and not self._service.is_valid_key(await key_in_body(body)):
            raise invalid_key_error()
        if scope["path"] not in LINES_PATHS:
            await check_json(body, MAX_TRAIN_STEP_VALUES if scope["path"] == TRAIN_STEP_PATH else MAX_VALUES)
        return _Replay(body, receive)


class _Replay:
    """ASGI `receive` channel that returns a body that has been received, then continues with the original channel."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()  # waits until the client disconnects
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _read_body(receive: Receive, limit: int) -> bytes:
    """Receive a complete body.

    Raises:
        ServerError: 413, the body is larger than `limit` bytes; 408, it did not arrive in time.
        ClientDisconnected: The client disconnected.
    """
    parts, size = [], 0
    async for part in read_pieces(receive):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


def declared_size(headers: Headers, unknown: int) -> int:
    """Return the Content-Length of a request, or `unknown` if it has none."""
    declared = headers.get("content-length", "")
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else unknown


def keys_of(scope: Scope) -> Iterator[str]:
    """Yield the API keys in the headers and the query of a request."""
    headers = Headers(scope=scope)
    for name in ("x-moondream-auth", "x-api-key", "token"):
        if headers.get(name):
            yield headers[name].strip()
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "key"):
        yield key.strip()
    for name, value in parse_qsl(scope.get("query_string", b"").decode("latin-1")):
        if name == "api_key":
            yield value


def invalid_key_error() -> ServerError:
    """Return the error response for a request without a valid API key."""
    return ServerError(401, "missing or invalid API key")


def _too_large(limit: int) -> ServerError:
    return ServerError(413, f"the request body exceeds {limit:,} bytes; send a smaller image")
