"""What happens to every request before a route sees it, as plain ASGI: paths, ids, logs, counts, keys, sizes."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moondream_cv.server.apis.base import Dialect, find_dialect
from moondream_cv.server.bodies import LARGE, LINES_PATHS, ReceiveBudget, check_content_type, check_json, key_in_body
from moondream_cv.server.connections import address_group
from moondream_cv.server.errors import ClientLeft, ServerError, explain
from moondream_cv.server.logs import client_address, request_id
from moondream_cv.server.memory import MemoryTrimmer
from moondream_cv.server.service import Service
from moondream_cv.server.sites import check_site

logger = logging.getLogger(__name__)

PROBE_PATHS = frozenset({"/health", "/ready"})
OPEN_PATHS = PROBE_PATHS | {"/", "/openapi.json", "/favicon.ico", "/info"}
BODY_SECONDS = 30  # between two parts of a body
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SLASHES = re.compile(r"/{2,}")


class Entrance:
    """Mends doubled slashes, gives every request an id, and logs and counts its answer."""

    def __init__(self, app: ASGIApp, service: Service, dialects: Sequence[Dialect]) -> None:
        self._app, self._service, self._dialects = app, service, dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": _SLASHES.sub("/", scope["path"])}
        given = Headers(scope=scope).get("x-request-id", "")
        own = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = own
        token = request_id.set(own)
        client_address.set(address_group(scope.get("client")))
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Request-Id", own)
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            request_id.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Log and count a request; 499 is one whose client left before there was an answer."""
        route = getattr(scope.get("route"), "path", "other")
        dialect = find_dialect(self._dialects, scope["path"]).name
        meters = self._service.meters
        meters.requests.labels(dialect, route, str(status or 499)).inc()
        meters.seconds.labels(dialect, route).observe(seconds)
        level = logging.DEBUG if scope["path"] in OPEN_PATHS | {"/metrics"} else logging.INFO
        logger.log(
            level,
            "%s %s %d",
            scope["method"],
            route if route != "other" else scope["path"][:200],
            status or 499,
            extra={"dialect": dialect, "status": status or 499, "milliseconds": round(seconds * 1000, 1)},
        )


class Gate:
    """Rejects what no route should see, and answers what routes raise, each in the path's dialect.

    In this order: requests for other hosts or from other sites, without a valid key, with bodies of another type, too
    large, or not worth parsing. Bodies are read completely before a route sees the request.
    """

    def __init__(self, app: ASGIApp, service: Service, dialects: Sequence[Dialect]) -> None:
        self._app, self._service, self._dialects = app, service, dialects
        self._receiving = ReceiveBudget(2 * service.options.max_body)
        self._memory = MemoryTrimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        dialect = find_dialect(self._dialects, scope["path"])
        begun = False

        async def send_noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            checked = await self._check(scope, receive, dialect)
            await self._app(scope, checked, send_noting)
        except Exception as error:
            if begun:  # the answer breaks off, which is all that can still be said
                raise
            await dialect.answer(explain(error))(scope, receive, send)
        finally:
            if declared_size(Headers(scope=scope), 0) > LARGE:
                self._memory.trim()

    async def _check(self, scope: Scope, receive: Receive, dialect: Dialect) -> Receive:
        """Return what the routes read the request from.

        Raises:
            ServerError: The request is rejected.
            ClientLeft: The client disconnected before its request was complete.
        """
        # Checks that need only the head
        options, headers = self._service.options, Headers(scope=scope)
        if not options.api_keys and scope["path"] not in PROBE_PATHS:
            check_site(scope, headers, options)
        has_key = self._service.check_key(list(keys_of(scope)))
        needs_key = not has_key and scope["path"] not in OPEN_PATHS
        if needs_key and not (dialect.key_in_body and scope["method"] == "POST"):
            raise no_key()
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        check_content_type(scope, headers)
        size = declared_size(headers, options.max_body)
        if size > options.max_body:
            raise _too_large(options.max_body)

        # Checks that need the body
        async with self._receiving.reserve(client_address.get(), size):
            body = await _read_body(receive, options.max_body)
        if needs_key and not self._service.check_key(await key_in_body(body)):
            raise no_key()
        if scope["path"] not in LINES_PATHS:
            await check_json(body)
        return _Replay(body, receive)


class _Replay:
    """Gives a body that has been read already, then whatever comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()  # waits until the client disconnects
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _read_body(receive: Receive, limit: int) -> bytes:
    """Read a body completely.

    Raises:
        ServerError: It is larger than `limit` bytes, or does not arrive in time.
        ClientLeft: The client disconnected.
    """
    parts, size = [], 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), BODY_SECONDS)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise ServerError(408, f"no part of the request body arrived for {BODY_SECONDS} seconds") from error
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def declared_size(headers: Headers, unknown: int) -> int:
    """Return the Content-Length of a request, or `unknown` if it has none."""
    declared = headers.get("content-length", "")
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else unknown


def keys_of(scope: Scope) -> Iterator[str]:
    """The API keys that a request carries, wherever the clients of the four dialects put them but for the body."""
    headers = Headers(scope=scope)
    for name in ("x-moondream-auth", "x-api-key"):
        if headers.get(name):
            yield headers[name].strip()
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "key"):
        yield key.strip()
    for name, value in parse_qsl(scope.get("query_string", b"").decode("latin-1")):
        if name == "api_key":
            yield value


def no_key() -> ServerError:
    """What somebody without a key is told."""
    return ServerError(401, "this server asks for an API key, and the request has none or a wrong one")


def _too_large(limit: int) -> ServerError:
    return ServerError(413, f"the request's body is larger than {limit:,} bytes; send a smaller image")
