"""Bodies of HTTP responses, read piece by piece up to a limit, so that no server can fill the client's memory.

Limits apply to the bytes that are received and to the bytes that they decompress to. Used for httpx and for requests.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from moondream_cv.backends.failures import Failure

MAX_REPLY = 32 * 2**20
"""Bytes of a JSON reply."""
MAX_ERROR = 2**20
"""Bytes of the body of an error."""
MAX_LINE = 2**20
"""Bytes of a line of an event stream."""
MAX_STREAM = 64 * 2**20
"""Bytes of an event stream."""
MAX_VALUES = 2_000_000
"""Values in a JSON reply: three bytes of JSON can become a Python object of 64."""
ACCEPT_ENCODING = "gzip"
"""The only compression that is requested and decoded."""

_GZIP = zlib.MAX_WBITS | 16
_PIECE = 64 * 2**10


def max_body(status: int) -> int:
    """Return the limit in bytes for the body of a response with this status code."""
    return MAX_REPLY if 200 <= status < 300 else MAX_ERROR


def read_body(raw: Iterable[bytes], encoding: str, length: str, limit: int) -> bytes:
    """Read a whole body.

    Args:
        raw: The pieces as received, still compressed.
        encoding: The Content-Encoding header.
        length: The Content-Length header; a value above the limit is rejected before anything is read.
        limit: Maximum size in bytes, compressed and decompressed.

    Raises:
        Failure: The body exceeds the limit, or its compression is unknown or invalid.
    """
    if length.isdigit() and (len(length) > 20 or int(length) > limit):
        raise _too_large("body", limit)
    return b"".join(decoded(raw, encoding, limit))


def decoded(raw: Iterable[bytes], encoding: str, limit: int, what: str = "body") -> Iterator[bytes]:
    """Yield a body's decompressed pieces; arguments and errors as in `read_body`.

    Args:
        what: The body's name in the error message.
    """
    name = encoding.strip().lower()
    received = _limited(raw, limit, what)
    if name in ("", "identity"):
        yield from received
    elif name in ("gzip", "x-gzip"):
        yield from _limited(_gunzipped(received), limit, what)
    else:
        raise Failure(f"answered with the content encoding {name[:40]!r}; only gzip was requested")


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of an event stream as they arrive, without line feeds.

    Raises:
        Failure: A line exceeds `MAX_LINE`.
    """
    rest = bytearray()
    for piece in pieces:
        *complete, last = piece.split(b"\n")
        for line in complete:
            _extend(rest, line)
            yield bytes(rest)
            rest.clear()
        _extend(rest, last)
    yield bytes(rest)


def check_values(body: bytes) -> None:
    """Reject JSON with so many values that it would take far more memory than its text.

    Raises:
        Failure: There may be more than `MAX_VALUES`; the commas and brackets within strings count as well.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise Failure(f"answered JSON with more than the limit of {MAX_VALUES:,} values")


def _gunzipped(raw: Iterable[bytes]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(_GZIP)
    try:
        for received in raw:
            rest = received
            while not inflater.eof:
                piece = inflater.decompress(rest, _PIECE)
                rest = inflater.unconsumed_tail
                yield piece
                if not rest and len(piece) < _PIECE:
                    break
    except zlib.error as error:
        raise Failure(f"answered invalid gzip data ({error})") from error


def _limited(pieces: Iterable[bytes], limit: int, what: str) -> Iterator[bytes]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > limit:
            raise _too_large(what, limit)
        yield piece


def _extend(line: bytearray, more: bytes) -> None:
    if len(line) + len(more) > MAX_LINE:
        raise _too_large("line in its event stream", MAX_LINE)
    line += more


def _too_large(what: str, limit: int) -> Failure:
    return Failure(f"answered with a {what} larger than the limit of {limit / 2**20:g} MiB")
