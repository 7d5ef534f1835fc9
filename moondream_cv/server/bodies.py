"""Checks of request bodies before they are parsed: the content type, the number of JSON values, their nesting.

Parsing turns a few bytes into objects of a hundred: the number of values is limited before that, whatever the schema of
the route. Bodies above `LARGE` are checked in a thread.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import Scope

from moondream_cv.server.errors import ServerError

T = TypeVar("T")

LARGE = 2**20  # bytes; smaller bodies are parsed faster than a thread wakes up
MAX_VALUES = 20_000  # in one JSON document; commas and brackets inside of strings count as well
MAX_DEPTH = 64
JSON_TYPES = re.compile(r"application/(json|jsonl|x-ndjson|ndjson|[a-z0-9.-]+\+json)", re.IGNORECASE)
MULTIPART = "multipart/form-data"
LINES_PATHS = frozenset({"/v1/batch"})  # bodies of JSON lines, each of which is checked by itself
_MAX_QUOTES = 4 * (MAX_VALUES + 1)  # of valid JSON: two for a key and two for a string, for each value
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class ReceiveBudget:
    """Bytes of bodies that may be received from one client at a time.

    A body is read only when all of it fits, so that bodies that never end fill no memory and only delay others of the
    same client.
    """

    def __init__(self, size: int) -> None:
        """Start with nothing reserved.

        Args:
            size: Bytes for each client; no body may be larger.
        """
        self._size = size
        self._reserved: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def reserve(self, client: str, size: int) -> AsyncIterator[None]:
        """Wait until a body of this size fits, first come, first served; it is returned at the end of the context."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((size, turn))
        self._hand_out(client)
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._reserved[client] -= size
            self._hand_out(client)

    def _hand_out(self, client: str) -> None:
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
    """Reject POST requests that a web page could send without asking the server first.

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


async def check_json(body: bytes) -> None:
    """Reject JSON that takes long to parse or much memory.

    Args:
        body: A document; it need not be valid.

    Raises:
        ServerError: 413, it has too many values; 400, it is nested too deeply.
    """
    await _in_thread_if_large(_check_json, body)


async def parse_json(text: bytes) -> object:
    """Check and parse a JSON document.

    Raises:
        ServerError: As `check_json`.
        ValueError: It is not valid JSON.
    """
    return await _in_thread_if_large(_checked_and_parsed, text)


async def key_in_body(body: bytes) -> list[str]:
    """Return the API key in `api_key` of a JSON object; an empty list if there is none."""
    try:
        parsed = await parse_json(body)
    except (ServerError, ValueError):
        return []
    key = parsed.get("api_key") if isinstance(parsed, dict) else None
    return [key.strip()] if isinstance(key, str) else []


async def _in_thread_if_large(work: Callable[[bytes], T], body: bytes) -> T:
    return await asyncio.to_thread(work, body) if len(body) > LARGE else work(body)


def _checked_and_parsed(text: bytes) -> object:
    _check_json(text)
    return from_json(text, allow_inf_nan=False)


def _check_json(body: bytes) -> None:
    brackets = body.count(b"[") + body.count(b"{")
    if brackets + body.count(b",") > MAX_VALUES:
        raise ServerError(413, f"the JSON body must have at most {MAX_VALUES:,} values; send several requests")
    if brackets > MAX_DEPTH:
        _check_depth(body)


def _check_depth(body: bytes) -> None:
    """Check the nesting, with operations that take the same short time for every body of a size."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # without escaped backslashes and quotes
    if plain.count(b'"') > _MAX_QUOTES:
        raise ServerError(400, "the body is not valid JSON")
    depth = 0
    for bracket in b"".join(plain.split(b'"')[::2]).translate(None, _NO_BRACKETS):  # outside of strings
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ServerError(400, f"the JSON body must be nested at most {MAX_DEPTH} levels deep")
