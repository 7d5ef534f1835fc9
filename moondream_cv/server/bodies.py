"""Checks of request bodies before parsing: the content type, the number of JSON values and their nesting.

A parsed JSON value can take a hundred bytes for two bytes of text. The number of values is therefore limited before
parsing, for all routes. Bodies above `LARGE` are checked in a thread.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from moondream_cv.server.errors import ClientDisconnected, ServerError

T = TypeVar("T")

LARGE = 2**20  # bytes; parsing a smaller body is faster than starting a thread
MAX_VALUES = 20_000  # of one JSON document; commas and brackets in strings count as well
MAX_TRAIN_STEP_VALUES = 1_000_000  # rollouts list every token, coordinate and log-probability
MAX_DEPTH = 64
JSON_TYPES = re.compile(r"application/(json|jsonl|x-ndjson|ndjson|[a-z0-9.-]+\+json)", re.IGNORECASE)
MULTIPART = "multipart/form-data"
TRAIN_STEP_PATH = "/v1/tuning/train_step"
LINES_PATHS = frozenset({"/v1/batch"})  # bodies of JSON lines, which are checked line by line
BODY_SECONDS = 30  # maximum time between two parts of a body
_UPLOADS_PREFIX = "/v1/batch/"  # PUT requests with parts of files, which routes write to the disk as they arrive
_QUOTES_PER_VALUE = 4  # in valid JSON, each value has two for a key and two for a string
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class ReceiveBudget:
    """Limits the total size of the bodies that each client sends at the same time.

    A body is received only when its full size fits the budget. Bodies that never end thus fill no memory and delay only
    requests of the same client.
    """

    def __init__(self, size: int) -> None:
        """Create a budget.

        Args:
            size: Bytes for each client; must be at least the maximum size of a body.
        """
        self._size = size
        self._reserved: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def reserve(self, client: str, size: int) -> AsyncIterator[None]:
        """Reserve bytes for the duration of the context. Waits until they are free, in order of arrival.

        Args:
            client: Address of the client.
            size: Size of the body in bytes.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((size, turn))
        self._grant(client)
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._reserved[client] -= size
            self._grant(client)

    def _grant(self, client: str) -> None:
        waiting = self._waiting.get(client, deque())
        while waiting:
            size, turn = waiting[0]
            if not turn.done():
                if self._reserved[client] + size > self._size:
                    return
                self._reserved[client] += size
                turn.set_result(None)
            waiting.popleft()
        self._waiting.pop(client, None)
        if not self._reserved[client]:
            del self._reserved[client]


def check_content_type(scope: Scope, headers: Headers) -> None:
    """Reject POST requests that a web page can send without a CORS preflight request.

    Args:
        scope: ASGI scope of the request.
        headers: Headers of the request.

    Raises:
        ServerError: 415; the content type is neither JSON nor multipart.
    """
    given = headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    is_multipart = kind == MULTIPART and scope["path"] not in LINES_PATHS
    if scope["method"] != "POST" or is_multipart or JSON_TYPES.fullmatch(kind) or not (has_body or kind):
        return
    expected = "application/x-ndjson" if scope["path"] in LINES_PATHS else "application/json"
    received = repr(given[:100]) if given else "none"
    raise ServerError(415, f"the Content-Type must be {expected}, got {received}")


def is_upload(scope: Scope) -> bool:
    """Return whether the route of a request reads the body in pieces, which are not checked before."""
    return scope["method"] == "PUT" and str(scope["path"]).startswith(_UPLOADS_PREFIX)


async def read_pieces(receive: Receive) -> AsyncGenerator[bytes, None]:
    """Yield a body in pieces, as they arrive.

    Args:
        receive: ASGI channel of the request.

    Raises:
        ServerError: 408; the body did not arrive in time.
        ClientDisconnected: The client disconnected.
    """
    more_body = True
    while more_body:
        try:
            message = await asyncio.wait_for(receive(), BODY_SECONDS)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise ServerError(408, f"no part of the request body arrived for {BODY_SECONDS} seconds") from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        yield message.get("body", b"")
        more_body = message.get("more_body", False)


async def check_json(body: bytes, max_values: int = MAX_VALUES) -> None:
    """Reject JSON that would take much time or memory to parse.

    Args:
        body: JSON document, which can be invalid.
        max_values: Maximum number of values.

    Raises:
        ServerError: 413, the document has too many values; 400, it is nested too deeply.
    """
    await _in_thread_if_large(partial(_check_json, max_values=max_values), body)


async def parse_json(text: bytes, max_values: int = MAX_VALUES) -> object:
    """Check and parse a JSON document.

    Args:
        text: JSON document.
        max_values: Maximum number of values.

    Raises:
        ServerError: The document fails `check_json`.
        ValueError: The document is not valid JSON.
    """
    return await _in_thread_if_large(partial(_check_and_parse, max_values=max_values), text)


async def key_in_body(body: bytes) -> list[str]:
    """Return the value of `api_key` in a JSON object; an empty list if there is none."""
    try:
        parsed = await parse_json(body)
    except (ServerError, ValueError):
        return []
    key = parsed.get("api_key") if isinstance(parsed, dict) else None
    return [key.strip()] if isinstance(key, str) else []


async def _in_thread_if_large(work: Callable[[bytes], T], body: bytes) -> T:
    return await asyncio.to_thread(work, body) if len(body) > LARGE else work(body)


def _check_and_parse(text: bytes, max_values: int) -> object:
    _check_json(text, max_values)
    return from_json(text, allow_inf_nan=False)


def _check_json(body: bytes, max_values: int) -> None:
    brackets = body.count(b"[") + body.count(b"{")
    if brackets + body.count(b",") > max_values:
        raise ServerError(413, f"the JSON body must have at most {max_values:,} values; send several requests")
    if brackets > MAX_DEPTH:
        _check_depth(body, max_values)


def _check_depth(body: bytes, max_values: int) -> None:
    """Check the nesting in linear time, whatever the content of the body."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # without escaped characters
    if plain.count(b'"') > _QUOTES_PER_VALUE * (max_values + 1):
        raise ServerError(400, "the body is not valid JSON")
    depth = 0
    for bracket in b"".join(plain.split(b'"')[::2]).translate(None, _NO_BRACKETS):  # outside strings
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ServerError(400, f"the JSON body must be nested at most {MAX_DEPTH} levels deep")
