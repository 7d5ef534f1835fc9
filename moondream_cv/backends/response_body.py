"""Bodies of HTTP responses, read in chunks with size limits, so that a server cannot exhaust the client's memory.

The limits apply to the received bytes and to the decompressed bytes. Used with httpx and with requests.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from moondream_cv.backends.retries import AttemptError

MAX_BODY_BYTES = 32 * 2**20
"""Maximum size of a JSON response in bytes."""
MAX_ERROR_BYTES = 2**20
"""Maximum size of an error response in bytes."""
MAX_LINE_BYTES = 2**20
"""Maximum length of a line of an event stream in bytes."""
MAX_STREAM_BYTES = 64 * 2**20
"""Maximum size of an event stream in bytes."""
MAX_VALUES = 2_000_000
"""Maximum number of values in a JSON response: three bytes of JSON can become a Python object of 64 bytes."""
ACCEPT_ENCODING = "gzip"
"""Accepted compression; other kinds are rejected."""

_GZIP = zlib.MAX_WBITS | 16
_CHUNK_BYTES = 64 * 2**10


def max_body_bytes(status: int) -> int:
    """Return the size limit in bytes for the body of a response with this status code."""
    return MAX_BODY_BYTES if 200 <= status < 300 else MAX_ERROR_BYTES


def read_body(raw: Iterable[bytes], encoding: str, length: str, limit: int) -> bytes:
    """Read and decompress a whole body.

    Args:
        raw: Chunks as received, still compressed.
        encoding: Content-Encoding header.
        length: Content-Length header; a value above the limit is rejected before the body is read.
        limit: Maximum size in bytes, compressed and decompressed.

    Raises:
        AttemptError: The body exceeds the limit, or its compression is unknown or invalid.
    """
    if length.isdigit() and (len(length) > 20 or int(length) > limit):
        raise _too_large("body", limit)
    return b"".join(decompressed(raw, encoding, limit))


def decompressed(raw: Iterable[bytes], encoding: str, limit: int, what: str = "body") -> Iterator[bytes]:
    """Yield the decompressed chunks of a body.

    Args:
        raw: Chunks as received, still compressed.
        encoding: Content-Encoding header.
        limit: Maximum size in bytes, compressed and decompressed.
        what: Name of the body in error messages.

    Raises:
        AttemptError: The body exceeds the limit, or its compression is unknown or invalid.
    """
    name = encoding.strip().lower()
    received = _limited(raw, limit, what)
    if name in ("", "identity"):
        yield from received
    elif name in ("gzip", "x-gzip"):
        yield from _limited(_gunzipped(received), limit, what)
    else:
        raise AttemptError(f"returned the content encoding {name[:40]!r}, but only gzip was requested")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of an event stream as they arrive, without line feeds.

    Raises:
        AttemptError: A line exceeds `MAX_LINE_BYTES`.
    """
    rest = bytearray()
    for chunk in chunks:
        *complete, last = chunk.split(b"\n")
        for line in complete:
            _extend(rest, line)
            yield bytes(rest)
            rest.clear()
        _extend(rest, last)
    yield bytes(rest)


def check_value_count(body: bytes) -> None:
    """Reject JSON with so many values that its Python objects would need far more memory than its text.

    Raises:
        AttemptError: There may be more than `MAX_VALUES` values; commas and brackets inside strings count as well.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise AttemptError(f"returned JSON with more than the limit of {MAX_VALUES:,} values")


def _gunzipped(raw: Iterable[bytes]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(_GZIP)
    try:
        for received in raw:
            rest = received
            while not inflater.eof:
                chunk = inflater.decompress(rest, _CHUNK_BYTES)
                rest = inflater.unconsumed_tail
                yield chunk
                if not rest and len(chunk) < _CHUNK_BYTES:
                    break
    except zlib.error as error:
        raise AttemptError(f"returned invalid gzip data ({error})") from error


def _limited(chunks: Iterable[bytes], limit: int, what: str) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > limit:
            raise _too_large(what, limit)
        yield chunk


def _extend(line: bytearray, more: bytes) -> None:
    if len(line) + len(more) > MAX_LINE_BYTES:
        raise _too_large("line in its event stream", MAX_LINE_BYTES)
    line += more


def _too_large(what: str, limit: int) -> AttemptError:
    return AttemptError(f"returned a {what} larger than the limit of {limit / 2**20:g} MiB")
