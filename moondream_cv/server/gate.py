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

from .dialect import Dialect, find_dialect
from .errors import ServerError, explain
from .logs import request_id
from .service import Service

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json", "/favicon.ico"})
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
    """Refuses who has no key and what is too large, and answers what routes raise, each in the path's dialect."""

    def __init__(self, app: ASGIApp, service: Service, dialects: Sequence[Dialect]) -> None:
        self._app, self._service, self._dialects = app, service, dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        dialect = find_dialect(self._dialects, scope["path"])
        limit = self._service.options.max_body
        authorised = self._service.check_key(list(keys_of(scope)))
        scope.setdefault("state", {})["authorised"] = authorised
        if not authorised and scope["path"] not in OPEN_PATHS and not dialect.key_in_body:
            await dialect.answer(no_key())(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared[:20]) > limit:
            await dialect.answer(_too_large(limit))(scope, receive, send)
            return
        taken, complete = 0, False

        async def receive_limited() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()  # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise ServerError(408, f"nothing of the request's body came for {BODY_SECONDS} seconds") from error
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > limit:
                raise _too_large(limit)
            return message

        begun = False

        async def send_noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive_limited, send_noting)
        except Exception as error:
            if begun:  # the answer breaks off, which is all that can still be said
                raise
            await dialect.answer(explain(error))(scope, receive, send)


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
